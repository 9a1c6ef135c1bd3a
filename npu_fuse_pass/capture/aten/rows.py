"""The rows of `pointwise`: every pointwise operation as expressions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.ir.expr import C_FUNCTIONS, Builder, Expr, uncast


def _is(x: object, value: float) -> bool:
    """True if an argument is literally this number (a default, left out or written out)."""
    return (isinstance(x, Expr) and x.op == "const" and x.value == value) or (x is not None and x == value)


def _are_masks(x: Expr, y: Expr) -> bool:
    """True for two bool tensors, whose sums and products are bool in torch (isfinite is made of one)."""
    return x.dtype == y.dtype == torch.bool


def _add(b: Builder, x: Expr, y: Expr, alpha: Any = 1) -> Expr:
    if _are_masks(x, y) and _is(alpha, 1):
        return b.op("or", x, y)
    return b.op("add", x, y) if _is(alpha, 1) else b.op("fma", y, alpha, x)


def _sub(b: Builder, x: Expr, y: Expr, alpha: Any = 1) -> Expr:
    return b.op("sub", x, y) if _is(alpha, 1) else b.op("fma", y, b.op("neg", alpha), x)


def _mul(b: Builder, x: Expr, y: Expr) -> Expr:
    return b.op("and" if _are_masks(x, y) else "mul", x, y)


def _floor_divide(b: Builder, x: Expr, y: Expr) -> Expr:
    """As ATen: from the remainder, so that 1.0 // 0.1 is 9."""
    zero, one = b.const(0), b.const(1)
    rest = b.op("fmod", x, y)
    quotient = b.op("div", b.op("sub", x, rest), y)
    signs_differ = b.op("and", b.op("ne", rest, zero), b.op("ne", b.op("lt", y, zero), b.op("lt", rest, zero)))
    quotient = b.op("where", signs_differ, b.op("sub", quotient, one), quotient)
    down = b.op("floor", quotient)
    down = b.op("where", b.op("gt", b.op("sub", quotient, down), b.const(0.5)), b.op("add", down, one), down)
    down = b.op("where", b.op("eq", quotient, zero), b.op("copysign", zero, b.op("div", x, y)), down)
    return b.op("where", b.op("eq", y, zero), b.op("div", x, y), down)


def _remainder(b: Builder, x: Expr, y: Expr) -> Expr:
    r = b.op("fmod", x, y)
    zero = b.const(0)
    wrong = b.op("and", b.op("ne", r, zero), b.op("ne", b.op("lt", r, zero), b.op("lt", y, zero)))
    return b.op("where", wrong, b.op("add", r, y), r)


def _addcmul(b: Builder, x: Expr, y: Expr, z: Expr, value: Any = 1) -> Expr:
    return b.op("fma", y if _is(value, 1) else b.op("mul", value, y), z, x)


def _addcdiv(b: Builder, x: Expr, y: Expr, z: Expr, value: Any = 1) -> Expr:
    return b.op("add", x, _quotient(b, y if _is(value, 1) else b.op("mul", value, y), z))


def _quotient(b: Builder, x: Expr, y: Expr) -> Expr:
    """Divide x by y; if y is a sum of quotients by one number, x is multiplied by that number instead.

    While it is compiled, torch's for-loop Adam divides both terms of the denominator by the step size: 0 / 0 where that
    is 0 and so is the second moment, and infinite in float16 for ordinary gradients. An eager step multiplies the
    numerator.
    """
    divisors = [_divisor(t) for t in _terms(y)]
    common = [_factors(d) for d in divisors if d is not None and not d.tensor]
    complete = len(common) == len(divisors) > 1
    number = next((f for f in common[0] if all(f in other for other in common)), None) if complete else None
    if number is None:
        return b.op("div", x, y)
    b.put_right = True
    return b.op("div", b.op("mul", number, x), _multiplied(b, y, number))


def _divisor(e: Expr) -> Expr | None:
    """The divisor of a quotient, which may be written as a product with a reciprocal; None for others."""
    if e.op == "div":
        return e.args[1]
    found = [a.args[0] for a in e.args if a.op == "reciprocal"] if e.op == "mul" else []
    return found[0] if len(found) == 1 else None


def _terms(e: Expr) -> list[Expr]:
    e = uncast(e)
    return [t for a in e.args for t in _terms(a)] if e.op == "add" else [e]


def _factors(e: Expr) -> list[Expr]:
    e = uncast(e)
    return [f for a in e.args for f in _factors(a)] if e.op == "mul" else [e]


def _multiplied(b: Builder, e: Expr, number: Expr) -> Expr:
    """A sum of quotients by products with `number`, times `number`."""
    if e.op == "cast":
        return b.cast(_multiplied(b, e.args[0], number), e.dtype)
    if e.op == "add":
        return b.op("add", *(_multiplied(b, a, number) for a in e.args))
    divisor = _divisor(e)
    assert divisor is not None
    rest = _factors(divisor)
    rest.remove(number)
    numerator = e.args[0] if e.op == "div" else next(a for a in e.args if a.op != "reciprocal")
    return b.op("div", numerator, functools.reduce(lambda x, y: b.op("mul", x, y), rest)) if rest else numerator


def _lerp(b: Builder, start: Expr, end: Expr, weight: Any) -> Expr:
    distance = b.op("sub", end, start)
    number = weight.value if weight.op == "const" else None
    if (not weight.tensor and number is None) or (number is not None and abs(number) >= 0.5):
        weight = b.cast(b.cast(weight, distance.dtype), torch.float64)  # 1 - weight is taken from the rounded weight
    low = b.op("fma", weight, distance, start)
    high = b.op("fma", b.op("neg", distance), b.op("sub", b.const(1), weight), end)
    if number is not None:
        return low if abs(number) < 0.5 else high
    return b.op("where", b.op("lt", b.op("abs", weight), b.const(0.5)), low, high)


# exponents that ATen's pow computes without std::pow
_POWERS: dict[float, Callable[[Builder, Expr], Expr]] = {
    0.5: lambda b, x: b.op("sqrt", x),
    1.0: lambda b, x: x,
    2.0: lambda b, x: b.op("mul", x, x),
    3.0: lambda b, x: b.op("mul", b.op("mul", x, x), x),
    -0.5: lambda b, x: b.op("rsqrt", x),
    -1.0: lambda b, x: b.op("reciprocal", x),
    -2.0: lambda b, x: b.op("reciprocal", b.op("mul", x, x)),
}


def _pow(b: Builder, x: Expr, y: Expr) -> Expr:
    if y.op == "const" and isinstance(y.value, float) and y.value in _POWERS:
        return _POWERS[y.value](b, x)
    return b.op("pow", x, y)


def _clamp(b: Builder, x: Expr, min: Expr | None = None, max: Expr | None = None) -> Expr:
    low = x if min is None else b.op("maximum", x, min)
    return low if max is None else b.op("minimum", low, max)


def _sym_log(b: Builder, x: Expr, base: Expr | None = None) -> Expr:
    return b.op("log", x) if base is None else b.op("div", b.op("log", x), b.op("log", base))


def _softplus(b: Builder, x: Expr, beta: Expr | None = None, threshold: Expr | None = None) -> Expr:
    scaled = b.op("mul", x, beta or b.const(1))
    smooth = b.op("div", b.op("log1p", b.op("exp", scaled)), beta or b.const(1))
    return b.op("where", b.op("gt", scaled, threshold or b.const(20)), x, smooth)


def _plain(name: str) -> Callable[..., Expr]:
    return lambda b, *args: b.op(name, *args)


# by the operation of the same name
_PLAIN = (
    *C_FUNCTIONS,
    *("neg", "abs", "rsqrt", "reciprocal", "round", "sign", "isnan", "isinf", "isfinite"),
    *("div", "fmod", "maximum", "minimum", "fmax", "fmin", "atan2", "copysign", "hypot", "fma"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
)
_OTHER_NAMES = {
    "absolute": "abs", "negative": "neg", "sgn": "sign", "arctan": "atan", "divide": "div", "true_divide": "div",
    "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne",
    "clamp_min": "maximum", "clamp_max": "minimum", "max.other": "maximum", "sym_not": "logical_not",
    "subtract": "sub", "multiply": "mul", "floordiv": "floor_divide", "clip": "clamp", "_sym_pow": "pow",
}  # fmt: skip
# Python's mathematics of a number that torch has made symbolic
_SYMBOLIC = ("exp", "sqrt", "cos", "cosh", "sin", "sinh", "tan", "tanh", "acos", "asin", "atan", "log2")

ROWS: dict[str, Callable[..., Expr]] = {
    **{name: _plain(name) for name in _PLAIN},
    **{f"_sym_{name}": _plain(name) for name in _SYMBOLIC},
    **{f"{kind}_{n}": _plain(n) for kind in ("logical", "bitwise") for n in ("and", "or", "xor", "not")},
    "add": _add,
    "sub": _sub,
    "rsub": lambda b, x, y, alpha=1: _sub(b, y, x, alpha),
    "mul": _mul,
    "square": lambda b, x: b.op("mul", x, x),
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "pow": _pow,
    "clamp": _clamp,
    "where": lambda b, condition, x, y: b.op("where", condition, x, y),
    "relu": lambda b, x: b.op("maximum", x, b.const(0)),
    "sigmoid": lambda b, x: b.op("reciprocal", b.op("add", b.const(1), b.op("exp", b.op("neg", x)))),
    "softplus": _softplus,
    "_sym_log": _sym_log,
    # Python's max and min of two numbers: the first one if neither is greater
    "sym_max": lambda b, x, y: b.op("where", b.op("gt", y, x), y, x),
    "sym_min": lambda b, x, y: b.op("where", b.op("lt", y, x), y, x),
}
ROWS |= {other: ROWS[name] for other, name in _OTHER_NAMES.items()}
