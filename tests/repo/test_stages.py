"""The last lines of a run of tests: where its time went."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from tests.support.stages import STAGES, Clock, Totals

BUSY = "sum(range(3 * 10**6))"


def test_what_processes_take_is_told_apart() -> None:
    """This one's, a compiler's, any other's."""
    clock = Clock()

    def start(*given: object) -> pathlib.Path:
        subprocess.run([sys.executable, "-c", BUSY], check=True)
        return pathlib.Path()

    clock.read()
    clock.compiling(start)("source")
    _, compilers, others = clock.read()
    assert compilers > 0 and others < 1e-6
    start()
    _, compilers, others = clock.read()
    assert others > 0 and compilers == 0
    eval(BUSY)
    assert clock.read()[0] > 0


def test_totals_are_by_stage_and_file() -> None:
    totals = Totals()
    assert totals.lines() == []
    totals.add("tests/a.py::one", [1.0, 0.0, 2.0])
    totals.add("tests/a.py::one", [0.5, 0.0, 0.0])
    totals.add("tests/b.py::two[x]", [1.0, 7.0, 0.0])
    assert totals.lines() == [
        f"    2.5  {STAGES[0]}",
        f"    7.0  {STAGES[1]}",
        f"    2.0  {STAGES[2]}",
        "   11.5  together, of which",
        "    8.0  tests/b.py, 1 tests",
        "    3.5  tests/a.py, 1 tests",
    ]
