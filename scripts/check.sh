#!/usr/bin/env bash
# Style, format, types, and what each room may import. Uses the environment that scripts/test.sh makes, and makes it if
# it is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

STAGES=5
stage "environment (.venv)" environment test
stage "ruff check" "$PY" -m ruff check .
stage "ruff format" "$PY" -m ruff format --check .
stage "mypy --strict" "$PY" -m mypy
stage "import contracts" .venv/bin/lint-imports --no-cache
finish scripts/check.sh
