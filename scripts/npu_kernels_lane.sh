#!/usr/bin/env bash
# The proof of generated NPU kernels (tests/npu_kernels) on a machine without an NPU and without CANN: an environment of
# its own (.venv-npu-kernels) with the real bishengir-compile and torch_npu, CANN's stand-ins, then pytest. Arguments go
# to pytest, for example: bash scripts/npu_kernels_lane.sh -k lamb; --slow runs the slow tier too.
# Environment: PYTHON (which interpreter makes .venv-npu-kernels).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-npu-kernels"
tier=(-m "not slow")
given=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then tier=(); else given+=("$argument"); fi
done

STAGES=3
stage "environment (.venv-npu-kernels)" own_environment base npu npu_kernels
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_kernels_lane.sh; fi
stage "CANN stubs" "$VENV/bin/python" tests/npu/cann_stubs.py "$VENV/cann-stubs"
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_kernels_lane.sh; fi
stage "tests/npu_kernels" with_stubs -m pytest tests/npu_kernels --durations=5 "${tier[@]}" "${given[@]}"
finish scripts/npu_kernels_lane.sh
