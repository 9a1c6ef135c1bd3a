"""Which cases of a costly product run at every commit."""

from __future__ import annotations

import itertools
import os
import pathlib

from tests.support.forked import run_script
from tests.support.selection import covering

ROOT = pathlib.Path(__file__).parents[2]
PRODUCTS = """
import pytest

axes = [pytest.mark.parametrize("b", range(7)), pytest.mark.parametrize("a", range(2))]

def test_cheap(a, b): pass
def test_costly(a, b): pass

for mark in axes:
    test_cheap, test_costly = mark(test_cheap), mark(test_costly)
test_costly = pytest.mark.costly(test_costly)
"""
CUBE = list(itertools.product("abcdefg", (1, 2), ("x", "y", "z")))


def pairs(rows: list[tuple[object, ...]], left: int, right: int) -> set[tuple[object, object]]:
    return {(row[left], row[right]) for row in rows}


def test_of_three_axes_every_pair_of_values_is_met() -> None:
    chosen = [CUBE[i] for i in covering(CUBE, "name")]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert pairs(chosen, left, right) == pairs(CUBE, left, right)
    assert 21 <= len(chosen) < 30  # 7 x 3, of 42


def test_of_two_axes_every_value_is_met() -> None:
    square = list(itertools.product(range(7), range(2)))
    chosen = [square[i] for i in covering(square, "name")]
    assert sorted(i for i, _ in chosen) == list(range(7))
    assert {j for _, j in chosen} == {0, 1}


def test_combinations_that_a_test_leaves_out_are_not_asked_for() -> None:
    assert covering([("a", 1), ("a", 2), ("b", 1)], "name") in ([1, 2], [0, 1, 2])


def test_the_choice_is_the_tests() -> None:
    """The same at every run, and others in other tests: together they meet what one of them leaves out."""
    square = list(itertools.product(range(7), range(2)))
    assert covering(square, "one") == covering(square, "one")
    assert set().union(*(covering(square, str(i)) for i in range(20))) == set(range(14))


def test_a_costly_product_is_thinned_out_and_no_other(tmp_path: pathlib.Path) -> None:
    """Collected as at every commit, in the slow tier, and by the name of a case."""
    (tmp_path / "test_products.py").write_text(PRODUCTS)
    (tmp_path / "run.py").write_text("import sys, pytest; pytest.main(sys.argv[1:])")

    def collected(*arguments: str, **environment: str) -> list[str]:
        options = ("--collect-only", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "tests.conftest")
        options += ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path))
        usual = {**os.environ, "PYTHONPATH": str(ROOT), "NPU_FUSE_FULL": "", **environment}
        done = run_script(tmp_path / "run.py", *options, *arguments, cwd=tmp_path, environment=usual)
        return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]

    chosen = collected("test_products.py")
    assert sum("test_costly[" in name for name in chosen) == 7
    assert sum("test_cheap[" in name for name in chosen) == 14
    assert len(collected("test_products.py", NPU_FUSE_FULL="1")) == 28
    left = next(f"test_costly[{a}-{b}]" for a in range(2) for b in range(7) if f"test_costly[{a}-{b}]" not in chosen)
    assert collected(f"test_products.py::{left}") == [left]
