"""Which cases of a product of several axes stand for all of it; the slow tier runs all of them.

A fault depends on one choice, or on two that meet: more than two hardly ever. So every pair of values is met (a change
with an order, the order with a road, the road with the change).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Sequence


def covering(rows: Sequence[Sequence[Hashable]], seed: str) -> list[int]:
    """Numbers of rows that have all pairs of values in different columns that the rows have.

    Args:
        seed: another one chooses other rows, the same one the same rows.
    """
    met = [set(itertools.combinations(enumerate(row), 2)) for row in rows]
    left, order, chosen = set().union(*met), list(range(len(rows))), []
    random.Random(seed).shuffle(order)
    while left:
        best = max(order, key=lambda i: len(met[i] & left))
        left -= met[best]
        chosen.append(best)
    return sorted(chosen)
