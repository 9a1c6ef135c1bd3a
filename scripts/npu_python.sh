#!/usr/bin/env bash
# Runs a script in the environment of the NPU lane (which bash scripts/npu_lane.sh makes), for example:
# bash scripts/npu_python.sh scripts/npu_layouts.py 10 100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-npu"
if [ ! -x "$VENV/bin/python" ] || [ ! -d "$VENV/cann-stubs" ]; then
    echo "there is no .venv-npu with CANN's stand-ins; run first: bash scripts/npu_lane.sh" >&2
    exit 1
fi
with_stubs "$@"
