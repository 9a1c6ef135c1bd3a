#!/usr/bin/env bash
# Cross-compiles generated kernels for aarch64 and runs compiled steps on them under an emulator, beside eager steps
# (scripts/aarch64_check.py). Slow, and no part of scripts/test.sh. Needs .venv (bash scripts/test.sh makes it), and
# apt-get install g++-aarch64-linux-gnu qemu-user, on x86-64.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

for program in aarch64-linux-gnu-g++ qemu-aarch64 "$PY"; do
    if ! command -v "$program" >/dev/null; then
        echo "there is no $program: see the first lines of $0" >&2
        exit 2
    fi
done
aarch64-linux-gnu-g++ --version | head -1
qemu-aarch64 --version | head -1
OMP_WAIT_POLICY=PASSIVE exec "$PY" scripts/aarch64_check.py
