"""Operations that decide dtype or shape themselves: casts, fills, reductions. Rows as in `rows`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.capture.aten.pointwise import evaluate
from npu_fuse_pass.capture.values import Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import HALF, Builder, Expr
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
    if not dtype.is_floating_point and dtype != torch.bool:
        return Val(b.op("trunc", x.expr), dtype, x.shape)
    return Val(x.expr, dtype, x.shape)


def _filled(value: float) -> Callable[..., Val]:
    def make(b: Builder, like: Val, dtype: torch.dtype | None = None, **_: Any) -> Val:
        target = dtype or like.dtype
        expr = b.const(value)
        return Val(b.cast(expr, target) if like.dimmed else expr, target, like.shape)

    return make


def _full_like(b: Builder, like: Val, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Val:
    target = dtype or like.dtype
    expr = value.expr if isinstance(value, Val) else b.const(value)
    if expr.tensor:
        raise Unsupported("full_like", "fills with a tensor that has dimensions", Code.SHAPES)
    return Val(b.cast(expr, target) if like.dimmed else expr, target, like.shape)


def _scalar(b: Builder, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Val:
    if isinstance(value, Val):
        made = dataclasses.replace(value, number=False)
        return cast(b, made, dtype or torch.get_default_dtype()) if value.number else made
    dtype = dtype or (torch.get_default_dtype() if isinstance(value, float) else torch.int64)
    return Val(b.const(float(torch.tensor(value, dtype=dtype, device="cpu"))), dtype, ())


def _full(b: Builder, size: Any, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Val:
    made = _scalar(b, value, dtype)
    if not list(size):
        return made
    if not made.dtype.is_floating_point or not all(isinstance(s, int) for s in size):
        raise Unsupported("full", f"creates a tensor of {made.dtype}", Code.DTYPE)
    return Val(b.cast(made.expr, made.dtype), made.dtype, tuple(size))


def _reduction(name: str) -> Callable[..., Val]:
    def reduce(b: Builder, x: Val, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
        _whole(name, x, args, kwargs)
        if x.dimmed and not x.expr.tensor:
            raise Unsupported(name, "reduces a tensor of one constant", Code.REDUCTION)
        return _rounded(b, b.reduce(name, b.cast(x.expr, torch.float64)), dtype or x.dtype)

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
    if order == 2:
        return _rounded(b, b.op("sqrt", b.reduce("sum", b.op("mul", wide, wide))), dtype)
    if order in (1, math.inf):
        return _rounded(b, b.reduce("sum" if order == 1 else "amax", b.op("abs", wide)), dtype)
    raise Unsupported("norm", f"order {order}; 1, 2 and inf can fuse", Code.REDUCTION)


def _dot(b: Builder, x: Val, y: Val) -> Val:
    if x.shape != y.shape or not (x.expr.tensor and y.expr.tensor):
        raise Unsupported("dot", "of a constant tensor or of different shapes", Code.SHAPES)
    product = b.op("mul", b.cast(x.expr, torch.float64), b.cast(y.expr, torch.float64))
    return _rounded(b, b.reduce("sum", product), x.dtype)


def _divide(b: Builder, x: Any, y: Any, rounding_mode: str | None = None) -> Val:
    if rounding_mode == "floor":
        return evaluate(b, "floor_divide", (x, y), {})
    if rounding_mode is None and isinstance(y, Val) and not y.number and (not isinstance(x, Val) or x.number):
        return evaluate(b, "mul", (evaluate(b, "reciprocal", (y,), {}), x), {})  # as Tensor.__rtruediv__
    quotient = evaluate(b, "div", (x, y), {})
    return quotient if rounding_mode is None else evaluate(b, "trunc", (quotient,), {})


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


def _rounded(b: Builder, x: Expr, dtype: torch.dtype) -> Val:
    """A reduction's result: half precision is rounded as torch stores it, wider ones stay in float64."""
    return Val(b.cast(b.cast(x, dtype), torch.float64) if dtype in HALF else x, dtype, ())


def _item(b: Builder, x: Val) -> Val:
    if x.dimmed:
        raise Unsupported("item", "reads a tensor that is not 0-dim", Code.VALUE)
    return Val(x.expr, torch.float64, (), number=True)


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
    "scalar_tensor": _scalar,
    "tensor": _scalar,
    "sum": _reduction("sum"),
    "amax": _reduction("amax"),
    "amin": _reduction("amin"),
    "max": lambda b, x, *y: evaluate(b, "maximum", (x, *y), {}) if y else _reduction("amax")(b, x),
    "min": lambda b, x, *y: evaluate(b, "minimum", (x, *y), {}) if y else _reduction("amin")(b, x),
    "mean": _mean,
    **dict.fromkeys(("div", "divide", "true_divide"), _divide),
    "nan_to_num": _nan_to_num,
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "dot": _dot,
    "vdot": _dot,
    **{
        n: (lambda b, x, *a, **k: x)
        for n in ["clone", "detach", "alias", "_get_data_attr", "lift_fresh", "lift_fresh_copy"]
    },
    **dict.fromkeys(("item", "_local_scalar_dense", "sym_float"), _item),
}
