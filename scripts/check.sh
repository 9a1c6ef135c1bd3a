#!/usr/bin/env bash
# Style, format and types. Uses the environment that scripts/test.sh makes, and makes it if it is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

STAGES=4
stage "environment (.venv)" environment test
stage "ruff check" "$PY" -m ruff check .
stage "ruff format" "$PY" -m ruff format --check .
stage "mypy --strict" "$PY" -m mypy
finish scripts/check.sh
