#!/usr/bin/env bash
# Training libraries with a compiled step: makes .venv-stacks, which has the libraries and sees .venv's torch, and runs
# tests/stacks in it. Every test trains a tiny random model beside its eager twin. Checks that docs/compatibility.md has the
# table of what ran; with --write puts it there. Other arguments go to pytest: bash scripts/stacks.sh -k lightning
# Environment: PYTHON (which interpreter makes .venv).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-stacks"

stacks_environment() {
    local want stamp="$VENV/.installed"
    want="$(fingerprint requirements/base.txt requirements/test.txt requirements/stacks.txt)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        echo ".venv-stacks has requirements/stacks.txt already"
        return
    fi
    libraries stacks
    echo "$want" >"$stamp"
}

stacks_tests() {
    # Nothing is fetched: the models are made of random numbers.
    NPU_FUSE_FULL=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE PYTHONPATH="$ROOT" \
        "$VENV/bin/python" scripts/stacks_table.py "$@"
}

STAGES=3
stage "environment (.venv)" environment test
if [ "$FAILED" -ne 0 ]; then finish scripts/stacks.sh; fi
stage "environment (.venv-stacks)" stacks_environment
if [ "$FAILED" -ne 0 ]; then finish scripts/stacks.sh; fi
stage "tests/stacks" stacks_tests "$@"
finish scripts/stacks.sh
