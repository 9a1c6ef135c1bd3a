#!/usr/bin/env bash
# Step and compile times against torch.optim (scripts/bench.py). Makes the environment if it is missing. Arguments go to
# scripts/bench.py: --quick, --only adam, --inductor, --stages 10 100
# With --model npu: launches, bytes and modelled times of steps on an NPU, in the environment that scripts/npu_lane.sh
# makes (minutes; --only adamw, for example, for less).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case " $* " in *" --model "* | *" --model="*)
    VENV="$ROOT/.venv-npu"
    if [ ! -x "$VENV/bin/python" ] || [ ! -d "$VENV/cann-stubs" ]; then
        echo "there is no .venv-npu with CANN's stand-ins; run first: bash scripts/npu_lane.sh" >&2
        exit 1
    fi
    # Without the first, `import torch` would load torch_npu; the second is where the loader finds "CANN".
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH="$VENV/cann-stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        PYTHONPATH="$ROOT" exec "$VENV/bin/python" scripts/bench.py "$@"
    ;;
esac

STAGES=2
stage "environment (.venv)" environment demo
if [ "$FAILED" -ne 0 ]; then finish scripts/bench.sh; fi
stage "measuring" "$PY" scripts/bench.py "$@"
finish scripts/bench.sh
