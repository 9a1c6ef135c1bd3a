"""docs/faults.md: every row names a fault, what is promised, and tests that exist."""

from __future__ import annotations

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROWS = [
    cells
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and len(cells := [c.strip() for c in line.strip("|").split("|")]) and cells[0] != "fault"
    if not set(line) <= set("|-")
]


@functools.cache
def names_in(file: str) -> set[str]:
    """The names of a file's tests; none where there is no such file."""
    path = ROOT / file
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60].replace(" ", "_"))
def test_a_row_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 3 and all(row), row
    named = [name.strip() for name in row[2].split(",")]
    for name in named:
        found = re.fullmatch(r"(tests/[\w/]+\.py)::(test_\w+)", name)
        assert found is not None and found[2] in names_in(found[1]), name


def test_there_are_rows() -> None:
    assert len(ROWS) > 30
    assert "test_nothing" not in names_in("tests/repo/test_faults_table.py")
    assert not names_in("tests/test_gone.py")
