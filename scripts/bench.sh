#!/usr/bin/env bash
# Step and compile times against torch.optim (scripts/bench.py). Makes the environment if it is missing. Arguments go to
# scripts/bench.py: --quick, --only adam, --inductor, --stages 10 100
# With --model npu: launches, bytes and modelled times of steps on an NPU, in the environment that scripts/npu_lane.sh
# makes (minutes; --only adamw, for example, for less).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case " $* " in *" --model "* | *" --model="*)
    exec bash scripts/npu_python.sh scripts/bench.py "$@"
    ;;
esac

STAGES=2
stage "environment (.venv)" environment demo
if [ "$FAILED" -ne 0 ]; then finish scripts/bench.sh; fi
stage "measuring" "$PY" scripts/bench.py "$@"
finish scripts/bench.sh
