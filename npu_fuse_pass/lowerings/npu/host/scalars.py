"""0-dim tensors of all members as one vector: step counters, mostly."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from npu_fuse_pass.ir.types import LeafValues
from npu_fuse_pass.tensors.memory import materialised
from npu_fuse_pass.tensors.same import SameTensors


class ScalarVector:
    """0-dim leaves that may be contiguous in memory, as the counters of this package's optimizers are."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._get = picked(indices)
        self._same = SameTensors()

    def of(self, values: LeafValues) -> Tensor | None:
        """One vector over their memory; None if they are not contiguous or differ in dtype."""
        tensors = self._get(values)
        if not self._same.match(tensors):
            if not all(
                t is not None and t.ndim == 0 and t.dtype == tensors[0].dtype and materialised(t) for t in tensors
            ):
                return None
            self._same.learn(tensors)
        first, size = tensors[0], tensors[0].element_size()
        start = first.data_ptr()
        if list(map(Tensor.data_ptr, tensors)) != list(range(start, start + size * len(tensors), size)):
            return None
        return first.detach().as_strided((len(tensors),), (1,)) if holds(first, len(tensors)) else None


def holds(first: Tensor, elements: int) -> bool:
    """True if the storage has that many elements from the start of a tensor."""
    return (first.storage_offset() + elements) * first.element_size() <= first.untyped_storage().nbytes()


def picked(indices: Sequence[int]) -> Callable[[LeafValues], Sequence[Any]]:
    """A function that picks the values of these leaves from those of all."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda values: [values[i] for i in indices]
