"""Where a run's time goes: processor seconds of tests by stage and by file, as lines for the end of the run.

Seconds of the processor do not depend on what else the machine does. Collecting tests is left out.
"""

from __future__ import annotations

import collections
import multiprocessing.forkserver
import os
import pathlib
from collections.abc import Callable
from typing import Any

STAGES = ("Python", "C++ compilers", "other processes")
_FILES = 10


class Clock:
    """Of one process that runs tests: what has been spent since it was read last."""

    def __init__(self) -> None:
        self._compilers = 0.0
        self._last = self._spent()

    def read(self) -> list[float]:
        """By stage, in the order of STAGES. Processes count when they have ended."""
        before, self._last = self._last, self._spent()
        return [now - then for now, then in zip(self._last, before, strict=True)]

    def compiling(self, compile_library: Callable[..., pathlib.Path]) -> Callable[..., pathlib.Path]:
        """The same function; what its processes take is the compilers'."""

        def counted(*given: Any) -> pathlib.Path:
            before = _children()
            try:
                return compile_library(*given)
            finally:
                self._compilers += _children() - before

        return counted

    def _spent(self) -> tuple[float, ...]:
        own = os.times()
        return own.user + own.system, self._compilers, _children() - self._compilers


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system + _forks()


def _forks() -> float:
    """Of the server whose forks run scripts (forked.py), and of those of its forks that have ended; Linux says it."""
    server = getattr(multiprocessing.forkserver, "_forkserver", None)
    try:
        stat = pathlib.Path(f"/proc/{getattr(server, '_forkserver_pid', None)}/stat").read_text()
    except OSError:
        return 0.0
    own_and_children = stat.rpartition(")")[2].split()[11:15]  # each in user and in system mode
    return sum(map(int, own_and_children)) / os.sysconf("SC_CLK_TCK")


class Totals:
    """Of a run, whatever process its tests ran in."""

    def __init__(self) -> None:
        self._stages = dict.fromkeys(STAGES, 0.0)
        self._files: collections.Counter[str] = collections.Counter()
        self._tests: dict[str, set[str]] = collections.defaultdict(set)

    def add(self, test: str, spent: list[float]) -> None:
        """What one phase of a test, given by its id, has spent by stage; nothing where that is not known."""
        file = test.partition("::")[0]
        self._tests[file].add(test)
        self._files[file] += sum(spent)
        for stage, seconds in zip(STAGES, spent, strict=False):
            self._stages[stage] += seconds

    def lines(self) -> list[str]:
        """The stages, and the files that take most."""
        stages = [f"{seconds:7.1f}  {stage}" for stage, seconds in self._stages.items()]
        files = [f"{s:7.1f}  {file}, {len(self._tests[file])} tests" for file, s in self._files.most_common(_FILES)]
        return [*stages, f"{sum(self._stages.values()):7.1f}  together, of which", *files] if self._files else []
