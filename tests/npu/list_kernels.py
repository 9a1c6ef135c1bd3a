"""GE's Foreach operations for `kernels`: foreach/<operation>/README.md and _proto.h in https://gitcode.com/cann/ops-nn.

Lists have at most 50 tensors, which have one dtype and in all lists the same shapes; a number is a tensor with one
element, numbers are one tensor with an element for each. On Atlas A2 a number of a float32 list is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from training_kernels import one_dtype

if TYPE_CHECKING:
    from interpreter import Node

LONGEST = 50


def on_lists(function: Callable[..., Tensor], lists: str, number: str = "") -> Callable[[Node], Sequence[Tensor]]:
    """`lists` and `number` are the names of the inputs; "scalars" is one number for each tensor."""
    names = lists.split()

    def kernel(node: Node) -> list[Tensor]:
        given = node.tensors()
        one_dtype(given)
        tensors = given[:-1] if number else given
        length = len(tensors) // len(names)
        if not 0 < length <= LONGEST:
            raise ValueError(f"a list of {length} tensors; at most {LONGEST} are allowed")
        wanted = [f"{name}{i}" for name in names for i in range(length)] + ([number] if number else [])
        if [desc.name for desc in node.op.input_desc] != wanted:
            raise ValueError(f"the inputs are {[desc.name for desc in node.op.input_desc]}")
        rows = [tensors[m::length] for m in range(length)]
        if any(t.shape != row[0].shape for row in rows for t in row):
            raise ValueError("the lists have other shapes")
        if not number:
            return [function(*row) for row in rows]
        if given[-1].shape != ((length,) if number == "scalars" else (1,)):
            raise ValueError(f"{number} of shape {tuple(given[-1].shape)} for {length} tensors")
        return [function(*row, x) for row, x in zip(rows, given[-1].expand(length), strict=True)]

    return kernel


_BINARY: dict[str, Callable[..., Tensor]] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}

KERNELS: dict[str, Callable[[Node], Sequence[Tensor]]] = {
    **{f"Foreach{name}Scalar": on_lists(function, "x", "scalar") for name, function in _BINARY.items()},
    "ForeachAddList": on_lists(lambda x1, x2, alpha: x1 + x2 * alpha, "x1 x2", "alpha"),
    "ForeachSubList": on_lists(lambda x1, x2, alpha: x1 - x2 * alpha, "x1 x2", "alpha"),
    "ForeachMulList": on_lists(torch.mul, "x1 x2"),
    "ForeachDivList": on_lists(torch.div, "x1 x2"),
    "ForeachMaximumList": on_lists(torch.maximum, "x1 x2"),
    "ForeachMinimumList": on_lists(torch.minimum, "x1 x2"),
    "ForeachAddcmulScalar": on_lists(lambda x1, x2, x3, scalar: x1 + scalar * x2 * x3, "x1 x2 x3", "scalar"),
    "ForeachLerpScalar": on_lists(lambda x1, x2, weight: x1 + weight * (x2 - x1), "x1 x2", "weight"),
    "ForeachSqrt": on_lists(torch.sqrt, "x"),
    "ForeachNeg": on_lists(torch.neg, "x"),
    "ForeachAbs": on_lists(torch.abs, "x"),
    "ForeachReciprocal": on_lists(torch.reciprocal, "x"),
}
