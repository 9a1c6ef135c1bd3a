"""What torch's pointwise operations compute, as expressions: one row per operation name.

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
from npu_fuse_pass.capture.values import Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import HALF, Builder
from npu_fuse_pass.reasons import Code


def evaluate(b: Builder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Val:
    """Apply the pointwise operation `name` to values and numbers.

    Raises:
        Unsupported: no row, or tensors of different shapes or kinds meet.
    """
    if name not in ROWS:
        raise Unsupported(name, "this operation has no place in a fused kernel", Code.OPERATION)
    vals = [a for a in (*args, *kwargs.values()) if isinstance(a, Val)]
    dimmed = [v for v in vals if v.dimmed]
    shape = _common_shape(name, dimmed)
    dtype = _result_dtype(vals, dimmed)
    work = torch.float32 if dtype in HALF else dtype

    def given(x: Any, place: int | str) -> Any:
        # in half precision ATen rounds numbers and 0-dim tensors to the half dtype first, with some exceptions
        narrow = dtype in HALF and bool(dimmed) and not _in_float(name, place, x)
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
        return Val(result, torch.float64, (), number=True)
    if not dimmed and dtype in HALF:
        return Val(b.cast(b.cast(result, dtype), torch.float64), dtype, shape)
    return Val(b.cast(result, dtype) if dimmed else result, dtype, shape)


def _in_float(name: str, place: int | str, x: Any) -> bool:
    """Whether ATen's kernels for half precision take this number or 0-dim tensor in float32."""
    number = not isinstance(x, Val) or x.number
    if name in ("mul", "multiply", "div", "divide", "true_divide"):
        return number or place == 1
    return name == "fma" or (number and name in ("addcmul", "addcdiv", "lerp"))


_NOT_IN_HALF = {"floor_divide", "floordiv"}


def _common_shape(name: str, dimmed: list[Val]) -> tuple[int, ...]:
    shapes = {v.shape for v in dimmed}
    if len(shapes) > 1:
        raise Unsupported(
            name, f"broadcasts tensors of shapes {sorted(shapes)}; equal shapes and 0-dim tensors can fuse", Code.SHAPES
        )
    return next(iter(shapes)) if shapes else ()


def _result_dtype(vals: list[Val], dimmed: list[Val]) -> torch.dtype:
    """Tensors with dimensions decide, then 0-dim ones, then numbers."""
    for deciding in (dimmed, [v for v in vals if not v.number]):
        dtypes = [v.dtype for v in deciding if v.dtype.is_floating_point]
        if dtypes:
            return functools.reduce(torch.promote_types, dtypes)
    return torch.get_default_dtype() if dimmed else torch.float64
