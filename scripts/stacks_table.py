"""Runs tests/stacks and makes the table of training libraries in docs/compatibility.md from what has passed.

python scripts/stacks_table.py            # runs all; fails if a test does, or if the page has another table
python scripts/stacks_table.py --write    # puts the table into the page, where all have passed
python scripts/stacks_table.py -k peft    # other arguments go to pytest: only prints the rows of what ran

A row is a `stack` mark of tests: its name, which packages, what a user writes, what runs. It needs the environment of
scripts/stacks.sh, which calls it.
"""

from __future__ import annotations

import collections
import importlib.metadata
import pathlib
import sys
from collections.abc import Mapping, Sequence

import pytest

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- training libraries: scripts/stacks_table.py -->", "<!-- end of the training libraries -->"
Stack = tuple[str, tuple[str, ...], str, str]


class Outcomes:
    """A plugin of pytest: the outcomes of the tests of each stack."""

    def __init__(self) -> None:
        self.stacks: dict[str, Stack] = {}
        self.counts: dict[Stack, collections.Counter[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark = item.get_closest_marker("stack")
            if mark is not None:
                self.stacks[item.nodeid] = mark.args

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.stacks and (report.when == "call" or report.outcome != "passed"):
            self.counts.setdefault(self.stacks[report.nodeid], collections.Counter())[report.outcome] += 1


def table(counts: Mapping[Stack, Mapping[str, int]]) -> str:
    """The table as Markdown, by the names of the stacks."""
    lines = ["| stack | version | what to write | what ran |", "| --- | --- | --- | --- |"]
    for stack in sorted(counts, key=lambda stack: stack[0].lower()):
        name, packages, write, ran = stack
        versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts[stack].items()))
        lines.append(f"| {name} | {versions} | {write} | {ran}: {outcomes} |")
    return "\n".join(lines)


def put(page: str, made: str) -> str:
    """The page with another table between its markers."""
    before, begun, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise SystemExit(f"{PAGE.name} has no lines {BEGIN!r} and {END!r}: put them where the table belongs")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    given = [argument for argument in arguments if argument != "--write"]
    outcomes = Outcomes()
    status = int(pytest.main(["tests/stacks", "--durations=5", *given], plugins=[outcomes]))
    made = table(outcomes.counts)
    print(made)
    if status or given:
        return status
    old = PAGE.read_text(encoding="utf-8")
    new = put(old, made)
    if "--write" in arguments:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{PAGE.name} has another table; put this one there with: bash scripts/stacks.sh --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
