"""Casts and fills: operations that decide dtype or shape themselves. Rows as in `rows`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.capture.values import COUNTERS, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import DTYPE_NAMES, HALF, Builder
from npu_fuse_pass.reasons import Code


def _to(b: Builder, x: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    target = next((a for a in args if isinstance(a, torch.dtype)), dtype)
    other = next((a for a in args if isinstance(a, Val)), None)
    target = other.dtype if other is not None else target
    moved = next((a for a in (*args, kwargs.get("device")) if isinstance(a, (torch.device, str))), None)
    if moved is not None and x.dimmed:
        raise Unsupported("to", f"asks for a tensor on {moved}", Code.DEVICE)
    return x if target is None else cast(b, x, target)


def cast(b: Builder, x: Val, dtype: torch.dtype) -> Val:
    """The value in another dtype. In the scalar part a narrower float rounds, and the result is float64 again."""
    if x.dtype == dtype and not x.number:
        return x
    if x.dimmed and (x.expr.tensor or dtype not in COUNTERS or math.prod(x.shape) != 1):
        if dtype.is_floating_point and (x.expr.dtype == torch.bool or x.expr.dtype.is_floating_point):
            return Val(b.cast(x.expr, dtype), dtype, x.shape)
        raise Unsupported("to", f"converts {x.dtype} to {dtype}", Code.DTYPE)
    if dtype in (torch.float32, *HALF):
        return Val(b.cast(b.cast(x.expr, dtype), torch.float64), dtype, x.shape)
    if dtype in COUNTERS:
        return Val(b.op("trunc", x.expr), dtype, x.shape)
    if dtype == torch.bool:
        return Val(b.op("ne", x.expr, b.const(0)), dtype, x.shape)
    if dtype != torch.float64:
        raise Unsupported("to", f"converts {x.dtype} to {dtype}", Code.DTYPE)
    return Val(b.cast(x.expr, torch.float64), dtype, x.shape)


def as_number(b: Builder, x: Val) -> Val:
    """A tensor of one element as a 0-dim value."""
    expr = b.reduce("amax", b.cast(x.expr, torch.float64)) if x.expr.tensor else b.cast(x.expr, torch.float64)
    return Val(expr, x.dtype, ())


def _full_like(b: Builder, like: Val, value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    made = _scalar(b, value, dtype or like.dtype, **kwargs)
    return _spread(b, made, like.shape, value) if like.dimmed else made


def _spread(b: Builder, x: Val, shape: tuple[int, ...], value: Any) -> Val:
    """A tensor filled with `x`; a Python number is rounded in the kernel, so that formulas show it unrounded."""
    if x.dimmed:
        raise Unsupported("full", "fills with a tensor that has dimensions", Code.SHAPES)
    if not x.dtype.is_floating_point:
        raise Unsupported("full", f"creates a tensor of {x.dtype}", Code.DTYPE)
    expr = x.expr if isinstance(value, Val) else b.const(value)
    return Val(b.cast(expr, x.dtype), x.dtype, shape)


def _scalar(b: Builder, value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    """One number as a 0-dim tensor."""
    if kwargs.get("requires_grad"):
        raise Unsupported("tensor", "creates a tensor that requires a gradient", Code.FORM)
    if isinstance(value, Val) and value.dimmed:
        raise Unsupported("tensor", "makes one number of a tensor that has dimensions", Code.FORM)
    if isinstance(value, Val):
        natural = torch.get_default_dtype() if value.number and value.dtype.is_floating_point else value.dtype
        return cast(b, value if value.number else dataclasses.replace(value, number=False), dtype or natural)
    natural = {bool: torch.bool, int: torch.int64}.get(type(value), torch.get_default_dtype())
    made = torch.tensor(value, dtype=dtype or natural, device="cpu")
    if made.is_complex() or (made.dtype not in DTYPE_NAMES and (made.dtype != torch.int64 or abs(value) > _EXACT)):
        raise Unsupported("tensor", f"creates a tensor of {made.dtype}", Code.DTYPE)
    return Val(b.const(float(made)), made.dtype, ())


_EXACT = 2**53  # integers up to here are numbers in float64


def _tensor(b: Builder, data: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    """`torch.tensor` and `torch.as_tensor` of numbers in lists: one number, or the same one everywhere."""
    shape, numbers = _nested(data)
    if not shape:
        return _scalar(b, data, dtype, **kwargs)
    distinct = {(type(n), id(n.expr) if isinstance(n, Val) else repr(n)) for n in numbers}
    if len(distinct) != 1 or any(isinstance(n, Val) and not n.number for n in numbers):
        raise Unsupported("tensor", "creates a tensor of several numbers", Code.CONSTANT)
    return _spread(b, _scalar(b, numbers[0], dtype, **kwargs), shape, numbers[0])


def _nested(data: Any) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of nested lists, and their entries."""
    if not isinstance(data, (list, tuple)):
        return (), [data]
    below = [_nested(x) for x in data]
    if len({shape for shape, _ in below}) > 1:
        raise Unsupported("tensor", "creates a tensor of lists of different lengths", Code.FORM)
    return (len(data), *(below[0][0] if below else ())), [n for _, numbers in below for n in numbers]


def _as_tensor(b: Builder, data: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    if isinstance(data, Val) and not data.number:
        return _to(b, data, dtype=dtype, **kwargs)
    return _tensor(b, data, dtype, **kwargs)


def _full(b: Builder, size: Any, value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    made = _scalar(b, value, dtype, **kwargs)
    sizes = as_list(size)
    if not all(isinstance(s, int) for s in sizes):
        raise Unsupported("full", "creates a tensor of a size that changes", Code.SIZE)
    return _spread(b, made, tuple(sizes), value) if sizes else made


def _sized(b: Builder, *size: Any, value: float, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    """`torch.zeros(2, 3)` and the like: the default dtype, the size in one argument or several."""
    return _full(b, _sizes(size), value, dtype or torch.get_default_dtype(), **kwargs)


def _new(b: Builder, like: Val, *size: Any, value: float, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    """`x.new_zeros(2, 3)` and the like: the dtype of x."""
    return _full(b, _sizes(size), value, dtype or like.dtype, **kwargs)


def _new_full(b: Builder, like: Val, size: Any, value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    return _full(b, size, value, dtype or like.dtype, **kwargs)


def _sizes(size: tuple[Any, ...]) -> Any:
    return size[0] if len(size) == 1 else size


def as_list(value: Any) -> list[int]:
    """A number or several as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


FILLS: dict[str, Callable[..., Val]] = {
    "to": _to,
    "_to_copy": _to,
    "zeros_like": functools.partial(_full_like, value=0.0),
    "ones_like": functools.partial(_full_like, value=1.0),
    "empty_like": functools.partial(_full_like, value=0.0),  # it may hold anything
    "full_like": _full_like,
    "zeros": functools.partial(_sized, value=0.0),
    "ones": functools.partial(_sized, value=1.0),
    "empty": functools.partial(_sized, value=0.0),
    "new_zeros": functools.partial(_new, value=0.0),
    "new_ones": functools.partial(_new, value=1.0),
    "new_empty": functools.partial(_new, value=0.0),
    "new_full": _new_full,
    "full": _full,
    "scalar_tensor": lambda b, x, dtype=None, **k: _scalar(b, x, dtype or torch.get_default_dtype(), **k),
    "tensor": _tensor,
    "as_tensor": _as_tensor,
}
