"""Which cases of a costly product run at every commit; the slow tier runs all of them.

A test with several axes has the mark `costly` where its whole product takes several seconds; the products of all other
tests are whole. A fault depends on one choice, or on two that meet: more than two hardly ever. So of three axes or more
every pair of values is met (an optimizer with a dtype, the dtype with a road, the road with the optimizer), and of two
axes every value, the test itself being the other choice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Iterable, Sequence
from typing import Any


def covering(rows: Sequence[Sequence[Hashable]], seed: str) -> list[int]:
    """Numbers of rows that have all pairs of values in different columns that the rows have; of two columns all values.

    Args:
        seed: another one chooses other rows, the same one the same rows.
    """
    width = 2 if len(rows[0]) > 2 else 1
    met = [set(itertools.combinations(enumerate(row), width)) for row in rows]
    left, order, chosen = set().union(*met), list(range(len(rows))), []
    random.Random(seed).shuffle(order)
    while left:
        best = max(order, key=lambda i: len(met[i] & left))
        left -= met[best]
        chosen.append(best)
    return sorted(chosen)


def left_to_the_slow_tier(items: Iterable[Any]) -> set[str]:
    """Ids of collected tests: cases of costly products that need not run at every commit."""
    tests: dict[str, list[tuple[str, tuple[Hashable, ...]]]] = {}
    for item in items:
        if item.get_closest_marker("costly"):
            axes = tuple(_value(item, mark) for mark in item.iter_markers("parametrize"))
            tests.setdefault(item.nodeid.partition("[")[0], []).append((item.nodeid, axes))
    left = set()
    for name, cases in tests.items():
        kept = set(covering([axes for _, axes in cases], name))
        left |= {case for i, (case, _) in enumerate(cases) if i not in kept}
    return left


def _value(item: Any, mark: Any) -> Hashable:
    """An item's value on the axis of a mark: the very objects, as values need not be equal to themselves."""
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    names = names.replace(",", " ").split() if isinstance(names, str) else names
    return tuple(id(item.callspec.params[name]) for name in names)
