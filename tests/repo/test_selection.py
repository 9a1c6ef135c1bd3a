"""Which cases of a product stand for all of it."""

from __future__ import annotations

import itertools

from tests.support.selection import covering

CUBE = list(itertools.product("abcdefg", (1, 2), ("x", "y", "z")))


def pairs(rows: list[tuple[object, ...]], left: int, right: int) -> set[tuple[object, object]]:
    return {(row[left], row[right]) for row in rows}


def test_every_pair_of_values_is_met() -> None:
    chosen = [CUBE[i] for i in covering(CUBE, "name")]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert pairs(chosen, left, right) == pairs(CUBE, left, right)
    assert 21 <= len(chosen) < 30  # 7 x 3, of 42


def test_combinations_that_a_test_leaves_out_are_not_asked_for() -> None:
    assert len(covering([row for row in CUBE if row[1:] != (2, "z")], "name")) < 30


def test_the_choice_is_the_tests() -> None:
    """The same at every run, and others in other tests: together they meet what one of them leaves out."""
    assert covering(CUBE, "one") == covering(CUBE, "one")
    assert set().union(*(covering(CUBE, str(i)) for i in range(20))) == set(range(42))
