#!/usr/bin/env bash
# Does the package work with another torch? bash scripts/versions.sh [VERSION...] (default: the oldest, one between, the
# newest that was tried). Each version gets an environment of its own (.venv-torch-VERSION-python3.X, about 2 GB, without
# nvidia's packages: scripts/cuda_stubs.py makes stand-ins for their libraries) and runs scripts/version_check.py.
# Environment: PYTHON (which interpreter makes the environments).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PYTHON_VERSION="$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"

with_torch() {
    local version="$1" venv="$ROOT/.venv-torch-$1-python$PYTHON_VERSION"
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        "${PYTHON:-python3}" -m venv --clear "$venv"
        "$venv/bin/python" -m pip install --progress-bar off --quiet --no-deps "torch==$version"
        # what torch needs on a CPU, without what it declares for CUDA; pip remarks on the latter
        "$venv/bin/python" -m pip install --progress-bar off --quiet typing_extensions 'sympy>=1.13.3' networkx jinja2 \
            fsspec filelock numpy setuptools 2>/dev/null
        "$venv/bin/python" scripts/cuda_stubs.py "$venv"
    fi
    CUDA_VISIBLE_DEVICES='' LD_LIBRARY_PATH="$venv/cuda-stubs" PYTHONPATH="$ROOT" \
        "$venv/bin/python" scripts/version_check.py
}

if [ $# -eq 0 ]; then set -- 2.7.1 2.9.1 2.14.1; fi
STAGES=$#
for version in "$@"; do stage "torch $version" with_torch "$version"; done
finish scripts/versions.sh
