#!/usr/bin/env bash
# Step and compile times against torch.optim (scripts/bench.py). Makes the environment if it is missing. Arguments go to
# scripts/bench.py: --quick, --only adam, --inductor, --stages 10 100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

STAGES=2
stage "environment (.venv)" environment demo
if [ "$FAILED" -ne 0 ]; then finish scripts/bench.sh; fi
stage "measuring" "$PY" scripts/bench.py "$@"
finish scripts/bench.sh
