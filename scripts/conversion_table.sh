#!/usr/bin/env bash
# Prints which optimizer steps become GE graphs, or with --time how long that takes, in the environment of the NPU lane
# (which bash scripts/npu_lane.sh makes). Arguments go to scripts/conversion_table.py, for example: 10 100 --only Adam
scripts="$(dirname "${BASH_SOURCE[0]}")"
exec bash "$scripts/npu_python.sh" "$scripts/conversion_table.py" "$@"
