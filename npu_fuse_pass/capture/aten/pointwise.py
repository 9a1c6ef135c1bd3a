"""torch's pointwise operations as expressions: one row per operation name.

Names are those of ATen without overload and without the trailing underscore of in-place forms; `_foreach_x` means "x on
every element" and needs no row. Roundings follow ATen's CPU kernels as measured (float32, torch 2.13): `add` with
alpha, `lerp` and `addcmul` contain one fused multiply-add, `addcdiv` none; half precision computes one operation in
float32 and rounds its result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.values import COUNTERS, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import C_FUNCTIONS, HALF, Builder
from npu_fuse_pass.reasons import Code


def evaluate(b: Builder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Val:
    """Apply the pointwise operation `name` to values and numbers.

    Raises:
        Unsupported: no row, or tensors of different shapes or kinds meet.
    """
    if name not in ROWS:
        raise Unsupported(name, "this operation has no place in a fused kernel", Code.OPERATION)
    vals = [a for a in (*args, *kwargs.values()) if isinstance(a, Val)]
    if name.startswith("bitwise_") and any(getattr(a, "dtype", None) != torch.bool for a in args):
        raise Unsupported(name, "works on the bits of integers", Code.DTYPE)
    dimmed = [v for v in vals if v.dimmed]
    shape = _common_shape(name, dimmed)
    dtype = _result_dtype(name, args, kwargs)
    work = torch.float32 if dtype in HALF else dtype

    def given(x: Any, place: int | str) -> Any:
        # in half precision ATen rounds numbers and 0-dim tensors to the half dtype first, with some exceptions
        narrow = dtype in HALF and not all(v.number for v in vals) and not _in_float(name, place, x)
        if isinstance(x, Val):
            if x.expr.tensor and x.dtype.is_floating_point:
                return b.cast(x.expr, work)
            if narrow and not x.expr.tensor and x.expr.dtype != torch.bool:
                return b.cast(b.cast(x.expr, dtype), torch.float64)
            return x.expr
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return b.const(float(torch.tensor(x, dtype=dtype, device="cpu")) if narrow else x)
        return x

    if dtype in HALF and dimmed and name in _NOT_IN_HALF:
        raise Unsupported(name, "rounds its intermediate results in half precision", Code.HALF_PRECISION)
    result = ROWS[name](b, *map(given, args, range(len(args))), **{k: given(v, k) for k, v in kwargs.items()})
    if result.dtype == torch.bool:
        return Val(result, torch.bool, shape)
    if vals and all(v.number for v in vals):
        integer = dtype == torch.int64 and name in _EXACT | _OF_INTEGERS
        return Val(result, torch.int64 if integer else torch.float64, (), number=True)
    tensors = any(v.expr.tensor for v in dimmed)
    if not dtype.is_floating_point and (tensors or dtype not in COUNTERS or name not in _EXACT):
        raise Unsupported(name, f"gives {dtype}: it stays as it is", Code.DTYPE)
    if not dimmed and dtype in HALF:
        return Val(b.cast(b.cast(result, dtype), torch.float64), dtype, shape)
    return Val(b.cast(result, dtype) if dimmed and dtype.is_floating_point else result, dtype, shape)


def _in_float(name: str, place: int | str, x: Any) -> bool:
    """True if ATen's kernels for half precision take this number or 0-dim tensor in float32."""
    number = not isinstance(x, Val) or x.number
    if name in ("mul", "multiply", "div", "divide", "true_divide"):
        return number or place == 1
    return name == "fma" or (number and name in ("addcmul", "addcdiv", "lerp"))


_NOT_IN_HALF = {"floor_divide", "floordiv"}


# exact in float64 for integers up to 2**53
_EXACT = {
    *("add", "sub", "subtract", "rsub", "neg", "negative", "abs", "absolute", "sign", "sgn", "floor", "ceil", "trunc"),
    *("round", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "max.other", "where", "relu"),
}
# integers from Python's integers, too
_OF_INTEGERS = {"mul", "multiply", "floor_divide", "floordiv", "remainder", "fmod", "pow", "sym_max", "sym_min"}
# of integers: results of the default dtype
_FLOATING = {*C_FUNCTIONS} - {"floor", "ceil", "trunc"}
_FLOATING |= {"div", "divide", "true_divide", "reciprocal", "rsqrt", "sigmoid", "atan2", "copysign", "arctan"}


def _common_shape(name: str, dimmed: list[Val]) -> tuple[int, ...]:
    """The common shape of all tensors; a tensor of one value fits if its shape broadcasts to it."""
    shapes = {v.shape for v in dimmed}
    tensors = {v.shape for v in dimmed if v.expr.tensor}
    try:
        shape = tuple(torch.broadcast_shapes(*shapes)) if len(shapes) > 1 else next(iter(shapes), ())
    except RuntimeError:
        shape = None
    if shape is None or tensors - {shape}:
        raise Unsupported(
            name, f"broadcasts tensors of shapes {sorted(shapes)}; equal shapes and 0-dim tensors can fuse", Code.SHAPES
        )
    return shape


def _result_dtype(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype by torch's promotion: tensors with dimensions decide, then 0-dim ones, then numbers."""
    dtypes: list[list[torch.dtype]] = [[], [], []]
    for x in (*(args[1:] if name == "where" else args), *kwargs.values()):
        if isinstance(x, Val):
            number = torch.get_default_dtype() if x.dtype.is_floating_point else x.dtype
            dtypes[2 if x.number else 1 - x.dimmed].append(number if x.number else x.dtype)
        elif isinstance(x, (bool, int, float)):
            kinds = {bool: torch.bool, int: torch.int64}
            dtypes[2].append(kinds.get(type(x), torch.get_default_dtype()))
    if not dtypes[0] and not dtypes[1] and any(d.is_floating_point for d in dtypes[2]):
        return torch.get_default_dtype() if name == "where" else torch.float64  # of numbers alone
    promoted = [functools.reduce(torch.promote_types, found) if found else None for found in dtypes]
    dtype = functools.reduce(_combined, promoted) or torch.get_default_dtype()
    if dtype.is_floating_point or name not in _FLOATING:
        return dtype
    return torch.get_default_dtype() if dtypes[0] or dtypes[1] else torch.float64


def _combined(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    """The promoted dtype of two categories of arguments, of which `higher` takes precedence."""
    if higher is None or lower is None or higher.is_floating_point:
        return lower if higher is None else higher
    return torch.promote_types(higher, lower) if higher == torch.bool or lower.is_floating_point else higher
