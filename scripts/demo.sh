#!/usr/bin/env bash
# The main job: a small convolutional network learns handwritten digits with each of the six optimizers, eagerly and
# compiled (scripts/demo.py). Makes the environment if it is missing. Arguments go to scripts/demo.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

STAGES=2
stage "environment (.venv)" environment demo
if [ "$FAILED" -ne 0 ]; then finish scripts/demo.sh; fi
stage "training" "$PY" scripts/demo.py "$@"
finish scripts/demo.sh
