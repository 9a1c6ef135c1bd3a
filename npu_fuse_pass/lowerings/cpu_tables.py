"""What a CPU kernel is called with: its arguments, and which of a step's values are in each slot."""

from __future__ import annotations

import array
import ctypes
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..ir import Group, Leaf

Values = list[Tensor | None]


class Args(ctypes.Structure):
    """Mirrors `struct Args` of the generated source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("members", "chunks", "threads", "grain", "elements")),
        *(
            (name, ctypes.c_void_p)
            for name in [
                "numel",
                "active",
                "tensors",
                "scalars",
                "tags",
                "chunk_member",
                "chunk_start",
                "first_chunk",
                "scratch",
                "partial",
                "contributions",
            ]
        ),
    ]


class Column:
    """One slot over all members: where in a call's values its tensors are."""

    def __init__(self, rank: int, slot: int, group: Group, leaves: Sequence[Leaf]) -> None:
        self.rank = rank
        self.slot = slot
        self.indices = [m[slot] for m in group.members]
        self.fixed = all(leaves[i].fixed for i in self.indices)
        self.written = slot in group.formula.written
        self.dtype = group.formula.slots[slot].dtype
        self._bytes: array.array[int] | None = None
        self._get = _getter(self.indices)

    def bytes_of(self, numels: list[int], active: array.array[int], all_active: bool) -> array.array[int]:
        """Bytes of every member's tensor; 0 where it does not take part."""
        if self._bytes is None:
            self._bytes = array.array("q", [n * self.dtype.itemsize for n in numels])
        if all_active:
            return self._bytes
        return array.array("q", [n if a else 0 for n, a in zip(self._bytes, active, strict=True)])

    def of(self, values: Values) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._get(values)
        return found


def _getter(indices: Sequence[int]) -> Callable[[Values], Any]:
    """Takes these positions out of a list; adjacent ones, as those of our optimizers are, as a slice."""
    begin, end = indices[0], indices[-1] + 1
    adjacent = list(indices) == list(range(begin, end))
    return operator.itemgetter(slice(begin, end)) if adjacent else operator.itemgetter(*indices)
