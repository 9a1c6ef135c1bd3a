"""The table of training libraries in docs/compatibility.md, which scripts/stacks.sh makes."""

from __future__ import annotations

import pathlib

import pytest

from scripts import stacks_table

ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = ["accelerate", "deepspeed", "lightning", "peft", "pytorch-ignite", "transformers"]


def test_what_ran_is_a_row() -> None:
    outcomes = stacks_table.Outcomes()
    stack = ("Name", ("pytest",), "`write`", "what")
    outcomes.stacks = {"a": stack, "b": stack, "c": stack}
    for test, when, outcome in [("a", "setup", "passed"), ("a", "call", "passed"), ("b", "call", "passed")]:
        outcomes.pytest_runtest_logreport(report(test, when, outcome))
    outcomes.pytest_runtest_logreport(report("c", "setup", "failed"))
    outcomes.pytest_runtest_logreport(report("of another module", "call", "passed"))
    *_, row = stacks_table.table(outcomes.counts).splitlines()
    assert row == f"| Name | pytest {pytest.__version__} | `write` | what: 1 failed, 2 passed |"


def report(test: str, when: str, outcome: str) -> pytest.TestReport:
    return pytest.TestReport(test, (test, 0, test), {}, outcome, None, when)  # type: ignore[arg-type]


def test_only_what_is_between_the_markers_changes() -> None:
    page = f"before\n{stacks_table.BEGIN}\n| old |\n{stacks_table.END}\nafter\n"
    assert stacks_table.put(page, "| new |") == page.replace("old", "new")
    with pytest.raises(SystemExit, match=r"compatibility\.md has no lines"):
        stacks_table.put("before\n", "| new |")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_page_has_the_versions_that_are_installed(library: str) -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "requirements/stacks.txt").read_text().splitlines() if "==" in line
    )
    table = stacks_table.PAGE.read_text(encoding="utf-8").partition(stacks_table.BEGIN)[2]
    assert f"{library} {pins[library]}" in table.partition(stacks_table.END)[0]
