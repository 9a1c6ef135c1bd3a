"""Reductions, and other operations that decide dtype or shape themselves. Rows as in `rows`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.capture.aten.fills import FILLS, as_list, as_number, cast
from npu_fuse_pass.capture.aten.pointwise import evaluate
from npu_fuse_pass.capture.values import Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import HALF, Builder, Expr, uncast
from npu_fuse_pass.reasons import Code


def _masked_fill(b: Builder, x: Val, mask: Val, value: Any) -> Val:
    if mask.dtype != torch.bool:
        raise Unsupported("masked_fill", f"takes a mask of {mask.dtype}", Code.DTYPE)
    return cast(b, evaluate(b, "where", (mask, value, x), {}), x.dtype)


def _reduction(name: str, b: Builder, x: Val, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    _whole(name, x, args, kwargs)
    if dtype is not None and not dtype.is_floating_point:
        raise Unsupported(name, f"gives {dtype}", Code.DTYPE)
    own = torch.int64 if name == "sum" and not x.dtype.is_floating_point else x.dtype
    return _stored(b, b.reduce(name, b.cast(x.expr, torch.float64)), dtype or own)


def _mean(b: Builder, x: Val, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Val:
    """The mean; that of half precision is a quotient in float32, rounded once."""
    own = dtype or x.dtype
    total = _reduction("sum", b, x, *args, dtype=torch.float32 if own in HALF else dtype, **kwargs)
    quotient = b.op("div", total.expr, b.numel() if x.shape else b.const(1))
    return _stored(b, quotient, own) if own in HALF else Val(quotient, total.dtype, ())


def _norm(b: Builder, x: Val, ord: Any = 2, dim: Any = None, *args: Any, **kwargs: Any) -> Val:
    chosen = kwargs.pop("p", ord)
    order = 2.0 if chosen in (None, "fro") else float(chosen)
    dtype = kwargs.pop("dtype", None) or x.dtype
    _whole("norm", x, (dim, *args), kwargs)
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
    """The norm of all elements; with an order, that of a matrix is another norm and refused."""
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
    """A reduction's result as torch stores it: overflow to infinity, underflow to 0."""
    narrow = dtype in (torch.float32, *HALF)
    return Val(b.cast(b.cast(x, dtype), torch.float64) if narrow else x, dtype, ())


def _fma(b: Builder, x: Any, y: Any, z: Any) -> Val:
    """`prims.fma`, which Dynamo writes for `addcmul_` and `addcdiv_` after a product or quotient. ATen multiplies by
    the number first, which can avoid an overflow.
    """
    number = isinstance(y, (int, float)) or (isinstance(y, Val) and y.number)
    inner = uncast(x.expr) if isinstance(x, Val) else None
    if not number or inner is None or inner.op not in ("mul", "div") or not all(a.tensor for a in inner.args):
        return evaluate(b, "fma", (x, y, z), {})
    first, second = (Val(a, x.dtype, x.shape) for a in inner.args)
    return evaluate(b, "addcmul" if inner.op == "mul" else "addcdiv", (z, first, second), {"value": y})


def _item(b: Builder, x: Val) -> Val:
    if math.prod(x.shape) != 1:
        raise Unsupported("item", "reads a tensor of several elements", Code.VALUE)
    x = as_number(b, x) if x.dimmed else x
    dtype = torch.float64 if x.dtype.is_floating_point else torch.int64
    return Val(b.cast(x.expr, torch.float64), dtype, (), number=True)  # what adds up truth values counts them


def _rounded(b: Builder, x: Val, digits: object = None) -> Val:
    """Python's round."""
    if digits is not None:
        raise Unsupported("round", "rounds to decimal places", Code.OPERATION)
    if not x.number:
        return evaluate(b, "round", (x,), {})
    return Val(b.op("round", x.expr), torch.int64, (), number=True)


def _truncated(b: Builder, x: Val) -> Val:
    """Python's int."""
    return Val(b.op("trunc", x.expr), torch.int64, (), number=True)


def _shifted(b: Builder, x: Val, places: object, left: bool) -> Val:
    """Python's shift of an integer."""
    if not isinstance(x, Val) or not x.number or not isinstance(places, int) or places < 0:
        raise Unsupported("shift", "works on the bits of integers", Code.DTYPE)
    factor = b.const(2**places)
    shifted = b.op("mul", x.expr, factor) if left else b.op("floor", b.op("div", x.expr, factor))
    return Val(shifted, torch.int64, (), number=True)


def _whole(name: str, x: Val, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a reduction over some of the dimensions, or of a constant."""
    dims = [d for d in (*args[:1], kwargs.get("dim"), kwargs.get("axis")) if d is not None and d != []]
    if dims and sorted(d % max(1, len(x.shape)) for d in as_list(dims[0])) != list(range(len(x.shape))):
        raise Unsupported(
            name,
            f"reduces dimensions {dims[0]} of {len(x.shape)}; a reduction of the whole tensor can fuse",
            Code.REDUCTION,
        )
    if (True in args[1:] or kwargs.get("keepdim")) and x.shape != ():
        raise Unsupported(name, "keeps reduced dimensions; without keepdim it can fuse", Code.REDUCTION)
    if x.dimmed and not x.expr.tensor:
        raise Unsupported(name, "reduces a tensor of one constant", Code.REDUCTION)


def _extremum(name: str, b: Builder, x: Val, *other: Any) -> Val:
    if not other:
        if 0 in x.shape:
            raise Unsupported(name, "of a tensor without elements, which torch refuses", Code.REDUCTION)
        return _reduction(f"a{name}", b, x)
    if not isinstance(other[0], Val):
        raise Unsupported(name, "of a dimension gives indices, too; amax and amin can fuse", Code.REDUCTION)
    return evaluate(b, f"{name}imum", (x, *other), {})


def _other_memory(b: Builder, x: Val) -> Val:
    """`p.data = new`, as Dynamo ends it."""
    remedy = "write to the memory that the tensor has: p.data.copy_(new), p.data.sub_(update)"
    raise Unsupported("data", "is assigned, which gives the tensor other memory", Code.OPERATION, remedy)


# operations that return a real tensor itself
REAL = ("conj", "conj_physical", "resolve_conj", "resolve_neg", "real", "positive", "pos")

SHAPED: dict[str, Callable[..., Val]] = {
    **FILLS,
    "type_as": lambda b, x, other: cast(b, x, other.dtype),
    "float": lambda b, x: cast(b, x, torch.float32),
    "double": lambda b, x: cast(b, x, torch.float64),
    "half": lambda b, x: cast(b, x, torch.float16),
    "bfloat16": lambda b, x: cast(b, x, torch.bfloat16),
    "masked_fill": _masked_fill,
    "_lower_version_count_by_1": _other_memory,
    **{name: functools.partial(_reduction, name) for name in ("sum", "amax", "amin")},
    **{name: functools.partial(_extremum, name) for name in ("max", "min")},
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
    "__round__": _rounded,
    "sym_int": _truncated,
    "lshift": functools.partial(_shifted, left=True),
    "rshift": functools.partial(_shifted, left=False),
}
