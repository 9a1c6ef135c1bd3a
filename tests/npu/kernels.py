"""The operations that `interpreter` knows: GE operation type -> what it computes.

Every elementwise operation broadcasts as numpy does and wants one dtype for all operands ("the same type as x1" in
each prototype).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import list_kernels
import shape_kernels
import torch
import training_kernels
from shape_kernels import axes_of
from torch import Tensor
from training_kernels import one_dtype

if TYPE_CHECKING:
    from interpreter import Node

Kernel = Callable[["Node"], Sequence[Tensor]]


def elementwise(function: Callable[..., Tensor], operands: int) -> Kernel:
    """An operation on equally typed operands; the result has their dtype."""

    def kernel(node: Node) -> list[Tensor]:
        tensors = node.tensors()
        if len(tensors) != operands:
            raise ValueError(f"takes {operands} inputs, got {len(tensors)}")
        one_dtype(tensors)
        return [function(*tensors).to(tensors[0].dtype)]

    return kernel


def comparison(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    def kernel(node: Node) -> list[Tensor]:
        left, right = node.tensors()
        one_dtype([left, right])
        return [function(left, right)]

    return kernel


def with_attribute(name: str, function: Callable[[Tensor, float], Tensor]) -> Kernel:
    def kernel(node: Node) -> list[Tensor]:
        (x,) = node.tensors()
        return [function(x, node.number(name)).to(x.dtype)]

    return kernel


def select(node: Node) -> list[Tensor]:
    """Select: condition has the shape of x1, or is a scalar (TensorFlow's Select)."""
    condition, x1, x2 = node.tensors()
    if (condition.shape != x1.shape and condition.dim() != 0) or x1.shape != x2.shape:
        raise ValueError("Select does not broadcast; SelectV2 does")
    return select_v2(node)


def select_v2(node: Node) -> list[Tensor]:
    condition, x1, x2 = node.tensors()
    if condition.dtype != torch.bool:
        raise ValueError("the condition must be bool")
    one_dtype([x1, x2])
    return [torch.where(condition, x1, x2)]


def scaled(function: Callable[[Tensor], Tensor], base_of: Callable[[Tensor, float], Tensor]) -> Kernel:
    """Exp and Log have attributes base (-1: e), scale and shift: base**(scale*x+shift), log_base(scale*x+shift)."""

    def kernel(node: Node) -> list[Tensor]:
        (x,) = node.tensors()
        base, scale, shift = node.number("base", -1.0), node.number("scale", 1.0), node.number("shift", 0.0)
        inner = x if (scale, shift) == (1.0, 0.0) else x * scale + shift
        return [function(inner) if base == -1.0 else base_of(inner, base)]

    return kernel


def reduction(function: Callable[..., Tensor], attribute: bool = False) -> Kernel:
    """x and axes (an input, or an attribute in the D form); no axes: nothing is reduced."""

    def kernel(node: Node) -> list[Tensor]:
        axes = node.integers("axes") if attribute else axes_of(node.tensors()[1])
        x = node.tensors()[0]
        return [function(x, dim=axes, keepdim=node.flag("keep_dims", False)).to(x.dtype) if axes else x.clone()]

    return kernel


def cast(node: Node) -> list[Tensor]:
    from interpreter import ge_dtype

    (x,) = node.tensors()
    return [x.to(ge_dtype(node.integer("dst_type")))]


def lp_norm_v2(node: Node) -> list[Tensor]:
    """(sum |x|^p)^(1/p) over axes (none: all)."""
    (x,) = node.tensors()
    if node.number("epsilon", 1e-12) != 0.0:
        raise ValueError("only epsilon=0 is interpreted")
    return [
        torch.linalg.vector_norm(
            x, node.number("p", 2.0), dim=node.integers("axes", []) or None, keepdim=node.flag("keepdim", False)
        )
    ]


KERNELS: dict[str, Kernel] = {
    # elewise_calculation_ops.h, one input
    "Abs": elementwise(torch.abs, 1),
    "Ceil": elementwise(torch.ceil, 1),
    "Cos": elementwise(torch.cos, 1),
    "Erf": elementwise(torch.erf, 1),
    "Exp": scaled(torch.exp, lambda x, base: torch.exp(x * math.log(base))),
    "Floor": elementwise(torch.floor, 1),
    "Identity": elementwise(torch.clone, 1),
    "Log": scaled(torch.log, lambda x, base: torch.log(x) / math.log(base)),
    "Neg": elementwise(torch.neg, 1),
    "Reciprocal": elementwise(torch.reciprocal, 1),
    "Rint": elementwise(torch.round, 1),  # ties to even
    "Rsqrt": elementwise(torch.rsqrt, 1),
    "Sign": elementwise(torch.sign, 1),  # 0 at 0
    "Sin": elementwise(torch.sin, 1),
    "Sqrt": elementwise(torch.sqrt, 1),
    "Square": elementwise(torch.square, 1),
    "Tan": elementwise(torch.tan, 1),
    "Tanh": elementwise(torch.tanh, 1),
    "Trunc": elementwise(torch.trunc, 1),
    "TensorMove": elementwise(torch.clone, 1),
    "LogicalNot": elementwise(torch.logical_not, 1),
    "IsNan": lambda node: [torch.isnan(node.tensors()[0])],
    "IsInf": lambda node: [torch.isinf(node.tensors()[0])],
    "IsFinite": lambda node: [torch.isfinite(node.tensors()[0])],
    "Muls": with_attribute("value", lambda x, value: x * value),
    "Adds": with_attribute("value", lambda x, value: x + value),
    "Cast": cast,
    # two inputs and more
    "Add": elementwise(torch.add, 2),
    "AddV2": elementwise(torch.add, 2),
    "Sub": elementwise(torch.sub, 2),
    "Mul": elementwise(torch.mul, 2),
    "Div": elementwise(torch.div, 2),  # floating operands only here
    "RealDiv": elementwise(torch.div, 2),
    "Maximum": elementwise(torch.maximum, 2),
    "Minimum": elementwise(torch.minimum, 2),
    "Pow": elementwise(torch.pow, 2),
    "LogicalAnd": elementwise(torch.logical_and, 2),
    "LogicalOr": elementwise(torch.logical_or, 2),
    "AxpyV2": elementwise(lambda x1, x2, alpha: x1 + alpha * x2, 3),  # y = x1 + alpha*x2
    "FusedMulAdd": elementwise(lambda x1, x2, x3: x1 * x2 + x3, 3),
    "Lerp": elementwise(lambda start, end, weight: start + weight * (end - start), 3),
    "Addcmul": elementwise(lambda x, x1, x2, value: x + value * x1 * x2, 4),
    "Addcdiv": elementwise(lambda x, x1, x2, value: x + value * x1 / x2, 4),
    "ClipByValue": elementwise(lambda x, low, high: torch.minimum(torch.maximum(x, low), high), 3),
    "ClipByValueV2": elementwise(lambda x, low, high: torch.minimum(torch.maximum(x, low), high), 3),
    "Greater": comparison(torch.gt),
    "GreaterEqual": comparison(torch.ge),
    "Less": comparison(torch.lt),
    "LessEqual": comparison(torch.le),
    "Equal": comparison(torch.eq),
    "NotEqual": comparison(torch.ne),
    "Select": select,
    "SelectV2": select_v2,
    # reduce_ops.h
    "ReduceSum": reduction(torch.sum),
    "ReduceSumD": reduction(torch.sum, attribute=True),
    "ReduceMax": reduction(torch.amax),
    "ReduceMin": reduction(torch.amin),
    "LpNormV2": lp_norm_v2,
    **shape_kernels.KERNELS,
    **training_kernels.KERNELS,
    **list_kernels.KERNELS,
}
