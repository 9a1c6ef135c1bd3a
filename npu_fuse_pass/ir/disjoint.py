"""Disjoint sets of numbers (union-find): which leaves belong together."""

from __future__ import annotations


class Disjoint:
    """Numbers start in sets of their own."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def find(self, x: int) -> int:
        """The number that stands for the set of `x`."""
        parent = self._parent
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def join(self, x: int, y: int) -> None:
        """Make the sets of `x` and `y` one; what stood for that of `y` stands for both."""
        self._parent[self.find(x)] = self.find(y)
