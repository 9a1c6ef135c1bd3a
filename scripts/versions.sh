#!/usr/bin/env bash
# Does the package work with another torch? bash scripts/versions.sh [--npu] [VERSION...] (default: the oldest, one between,
# the newest that was tried). Each version gets an environment of its own (.venv-torch-VERSION-python3.X, about 2 GB, without
# nvidia's packages: scripts/cuda_stubs.py makes stand-ins for their libraries) and runs scripts/version_check.py.
# --npu adds the newest torch_npu for that torch, with stand-ins for CANN's libraries, and runs the NPU lane's tests
# (default: 2.7.1 and 2.9.1; torch_npu 2.10 and newer abort beside a CUDA build of torch).
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
    # where --npu has put torch_npu into it, torch would load that
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 CUDA_VISIBLE_DEVICES='' LD_LIBRARY_PATH="$venv/cuda-stubs" PYTHONPATH="$ROOT" \
        "$venv/bin/python" scripts/version_check.py
}

with_torch_npu() {
    local version="$1" venv="$ROOT/.venv-torch-$1-python$PYTHON_VERSION"
    # torch_npu's versions are torch's with ".postN"
    sed -e '/^-r /d' -e "s/^torch_npu==.*/torch_npu==$version.*/" requirements/npu.txt >"$venv/npu.txt"
    "$venv/bin/python" -m pip install --progress-bar off --quiet --no-deps -r "$venv/npu.txt"
    "$venv/bin/python" -m pip list --format freeze | grep '^torch'
    "$venv/bin/python" tests/npu/cann_stubs.py "$venv/cann-stubs"
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 CUDA_VISIBLE_DEVICES='' LD_LIBRARY_PATH="$venv/cann-stubs:$venv/cuda-stubs" \
        PYTHONPATH="$ROOT" "$venv/bin/python" -m pytest tests/npu
}

npu=""
if [ "${1:-}" = --npu ]; then npu=yes && shift; fi
if [ $# -eq 0 ]; then
    if [ -n "$npu" ]; then set -- 2.7.1 2.9.1; else set -- 2.7.1 2.9.1 2.14.1; fi
fi
STAGES=$#
if [ -n "$npu" ]; then STAGES=$((2 * $#)); fi
for version in "$@"; do
    stage "torch $version" with_torch "$version"
    if [ -n "$npu" ]; then stage "torch_npu for torch $version" with_torch_npu "$version"; fi
done
finish scripts/versions.sh
