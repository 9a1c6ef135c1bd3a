"""A mirror of 0-dim tensors on a device, so that a step need not wait to read them.

Reading waits until the device is idle. But a step computes the new values of such a tensor on the host, and so knows
them. A value is read once, and again after a write by something else.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.types import Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.host.scalars import picked

Kind = tuple[torch.dtype, torch.device]


class Mirror:
    """The values of 0-dim leaves that lie on a device, in the host's memory.

    A tensor counts as written if it is another object than before, has another `_version`, or another address; then
    all are read. torch counts every operation on the tensor itself, on `t.detach()` and on its other
    views. It does not count writes to `t.data`, collectives and kernels on raw memory: code that uses those on a step
    counter has to call `torch.autograd.graph.increment_version(t)`, as for autograd.

    Attributes:
        places: the index in `values` of every leaf.
        values: of all leaves, float64, after `update`.
    """

    def __init__(self, indices: Sequence[int], leaves: Sequence[Leaf]) -> None:
        self.places = {i: place for place, i in enumerate(indices)}
        self.values = torch.zeros(len(indices), dtype=torch.float64, device="cpu")
        self._tensors = picked(indices)
        self._of_kind: dict[Kind, list[int]] = {}
        for i, place in self.places.items():
            self._of_kind.setdefault((leaves[i].dtype, leaves[i].device), []).append(place)
        self._references: list[weakref.ref[Tensor]] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []

    def update(self, values: LeafValues) -> None:
        """Update `values`: one transfer per dtype if one of the tensors was written elsewhere, else none."""
        tensors = self._tensors(values)
        if self._known(tensors):
            return
        self._references = []  # nothing is known, if reading fails
        counted = all(map(_counts_writes, tensors))
        versions = list(map(_version, tensors)) if counted else []  # before they are read: nothing is missed then
        for places in self._of_kind.values():
            given = {p: t for p in places if (t := tensors[p]) is not None}
            if given:
                index = torch.tensor(list(given), dtype=torch.int64, device="cpu")
                self._set(index, from_device(list(given.values())))
        if counted:
            self._references = list(map(weakref.ref, tensors))  # not the tensors: a step outlives its optimizer
            self._versions, self._addresses = versions, list(map(Tensor.data_ptr, tensors))

    def wrote(self, values: LeafValues, places: Sequence[int], new: Tensor) -> None:
        """Record that a step has written `new` to these places."""
        self._set(torch.tensor(places, dtype=torch.int64, device="cpu"), new)
        if self._references:
            tensors = self._tensors(values)
            for p in places:
                self._versions[p] = _version(tensors[p])

    def _set(self, places: Tensor, new: Tensor) -> None:
        # not in place: a tensor that was made in inference mode could not be written outside of it
        self.values = self.values.index_copy(0, places, new.double())

    def _known(self, tensors: Sequence[Tensor]) -> bool:
        return (
            len(self._references) == len(tensors)
            and all(kept() is t for kept, t in zip(self._references, tensors, strict=True))
            and self._versions == list(map(_version, tensors))
            and self._addresses == list(map(Tensor.data_ptr, tensors))
        )


_version = operator.attrgetter("_version")


def _counts_writes(t: Tensor | None) -> bool:
    """True if a tensor's `_version` counts its writes.

    0-dim parameters are left out: `p.data.clamp_(...)` between steps is how many models keep theirs in bounds. Their
    gradients are new in every step, so nothing is lost.
    """
    if t is None or t.requires_grad or t.is_inference() or isinstance(t, torch.nn.Parameter):
        return False  # an inference tensor has no `_version`
    return hasattr(t, "_version")


def from_device(tensors: Sequence[Tensor]) -> Tensor:
    """0-dim tensors of one dtype as a vector on the host. The only place of a step that waits for a device."""
    return torch.stack(list(tensors)).cpu()


def to_device(vector: Tensor, device: torch.device) -> Tensor:
    """A vector on a device, without waiting: pinned memory is copied while the host goes on."""
    return vector.pin_memory().to(device, non_blocking=True)
