"""Disjoint sets of numbers (union-find): which leaves belong together."""

from __future__ import annotations


class Disjoint:
    """Sets of numbers; each starts with one."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def find(self, x: int) -> int:
        """The representative of the set of `x`."""
        parent = self._parent
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def join(self, x: int, y: int) -> None:
        """Join the sets of `x` and `y`; the representative of `y` is that of both."""
        self._parent[self.find(x)] = self.find(y)
