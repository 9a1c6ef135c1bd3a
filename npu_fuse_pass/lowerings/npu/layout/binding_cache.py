"""Binding of steps that resemble an earlier one, without checks of every tensor in Python.

Most steps differ from the one before only in values and in the addresses of gradients. Checks of one step hold for all
whose tensors are of the same kind: type, dtype, device, sizes, strides, and values held in memory. Addresses are read
at every step, and no view of a tensor is kept: Dynamo keeps a compiled step for longer than its optimizer lives, and
must not keep its memory.
"""

from __future__ import annotations

import array
import operator
from collections.abc import Collection, Mapping, Sequence
from itertools import compress, repeat

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch
from npu_fuse_pass.ir.types import LeafValues
from npu_fuse_pass.lowerings.npu.host.scalars import picked
from npu_fuse_pass.lowerings.npu.host.step import HostStep, Key, Leaves
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.memory import NOWHERE, SHARED, apart
from npu_fuse_pass.tensors.same import SameTensors


class BindingCache:
    """A cache of one step that was bound tensor by tensor; binds steps like it.

    Args:
        inputs: the leaves behind every tensor input of the graph; size, dtype and device.
        written: those that the graph writes to.
        numbers: leaves of the 0-dim tensors that the host reads for the graph; True for those it writes.
    """

    def __init__(self, inputs: Mapping[Leaves, Key], written: Collection[Leaves], numbers: Mapping[int, bool]) -> None:
        self._inputs = inputs
        self._numbers = numbers
        self._all = picked([i for key in inputs for i in key])
        self._written = written
        self._same = SameTensors()
        self._active: list[list[bool]] | None = None
        self._complete = False
        self._present: list[bool] = []
        self._placeholders: list[Tensor | None] = []
        self._orders: dict[int, tuple[bool, tuple[int, ...]]] = {}
        self._addresses: list[int] = []

    def learn(self, step: HostStep, values: LeafValues) -> None:
        """Cache a bound step. Its tensors must have been checked, also for shared memory."""
        tensors = self._all(values)
        # a step that copies elements into another order is not cached
        if step.copies or not self._same.learn([t for t in tensors if t is not None]):
            return
        self._active, self._complete, self._orders = step.active, step.complete, step.orders
        self._present = [t is not None for t in tensors]
        used = [(key, *self._inputs[key]) for key in self._inputs if key in step.used]
        self._placeholders = [None if key in step.used else step.flat[key] for key in self._inputs]
        numbers = [i for i in self._numbers if values[i] is not None]
        self._firsts = picked([*(key[0] for key, *_ in used), *numbers])
        self._sizes = [(size,) for _, size, _, _ in used]
        itemsizes = [*(dtype.itemsize for _, _, dtype, _ in used), *(1 for _ in numbers)]
        self._itemsizes = torch.tensor(itemsizes, dtype=torch.int64, device="cpu")
        # for numbers the start is enough
        self._bytes = self._itemsizes * torch.tensor(
            [*(size for _, size, _, _ in used), *(1 for _ in numbers)], dtype=torch.int64, device="cpu"
        )
        is_written = [*(key in self._written for key, *_ in used), *(self._numbers[i] for i in numbers)]
        self._is_written = torch.tensor(is_written, dtype=torch.bool, device="cpu")
        self._addresses = _addresses(self._firsts(values))

    def bind(self, step: HostStep, values: LeafValues) -> bool:
        """Set a step's tensor inputs if it is like the cached one. Returns True if so.

        Raises:
            Mismatch: two tensors share memory and at least one of them is written.
        """
        if step.active != self._active or (step.complete and not self._complete):
            return False
        tensors = self._all(values)
        present = list(map(operator.is_not, tensors, repeat(None)))
        if present != self._present or not self._same.match(list(compress(tensors, present))):
            return False
        firsts = self._firsts(values)
        if not self._lie_as_known(_addresses(firsts)):
            return False
        views = map(Tensor.as_strided, firsts, self._sizes, repeat((1,)))
        step.inputs = [next(views) if t is None else t for t in self._placeholders]
        step.orders = self._orders
        return True

    def _lie_as_known(self, addresses: list[int]) -> bool:
        """True if tensors lie apart, at multiples of an element's size."""
        if addresses == self._addresses:
            return True
        starts = torch.frombuffer(array.array("q", addresses), dtype=torch.int64)
        if ((starts == 0) & (self._bytes > 0)).any():
            raise Mismatch(NOWHERE, Code.NO_MEMORY)
        if not apart(starts, self._bytes, self._is_written):
            raise Mismatch(SHARED, Code.SHARED_MEMORY)
        if (starts % self._itemsizes).any():
            return False
        self._addresses = addresses
        return True


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
