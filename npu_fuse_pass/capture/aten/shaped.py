"""Operations that decide dtype or shape themselves: casts, fills, reductions. Rows as in `rows`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.capture.aten.pointwise import evaluate
from npu_fuse_pass.capture.values import COUNTERS, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import DTYPE_NAMES, HALF, Builder, Expr
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
    if x.dimmed:
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
    return Val(x.expr, dtype, x.shape)


def _filled(value: float) -> Callable[..., Val]:
    def make(b: Builder, like: Val, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
        return _full_like(b, like, value, dtype, **kwargs)

    return make


def _full_like(b: Builder, like: Val, value: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    made = _scalar(b, value, dtype or like.dtype, **kwargs)
    return _spread(b, made, like.shape, value) if like.dimmed else made


def _spread(b: Builder, x: Val, shape: tuple[int, ...], value: Any) -> Val:
    """A tensor of one value, `x`; a number of Python's is rounded in the kernel, so that formulas show it as it is."""
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
    if not numbers or any(type(n) is not type(numbers[0]) for n in numbers):
        raise Unsupported("tensor", "creates a tensor of several numbers", Code.CONSTANT)
    first = numbers[0]
    if isinstance(first, Val):
        if not all(isinstance(n, Val) and n.number and n.expr is first.expr for n in numbers):
            raise Unsupported("tensor", "creates a tensor of several numbers", Code.CONSTANT)
    elif len({repr(n) for n in numbers}) > 1:
        raise Unsupported("tensor", "creates a tensor of several numbers", Code.CONSTANT)
    return _spread(b, _scalar(b, first, dtype, **kwargs), shape, first)


def _nested(data: Any) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of nested lists, and what is in them."""
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
    sizes = _as_list(size)
    if not all(isinstance(s, int) for s in sizes):
        raise Unsupported("full", "creates a tensor of a size that changes", Code.SIZE)
    return _spread(b, made, tuple(sizes), value) if sizes else made


def _masked_fill(b: Builder, x: Val, mask: Val, value: Any) -> Val:
    if mask.dtype != torch.bool:
        raise Unsupported("masked_fill", f"takes a mask of {mask.dtype}", Code.DTYPE)
    return cast(b, evaluate(b, "where", (mask, value, x), {}), x.dtype)


def _reduction(name: str) -> Callable[..., Val]:
    def reduce(b: Builder, x: Val, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
        _whole(name, x, args, kwargs)
        if x.dimmed and not x.expr.tensor:
            raise Unsupported(name, "reduces a tensor of one constant", Code.REDUCTION)
        if dtype is not None and not dtype.is_floating_point:
            raise Unsupported(name, f"gives {dtype}", Code.DTYPE)
        own = torch.int64 if name == "sum" and not x.dtype.is_floating_point else x.dtype
        return _stored(b, b.reduce(name, b.cast(x.expr, torch.float64)), dtype or own)

    return reduce


def _mean(b: Builder, x: Val, *args: Any, **kwargs: Any) -> Val:
    total = _reduction("sum")(b, x, *args, **kwargs)
    return Val(b.op("div", total.expr, b.numel() if x.shape else b.const(1)), total.dtype, ())


def _norm(b: Builder, x: Val, ord: Any = 2, dim: Any = None, *args: Any, **kwargs: Any) -> Val:
    chosen = kwargs.pop("p", ord)
    order = 2.0 if chosen in (None, "fro") else float(chosen)
    dtype = kwargs.pop("dtype", None) or x.dtype
    _whole("norm", x, (dim, *args), kwargs)
    if x.dimmed and not x.expr.tensor:
        raise Unsupported("norm", "reduces a tensor of one constant", Code.REDUCTION)
    wide = b.cast(x.expr, torch.float64)
    if order in (1, math.inf, -math.inf):
        name = {1: "sum", math.inf: "amax", -math.inf: "amin"}[order]
        return _stored(b, b.reduce(name, b.op("abs", wide)), dtype)
    if order == 0:
        return _stored(b, b.reduce("sum", b.cast(b.op("ne", wide, b.const(0)), torch.float64)), dtype)
    # torch's powers and their sum are in float32, and may be 0 or infinite there: so are these
    accumulated = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    own = b.cast(x.expr, accumulated)
    powers = b.op("mul", own, own) if order == 2 else b.op("pow", b.op("abs", own), b.const(order))
    whole = _stored(b, b.reduce("sum", b.cast(powers, torch.float64)), accumulated).expr
    return _stored(b, b.op("sqrt", whole) if order == 2 else b.op("pow", whole, b.const(1 / order)), dtype)


def _linalg_norm(b: Builder, x: Val, ord: Any = None, *args: Any, **kwargs: Any) -> Val:
    """Of all elements where no order is given; with one, of a matrix, it is another norm."""
    if ord is not None and len(x.shape) > 1:
        raise Unsupported("linalg_norm", "takes a norm of a matrix; without an order it can fuse", Code.REDUCTION)
    return _norm(b, x, 2 if ord is None else ord, *args, **kwargs)


def _dot(b: Builder, x: Val, y: Val) -> Val:
    if x.shape != y.shape or not (x.expr.tensor and y.expr.tensor):
        raise Unsupported("dot", "of a constant tensor or of different shapes", Code.SHAPES)
    product = b.op("mul", b.cast(x.expr, torch.float64), b.cast(y.expr, torch.float64))
    return _stored(b, b.reduce("sum", product), x.dtype)


def _divide(b: Builder, x: Any, y: Any, rounding_mode: str | None = None) -> Val:
    if rounding_mode == "floor":
        return evaluate(b, "floor_divide", (x, y), {})
    if rounding_mode is None and isinstance(y, Val) and not y.number and (not isinstance(x, Val) or x.number):
        return evaluate(b, "mul", (evaluate(b, "reciprocal", (y,), {}), x), {})  # as Tensor.__rtruediv__
    if rounding_mode is not None and not any(_is_float(v) for v in (x, y)):
        raise Unsupported("div", "divides integers", Code.DTYPE)
    quotient = evaluate(b, "div", (x, y), {})
    return quotient if rounding_mode is None else evaluate(b, "trunc", (quotient,), {})


def _is_float(x: Any) -> bool:
    return x.dtype.is_floating_point if isinstance(x, Val) else isinstance(x, float)


def _nan_to_num(b: Builder, x: Val, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Val:
    limit = torch.finfo(x.dtype).max

    def replace(condition: Val, value: Any, otherwise: Val) -> Val:
        return evaluate(b, "where", (condition, value, otherwise), {})

    finite = replace(evaluate(b, "isnan", (x,), {}), 0.0 if nan is None else nan, x)
    high = evaluate(b, "eq", (finite, math.inf), {})
    low = evaluate(b, "eq", (finite, -math.inf), {})
    return replace(
        low, -limit if neginf is None else neginf, replace(high, limit if posinf is None else posinf, finite)
    )


def _stored(b: Builder, x: Expr, dtype: torch.dtype) -> Val:
    """A reduction's result as torch stores it: what is too large for its dtype is infinite, what is too small 0."""
    narrow = dtype in (torch.float32, *HALF)
    return Val(b.cast(b.cast(x, dtype), torch.float64) if narrow else x, dtype, ())


def _fma(b: Builder, x: Any, y: Any, z: Any) -> Val:
    """Dynamo writes `addcmul_` and `addcdiv_` with a number as a product or quotient, then this; ATen multiplies by the
    number first, so that a square that is too large for its dtype may be small enough.
    """
    number = isinstance(y, (int, float)) or (isinstance(y, Val) and y.number)
    inner = x.expr if isinstance(x, Val) else None
    while inner is not None and inner.op == "cast":
        inner = inner.args[0]
    if not number or inner is None or inner.op not in ("mul", "div") or not all(a.tensor for a in inner.args):
        return evaluate(b, "fma", (x, y, z), {})
    first, second = (Val(a, x.dtype, x.shape) for a in inner.args)
    return evaluate(b, "addcmul" if inner.op == "mul" else "addcdiv", (z, first, second), {"value": y})


def _item(b: Builder, x: Val) -> Val:
    if x.dimmed:
        raise Unsupported("item", "reads a tensor that is not 0-dim", Code.VALUE)
    return Val(x.expr, torch.float64 if x.dtype.is_floating_point else torch.int64, (), number=True)


def _whole(name: str, x: Val, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a reduction over some of the dimensions."""
    dims = [d for d in (*args[:1], kwargs.get("dim"), kwargs.get("axis")) if d is not None and d != []]
    if dims and sorted(d % max(1, len(x.shape)) for d in _as_list(dims[0])) != list(range(len(x.shape))):
        raise Unsupported(
            name,
            f"reduces dimensions {dims[0]} of {len(x.shape)}; a reduction of the whole tensor can fuse",
            Code.REDUCTION,
        )
    if (True in args[1:] or kwargs.get("keepdim")) and x.shape != ():
        raise Unsupported(name, "keeps reduced dimensions; without keepdim it can fuse", Code.REDUCTION)


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


# what gives a real tensor itself
REAL = ("conj", "conj_physical", "resolve_conj", "resolve_neg", "real", "positive", "pos")

SHAPED: dict[str, Callable[..., Val]] = {
    "to": _to,
    "_to_copy": _to,
    "type_as": lambda b, x, other: cast(b, x, other.dtype),
    "float": lambda b, x: cast(b, x, torch.float32),
    "double": lambda b, x: cast(b, x, torch.float64),
    "half": lambda b, x: cast(b, x, torch.float16),
    "bfloat16": lambda b, x: cast(b, x, torch.bfloat16),
    "zeros_like": _filled(0.0),
    "ones_like": _filled(1.0),
    "full_like": _full_like,
    "full": _full,
    "scalar_tensor": lambda b, x, dtype=None, **k: _scalar(b, x, dtype or torch.get_default_dtype(), **k),
    "tensor": _tensor,
    "as_tensor": _as_tensor,
    "masked_fill": _masked_fill,
    "sum": _reduction("sum"),
    "amax": _reduction("amax"),
    "amin": _reduction("amin"),
    "max": lambda b, x, *y: evaluate(b, "maximum", (x, *y), {}) if y else _reduction("amax")(b, x),
    "min": lambda b, x, *y: evaluate(b, "minimum", (x, *y), {}) if y else _reduction("amin")(b, x),
    "mean": _mean,
    **dict.fromkeys(("div", "divide", "true_divide"), _divide),
    "fma": _fma,
    "nan_to_num": _nan_to_num,
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "linalg_norm": _linalg_norm,
    "dot": _dot,
    "vdot": _dot,
    **{
        n: (lambda b, x, *a, **k: x)
        for n in ["clone", "detach", "alias", "_get_data_attr", "lift_fresh", "lift_fresh_copy", *REAL]
    },
    **dict.fromkeys(("item", "_local_scalar_dense", "sym_float"), _item),
}
