"""Which cases of a product stand for all of it."""

from __future__ import annotations

import itertools

from tests.support.selection import covering

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
