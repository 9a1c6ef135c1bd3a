#!/usr/bin/env bash
# Builds the wheel, installs it with torch alone into an empty environment, and runs every Python block of README.md and
# of the pages that have whole programs there. Uses .venv for building.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

empty="$(mktemp -d)"
trap 'rm -rf "$empty"' EXIT

build() { # by way of the source distribution, so that nothing left over in build/ gets in
    "$PY" -m build --no-isolation --outdir "$empty/dist" . >"$empty/build.log" 2>&1 || {
        cat "$empty/build.log"
        return 1
    }
    ls "$empty/dist"
}

install() {
    "${PYTHON:-python3}" -m venv "$empty/venv"
    "$empty/venv/bin/python" -m pip install --progress-bar off --quiet -c requirements/base.txt "$empty"/dist/*.whl
    "$empty/venv/bin/python" -m pip check
    "$empty/venv/bin/python" -m pip list
}

STAGES=4
stage "environment (.venv)" environment test
stage "build the wheel" build
if [ "$FAILED" -eq 0 ]; then stage "install it into an empty environment" install; fi
if [ "$FAILED" -eq 0 ]; then
    stage "README.md and docs" "$empty/venv/bin/python" scripts/readme_blocks.py \
        README.md docs/from_torch_npu.md docs/compiled_functions.md
fi
finish scripts/wheel_test.sh
