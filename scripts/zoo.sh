#!/usr/bin/env bash
# Optimizers that nobody here wrote, compiled as their users construct them (docs/zoo.md): makes .venv-zoo, which has the
# libraries and sees .venv's torch, and runs scripts/zoo.py in it; arguments go there. All classes take about an hour on
# two cores. --sample: 30 of them, with fewer libraries, which have to show what scripts/zoo_classes.py says.
# Environment: PYTHON (which interpreter makes .venv), TEST_WORKERS (classes at a time; default: one, the sample's: cores,
# at most 4).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

VENV="$ROOT/.venv-zoo"
needs=zoo
workers="${TEST_WORKERS:-1}"
for argument in "$@"; do
    if [ "$argument" = --sample ]; then
        needs=zoo_sample
        cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
        workers="${TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
    fi
done

# zoo_environment NAME: .venv-zoo with requirements/NAME.txt; all of zoo.txt serves the sample, too.
zoo_environment() {
    local all one found stamp="$VENV/.installed"
    all="zoo $(fingerprint requirements/base.txt requirements/zoo_sample.txt requirements/zoo.txt)"
    one="zoo_sample $(fingerprint requirements/base.txt requirements/zoo_sample.txt)"
    found="$(cat "$stamp" 2>/dev/null || true)"
    if [ "$found" = "$all" ] || [ "$1 $found" = "zoo_sample $one" ]; then
        echo ".venv-zoo has requirements/$1.txt already"
        return
    fi
    libraries "$1"
    if [ "$1" = zoo ]; then echo "$all"; else echo "$one"; fi >"$stamp"
}

zoo() {
    PYTHONPATH="$ROOT" OMP_WAIT_POLICY=PASSIVE "$VENV/bin/python" -W ignore scripts/zoo.py --jobs "$workers" "$@"
}

STAGES=3
stage "environment (.venv)" environment test
if [ "$FAILED" -ne 0 ]; then finish scripts/zoo.sh; fi
stage "environment (.venv-zoo)" zoo_environment "$needs"
if [ "$FAILED" -ne 0 ]; then finish scripts/zoo.sh; fi
stage "optimizers" zoo "$@"
finish scripts/zoo.sh
