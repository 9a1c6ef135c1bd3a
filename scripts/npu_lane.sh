#!/usr/bin/env bash
# The tests that need torch_npu and torchair (tests/npu), on a machine without an NPU and without CANN: an environment
# of its own with the real torch_npu wheel (.venv-npu), stand-ins for the libraries of CANN that the wheel links to
# (tests/npu/cann_stubs.py), then pytest. Arguments go to pytest, for example: bash scripts/npu_lane.sh -k slice
# Environment: PYTHON (which interpreter makes .venv-npu).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-npu"

STAGES=3
stage "environment (.venv-npu)" own_environment base npu
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_lane.sh; fi
stage "CANN stubs" "$VENV/bin/python" tests/npu/cann_stubs.py "$VENV/cann-stubs"
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_lane.sh; fi
stage "tests/npu" with_stubs -m pytest tests/npu --durations=5 "$@"
finish scripts/npu_lane.sh
