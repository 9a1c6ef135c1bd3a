"""What a CPU kernel is called with: its arguments, and which of a step's values are in each slot."""

from __future__ import annotations

import array
import ctypes
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from npu_fuse_pass.ir.types import Formula, Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.cpu.codegen import CHUNK

_SERIAL = 32768  # elements below which waking other threads costs more than it saves
_FEW, _MANY = 32768, 131072  # elements that a thread takes at once: long stretches are faster, short ones fairer
_TURNS = 16  # that every thread should have, so that one which is interrupted leaves work to the others


class Args(ctypes.Structure):
    """Mirrors `struct Args` in kernel.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("members", "chunks", "tasks", "threads", "grain", "elements")),
        *((name, ctypes.c_void_p) for name in ("numel", "active", "tensors", "scalars", "tags")),
        *((name, ctypes.c_void_p) for name in ("chunk_member", "chunk_start", "first_chunk")),
        *((name, ctypes.c_void_p) for name in ("scratch", "partial", "contributions", "done", "whole", "task")),
    ]


class Tables:
    """The memory of a kernel beside its tensors; what a call finds and changes are attributes.

    Attributes:
        tensors, scalars: addresses, [slot][member]; tags: the scalars' dtypes.
        active: per member, 1 if it takes part.
        contributions: what the kernel adds to totals, [contribution][member].
        scratch: its numbers between sections, [member][number].
        done: whether it is through with contributing and with updating; it sets them itself.
        args: all of it, as the kernel gets it, at `pointer`.
    """

    def __init__(
        self,
        formula: Formula,
        numels: Sequence[int],
        scratch: int,
        partial: int,
        wholes: Sequence[int] = (),
        tasks: Sequence[int] = (),
    ) -> None:
        n = len(numels)
        self.tensors = array.array("q", [0]) * max(1, n * len(formula.tensor_slots))
        self.scalars = array.array("q", [0]) * max(1, n * len(formula.scalar_slots))
        self.tags = array.array("B", [0]) * max(1, n * len(formula.scalar_slots))
        self.active = array.array("B", [1]) * n
        self.contributions = array.array("d", [0.0]) * max(1, n * len(formula.contributions))
        self.done = array.array("B", [0, 0])
        member, start, first = array.array("i"), array.array("q"), array.array("q", [0])
        for m, numel in enumerate(numels):
            if formula.tensor_slots:
                starts = range(0, numel, CHUNK)
                member.extend([m] * len(starts))
                start.extend(starts)
            first.append(len(start))
        chunks, elements = len(start), sum(numels)
        self.scratch = array.array("d", [0.0]) * (n * scratch)
        self._arrays: dict[str, array.array[Any]] = {
            "numel": array.array("q", numels),
            "active": self.active,
            "tensors": self.tensors,
            "scalars": self.scalars,
            "tags": self.tags,
            "chunk_member": member,
            "chunk_start": start,
            "first_chunk": first,
            "scratch": self.scratch,
            "partial": array.array("d", [0.0]) * max(1, chunks * partial),
            "contributions": self.contributions,
            "done": self.done,
            "whole": array.array("q", wholes or numels),
            "task": array.array("q", tasks or [0]),
        }
        pointers = {name: a.buffer_info()[0] for name, a in self._arrays.items()}
        self.args = Args(members=n, chunks=chunks, elements=elements, tasks=len(tasks) // 5, **pointers)
        self.pointer = ctypes.byref(self.args)

    def share(self, threads: int) -> None:
        """Set how many threads share the next call, and how many chunks each takes at once."""
        elements, chunks = self.args.elements, max(1, self.args.chunks)
        self.args.threads = threads if elements > _SERIAL else 1
        at_once = min(max(elements // (_TURNS * threads), _FEW), _MANY)
        self.args.grain = max(1, at_once * chunks // max(1, elements))


class Column:
    """One slot over all members: where in a call's values its tensors are, and where their addresses: `table[part]`."""

    def __init__(self, table: array.array[int], rank: int, slot: int, group: Group, leaves: Sequence[Leaf]) -> None:
        self.table = table
        self.part = slice(rank * len(group.members), (rank + 1) * len(group.members))
        self.slot = slot
        self.indices = [m[slot] for m in group.members]
        self.fixed = all(leaves[i].fixed for i in self.indices)
        self.written = slot in group.formula.written
        self.numels = [math.prod(leaves[i].shape) for i in self.indices]
        self.dtype = group.formula.slots[slot].dtype
        self._bytes: array.array[int] | None = None
        self.of: Callable[[LeafValues], Sequence[Tensor]] = _getter(self.indices)

    def bytes_of(self, active: array.array[int], all_active: bool) -> array.array[int]:
        """Bytes of every member's tensor; 0 where it does not take part."""
        if self._bytes is None:
            self._bytes = array.array("q", [n * self.dtype.itemsize for n in self.numels])
        if all_active:
            return self._bytes
        return array.array("q", [n if a else 0 for n, a in zip(self._bytes, active, strict=True)])


class Moving:
    """The leaves of columns whose tensors may be others at every call, each once.

    Members that share a number (lr) have one tensor for it, and a list with a tensor in it twice is like no other to
    `SameTensors`.

    Attributes:
        written: for each leaf, 1 if it is written, else 0.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        leaves = list(dict.fromkeys(i for column in columns for i in column.indices))
        place = {leaf: k for k, leaf in enumerate(leaves)}
        written = {i for column in columns if column.written for i in column.indices}
        self.written = array.array("B", [i in written for i in leaves])
        self._columns = [(column, _getter([place[i] for i in column.indices])) for column in columns]
        self._get = _getter(leaves) if leaves else lambda values: []

    def of(self, values: LeafValues) -> list[Any]:
        """Their tensors at this call."""
        return list(self._get(values))

    def by_column(self, addresses: array.array[int]) -> Iterator[tuple[Column, array.array[int]]]:
        """The columns, and for each the addresses of its members' tensors."""
        for column, get in self._columns:
            yield column, array.array("q", get(addresses))


def _getter(indices: Sequence[int]) -> Callable[[Any], Any]:
    """Takes these positions out of a list; adjacent ones, as those of our optimizers are, as a slice."""
    begin, end = indices[0], indices[-1] + 1
    adjacent = list(indices) == list(range(begin, end))
    return operator.itemgetter(slice(begin, end)) if adjacent else operator.itemgetter(*indices)
