"""Checks that all tensors of a step are those of an earlier one, or of the kinds that they had then, in one call."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from npu_fuse_pass.private_torch import find

_tensor_guards = find("torch._C._dynamo.guards.TensorGuards")
_LEARNED_AT_MOST = 8  # tensors that keep changing are checked one by one instead of being learned again and again


class SameTensors:
    """Remembers dtype, device, sizes, strides and requires_grad of a list of tensors.

    Dynamo's own guard compares them in C++: about 0.1 us for each tensor, where Python takes 0.4 us.
    """

    def __init__(self) -> None:
        self._guards: Any = None
        self._learned = 0
        self.matched: int | None = None
        """Which of those learned the tensors asked about last were like, by number; None: not like the latest."""

    def match(self, tensors: Sequence[Tensor | None]) -> bool:
        """True if each of these is of the kind that was learned; False if one is None."""
        same = self._guards is not None and bool(self._guards.check(*tensors))
        self.matched = self._learned if same else None
        return same

    def learn(self, tensors: Sequence[Tensor]) -> bool:
        """Remember the kinds of these tensors, which the caller has checked.

        Returns:
            False after 8 lists that were learned, and where torch lacks the guard: nothing is remembered then.
        """
        if self._learned == _LEARNED_AT_MOST or _tensor_guards is None:
            return False
        self._learned += 1
        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        self._guards = _tensor_guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.matched = self._learned
        return True


def same_objects(some: Collection[object], others: Collection[object]) -> bool:
    """True if these are the same objects, in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def share_a_gradient(tensors: Iterable[Tensor]) -> bool:
    """True if two of these leaves have one gradient tensor, not two equal ones."""
    grads = [id(t.grad) for t in tensors if t.is_leaf and t.grad is not None]
    return len(set(grads)) < len(grads)
