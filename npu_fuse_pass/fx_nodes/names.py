"""The ATen-like name of what a node of a graph calls: Python's operators and methods have other names."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Operation: type[Any] = type(torch.ops.aten.add.Tensor)
"""The class of torch's operations, with an overload."""

_OPERATORS: dict[Callable[..., Any], str] = {
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
    operator.ipow: "pow_",
    operator.ifloordiv: "floor_divide_",
    operator.imod: "remainder_",
    operator.iand: "bitwise_and_",
    operator.ior: "bitwise_or_",
    operator.ixor: "bitwise_xor_",
    operator.ilshift: "bitwise_left_shift_",
    operator.irshift: "bitwise_right_shift_",
    operator.imatmul: "matmul_",
    operator.setitem: "setitem_",
    operator.truediv: "div",
    operator.floordiv: "floor_divide",
    operator.mod: "remainder",
    operator.and_: "bitwise_and",
    operator.or_: "bitwise_or",
    operator.xor: "bitwise_xor",
    operator.invert: "bitwise_not",
    operator.not_: "logical_not",
}

# methods that compute with their arguments the other way round -> the operator
REFLECTED: dict[str, Callable[..., Any]] = {
    "__radd__": operator.add,
    "__rsub__": operator.sub,
    "__rmul__": operator.mul,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
    "__rand__": operator.and_,
    "__ror__": operator.or_,
    "__rxor__": operator.xor,
    "__rlshift__": operator.lshift,
    "__rrshift__": operator.rshift,
}


def overload_name(operation: Any) -> str:
    """The name of one of torch's operations, without its namespace and overload."""
    return str(operation.name()).split("::")[1].partition(".")[0]


def operation_name(node: fx.Node) -> str:
    """The name of what a node calls; of a reflected method, with the arguments the other way round."""
    target: Any = node.target
    if isinstance(target, Operation):
        return overload_name(target)
    if isinstance(target, str):
        dunder: Any = getattr(operator, target, None) if target.startswith("__") else None
        target = REFLECTED.get(target) or dunder
        if target is None:
            return str(node.target)
    return _OPERATORS.get(target) or str(getattr(target, "__name__", target))


def in_order(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a node in the order of the function that its `operation_name` names."""
    if node.target in REFLECTED:
        return args[::-1]
    if node.target == "where" and len(args) > 1:
        return (args[1], args[0], *args[2:])  # x.where(condition, y) is torch.where(condition, x, y)
    return args
