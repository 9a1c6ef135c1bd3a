#!/usr/bin/env bash
# Every check and test of the project, on a fresh machine with Python, git and gcc: makes the environments that are
# missing, then runs style and types, the tests, the page of a dump in a browser (as root on Debian it installs
# Chromium; elsewhere it has to be there), the NPU lane, the lane of generated NPU kernels, 30 public optimizers, and
# the README from the built wheel. Arguments go to pytest, for example: bash scripts/test.sh -k lamb
# --slow runs the slow tier, too: all planted bugs, all cases of torch's database of optimizers and of other large tables
# instead of every sixth, more random programs, all CPU kernels with the flags that users have (base tests: tests of numbers and operations alone), the lanes'
# slow tests, and the training libraries (scripts/stacks.sh). It has no time limit.
# Environment: PYTHON (which interpreter makes .venv), TEST_WORKERS (pytest processes; default: cores, at most 4).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

slow=()
given=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then
        slow=(--slow)
        export NPU_FUSE_FULL=1
    else
        given+=("$argument")
    fi
done

cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
workers="${TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
# Several processes share the cores: OpenMP's threads must not spin while they wait (up to 40 times slower otherwise).
export OMP_WAIT_POLICY=PASSIVE

STAGES=$((8 + ${#slow[@]}))
stage "environment (.venv)" environment test
if [ "$FAILED" -ne 0 ]; then finish scripts/test.sh; fi
stage "style and types" bash scripts/check.sh
# worksteal: neighbours run in one process, which makes what a file's tests share, and their kernels, once
stage "tests ($workers at a time)" \
    "$PY" -m pytest -n "$workers" --dist worksteal -m "not npu and not browser" --durations=10 "${given[@]}"
lacking="$(no_browser)"
if [ -z "$lacking" ]; then
    stage "the page of a dump in Chromium" env NPU_FUSE_BROWSER=1 "$PY" -m pytest -m browser tests/unit/dump/test_page_browser.py
else
    not_run "the page of a dump in Chromium" "$lacking"
fi
if [ -f scripts/npu_lane.sh ]; then
    stage "NPU lane (.venv-npu)" bash scripts/npu_lane.sh
else
    not_run "NPU lane (.venv-npu)" "there is no scripts/npu_lane.sh"
fi
stage "NPU kernels lane (.venv-npu-kernels)" bash scripts/npu_kernels_lane.sh "${slow[@]}"
stage "30 public optimizers (.venv-zoo)" bash scripts/zoo.sh --sample
if [ "${#slow[@]}" -gt 0 ]; then
    stage "training libraries (.venv-stacks)" bash scripts/stacks.sh
fi
stage "built wheel and README, empty environment" bash scripts/wheel_test.sh
finish scripts/test.sh
