"""What each operation of an expression is in named operations of MLIR, all in float32 (masks in i1).

What has no row here stands in `REASONS`. Compositions keep torch's answers for NaN, infinities and zeros, and lose no
more than a few units in the last place where a straightforward one would cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from npu_fuse_pass.lowerings.npu.kernels.mlir import CHUNK, NUMBER, ONE, Body, Value

_LINALG, _HFUSION = "linalg.elemwise_{} {{fun = #linalg.{}_fn<{}>}}", "hfusion.elemwise_{} {{fun = #hfusion.{}_fn<{}>}}"
_NAMED = {
    **{n: _LINALG.format("binary", "binary", n) for n in ("add", "sub", "mul", "div")},
    **{
        n: _LINALG.format("unary", "unary", m)
        for n, m in (("exp", "exp"), ("log", "log"), ("abs", "abs"), ("neg", "negf"))
    },
    **{n: _HFUSION.format("binary", "binary", m) for n, m in (("maximum", "maxf"), ("minimum", "minf"))},
    **{n: _HFUSION.format("binary", "binary", f"v{n}") for n in ("and", "or", "xor")},
    **{n: _HFUSION.format("unary", "unary", n) for n in ("sqrt", "erf", "sin", "cos")},
    "where": "hfusion.select",
}
_COMPARE = "hfusion.compare {{compare_fn = #hfusion.compare_fn<v{}>}}"
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ROUNDS = {"round": "rint", "floor": "floor", "ceil": "ceil", "trunc": "trunc"}

REASONS = {
    **dict.fromkeys(
        ("asin", "acos", "atan", "atan2", "asinh", "acosh", "atanh"),
        "the vector unit has no such operation, and a composition of those that it has would lose precision",
    ),
    "erfc": "the vector unit has no such operation; 1 - erf(x) would lose all digits of small results",
    "hypot": "the vector unit has no such operation; sqrt(x*x + y*y) would overflow",
    "fmod": "the vector unit has no exact remainder",
}
"""Operations that CPU kernels have and these do not, and why."""


class Operations:
    """Applies operations to values; a number is spread over what it meets."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def __call__(self, op: str, *given: Value | float) -> Value:
        """The result of an operation of expressions, or of a named one."""
        made = _ROWS.get(op)
        size = self._size(given)
        values = [self._spread(x, size) for x in given]
        if made is not None:
            return made(self, *values)
        if op in _COMPARISONS:
            return self._body.apply(_COMPARE.format(op), values, "i1")
        if op in _ROUNDS:
            return self.cast(values[0], "f32", _ROUNDS[op])
        return self._body.apply(_NAMED[op], values, values[-1].dtype)

    def cast(self, value: Value, dtype: str, mode: str = "") -> Value:
        """A value in another element type; numbers are float32 already, and rounded where they are computed."""
        if value.dtype == dtype and not mode:
            return value
        if value.size == NUMBER:
            value = self._body.spread(value, CHUNK)
        if value.dtype == "i1" and dtype != "f32":
            return self.cast(self.cast(value, "f32"), dtype)
        if "f32" not in (value.dtype, dtype):
            return self.cast(self.cast(value, "f32"), dtype)
        sign = "unsigned" if value.dtype == "i1" else "signed"
        mode = mode or ("trunc" if dtype.startswith("i") else "rint")
        how = f"cast = #hfusion.type_fn<cast_{sign}>, round_mode = #hfusion.round_mode<{mode}>"
        return self._body.apply(f"hfusion.cast {{{how}}}", [value], dtype)

    def _spread(self, value: Value | float, size: str) -> Value:
        if not isinstance(value, Value):
            dtype = "i1" if isinstance(value, bool) else "f32"
            value = self._body.constant(value, dtype)
        return self._body.spread(value, size)

    @staticmethod
    def _size(given: tuple[Value | float, ...]) -> str:
        sizes = {x.size for x in given if isinstance(x, Value)}
        return CHUNK if CHUNK in sizes else ONE


def supported(op: str) -> bool:
    """Whether an operation on values (not a leaf, a cast, a reduction) has named operations here."""
    return op in _ROWS or op in _COMPARISONS or op in _ROUNDS or op in _NAMED


def _copysign(o: Operations, x: Value, y: Value) -> Value:
    """1 / y tells apart the zeros; a NaN's sign counts as positive."""
    inverse = o("div", 1.0, y)
    negative = o("or", o("lt", y, 0.0), o("lt", inverse, 0.0))
    size = o("abs", x)
    return o("where", negative, o("neg", size), size)


def _log1p(o: Operations, x: Value) -> Value:
    """log(1 + x), with what rounding 1 + x loses put back as a factor (Kahan)."""
    u = o("add", x, 1.0)
    scaled = o("mul", o("log", u), o("div", x, o("sub", u, 1.0)))
    usual = o("where", o("eq", u, 1.0), x, scaled)
    return o("where", o("eq", u, math.inf), u, usual)


def _expm1(o: Operations, x: Value) -> Value:
    """exp(x) - 1, with what rounding exp(x) loses put back as a factor (Kahan)."""
    u = o("exp", x)
    less = o("sub", u, 1.0)
    scaled = o("mul", less, o("div", x, o("log", u)))
    usual = o("where", o("eq", u, 1.0), x, scaled)
    ends = o("or", o("eq", u, math.inf), o("eq", less, -1.0))
    return o("where", ends, less, usual)


def _sinh(o: Operations, x: Value) -> Value:
    t = o("expm1", o("abs", x))
    size = o("mul", o("add", t, o("div", t, o("add", t, 1.0))), 0.5)
    size = o("where", o("eq", t, math.inf), t, size)
    return o("where", o("lt", x, 0.0), o("neg", size), size)


def _cosh(o: Operations, x: Value) -> Value:
    u = o("exp", o("abs", x))
    return o("mul", o("add", u, o("div", 1.0, u)), 0.5)


def _tanh(o: Operations, x: Value) -> Value:
    """The compiler's own is made of exp(x), so that small arguments lose their digits, all of them below 6e-8."""
    t = o("expm1", o("mul", x, 2.0))
    return o("where", o("eq", t, math.inf), 1.0, o("div", t, o("add", t, 2.0)))


def _pow(o: Operations, x: Value, y: Value) -> Value:
    """exp(y log|x|), and C's answers for negative bases, zeros, infinities, ones and exponent 0."""
    base = o("abs", x)
    size = o("where", o("eq", base, 1.0), 1.0, o("exp", o("mul", y, o("log", base))))
    whole = o("eq", o("floor", y), y)
    half = o("mul", y, 0.5)
    odd = o("and", whole, o("ne", o("floor", half), half))
    below = o("lt", x, 0.0)
    negative = o("or", below, o("lt", o("div", 1.0, x), 0.0))  # of the zeros, 1 / x tells
    signed = o("where", o("and", odd, negative), o("neg", size), size)
    undefined = o("and", o("and", below, o("isfinite", x)), o("not", whole))
    found = o("where", undefined, math.nan, signed)
    return o("where", o("or", o("eq", y, 0.0), o("eq", x, 1.0)), 1.0, found)


_ROWS: dict[str, Callable[..., Value]] = {
    "fma": lambda o, x, y, z: o("add", o("mul", x, y), z),
    "lerp": lambda o, start, end, weight: o("add", start, o("mul", o("sub", end, start), weight)),
    "rsqrt": lambda o, x: o("div", 1.0, o("sqrt", x)),
    "reciprocal": lambda o, x: o("div", 1.0, x),
    "sign": lambda o, x: o("where", o("gt", x, 0.0), 1.0, o("where", o("lt", x, 0.0), -1.0, 0.0)),
    "not": lambda o, x: o("xor", x, True),
    "isnan": lambda o, x: o("ne", x, x),
    "isinf": lambda o, x: o("eq", o("abs", x), math.inf),
    "isfinite": lambda o, x: o("lt", o("abs", x), math.inf),
    "fmax": lambda o, x, y: o("where", o("isnan", x), y, o("where", o("isnan", y), x, o("maximum", x, y))),
    "fmin": lambda o, x, y: o("where", o("isnan", x), y, o("where", o("isnan", y), x, o("minimum", x, y))),
    "exp2": lambda o, x: o("exp", o("mul", x, math.log(2))),
    "log2": lambda o, x: o("mul", o("log", x), 1 / math.log(2)),
    "log10": lambda o, x: o("mul", o("log", x), 1 / math.log(10)),
    "tan": lambda o, x: o("div", o("sin", x), o("cos", x)),
    "copysign": _copysign,
    "log1p": _log1p,
    "expm1": _expm1,
    "sinh": _sinh,
    "cosh": _cosh,
    "tanh": _tanh,
    "pow": _pow,
}
