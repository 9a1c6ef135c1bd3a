#!/usr/bin/env bash
# The tests that need torch_npu and torchair (tests/npu), on a machine without an NPU and without CANN: an environment
# of its own with the real torch_npu wheel (.venv-npu), stand-ins for the libraries of CANN that the wheel links to
# (tests/npu/cann_stubs.py), then pytest. Arguments go to pytest, for example: bash scripts/npu_lane.sh -k slice
# Environment: PYTHON (which interpreter makes .venv-npu).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-npu"
PY="$VENV/bin/python"
STUBS="$VENV/cann-stubs"

npu_environment() {
    local stamp="$VENV/.installed" want
    want="$(fingerprint requirements/base.txt requirements/npu.txt)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$PY" -c '' 2>/dev/null; then
        echo ".venv-npu has requirements/npu.txt already"
        return
    fi
    rm -f "$stamp"
    echo "making .venv-npu with $("${PYTHON:-python3}" --version)"
    "${PYTHON:-python3}" -m venv --clear "$VENV"
    echo "installing requirements/npu.txt (torch is large: the first time takes minutes)"
    "$PY" -m pip install --progress-bar off --quiet -r requirements/npu.txt
    "$PY" -m pip check
    echo "$want" >"$stamp"
}

npu_tests() {
    # Without the first, `import torch` would load torch_npu; the second is where the loader finds "CANN". The
    # project itself is not installed here: torch.compile gets the backend as a function.
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH="$STUBS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        PYTHONPATH="$ROOT" "$PY" -m pytest tests/npu --durations=5 "$@"
}

STAGES=3
stage "environment (.venv-npu)" npu_environment
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_lane.sh; fi
stage "CANN stubs" "$PY" tests/npu/cann_stubs.py "$STUBS"
if [ "$FAILED" -ne 0 ]; then finish scripts/npu_lane.sh; fi
stage "tests/npu" npu_tests "$@"
finish scripts/npu_lane.sh
