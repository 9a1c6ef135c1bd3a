#!/usr/bin/env bash
# The proof of generated NPU kernels (tests/npu_kernels) on a machine without an NPU and without CANN: an environment of
# its own (.venv-npu-kernels) with the real bishengir-compile and torch_npu, CANN's stand-ins, then pytest. Arguments go
# to pytest, for example: bash scripts/npu_kernels_lane.sh -k lamb; --slow runs the slow tier too.
# Environment: PYTHON (which interpreter makes .venv-npu-kernels).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-npu-kernels"
PY="$VENV/bin/python"
STUBS="$VENV/cann-stubs"
tier=(-m "not slow")
given=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then tier=(); else given+=("$argument"); fi
done

kernels_environment() {
    local stamp="$VENV/.installed" want
    want="$(fingerprint requirements/base.txt requirements/npu.txt requirements/npu_kernels.txt)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$PY" -c '' 2>/dev/null; then
        echo ".venv-npu-kernels has requirements/npu_kernels.txt already"
        return
    fi
    rm -f "$stamp"
    echo "making .venv-npu-kernels with $("${PYTHON:-python3}" --version)"
    "${PYTHON:-python3}" -m venv --clear "$VENV"
    echo "installing requirements/npu_kernels.txt (torch is large: the first time takes minutes)"
    "$PY" -m pip install --progress-bar off --quiet -r requirements/npu_kernels.txt
    "$PY" -m pip check
    echo "$want" >"$stamp"
}

kernels_tests() {
    # Without the first, `import torch` would load torch_npu; the second is where the loader finds "CANN".
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH="$STUBS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        PYTHONPATH="$ROOT" "$PY" -m pytest tests/npu_kernels --durations=5 "${tier[@]}" "${given[@]}"
}

STAGES=3
stage "environment (.venv-npu-kernels)" kernels_environment
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_kernels_lane.sh; fi
stage "CANN stubs" "$PY" tests/npu/cann_stubs.py "$STUBS"
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_kernels_lane.sh; fi
stage "tests/npu_kernels" kernels_tests
finish scripts/npu_kernels_lane.sh
