"""The one table of operations: how each is called, and how far it may be from torch's CPU result, with the reason."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.inductor_prims  # defines torch.ops.prims.fma
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation and how far it may be from torch's CPU result, in units in the last place.

    Args:
        row: its name in ROWS.
        call: applied to tensors x, y, z of one dtype; or a function of torch that takes one or two of them.
        ulps: limit for float32 and float64.
        half: limit for float16 and bfloat16; None: refused there, since ATen rounds in between.
        why: the reason for a limit above 0, or for `where`.
        where: the elements that are compared.
        form: tells apart several uses of one row.
    """

    row: str
    call: Callable[..., Any]
    ulps: float = 0
    half: float | None = 0
    why: str = ""
    where: Callable[..., Tensor] | None = None
    form: str = ""

    @property
    def name(self) -> str:
        return f"{self.row} {self.form}".strip()

    def allowed(self, dtype: torch.dtype) -> float | None:
        return self.half if dtype in HALF else self.ulps

    def compared(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bool) if self.where is None else self.where(x.double(), y.double())


def _one(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, z: function(x)


def _two(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, z: function(x, y)


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, z: function(x, 0.3)


_NEAR = "exp exp2 expm1 log log2 log1p sin cos tan asin acos atan arctan atanh"
_UNARY_EXACT = (
    "neg abs absolute negative reciprocal floor ceil trunc round sign isnan isinf isfinite square relu asinh acosh"
)
_UNARY_EXACT += " logical_not"
_BINARY_EXACT = "maximum minimum fmax fmin add sub subtract rsub mul multiply div divide true_divide copysign"
_COMPARED = "lt le gt ge eq ne less greater not_equal less_equal greater_equal"
_LIBM = "both libraries promise 1 ulp, not correct rounding"
_APART = "1 ulp each, apart from the true value in opposite ways"
_MODEST = "ATen's vector loop gives NaN where the quotient is beyond about 2^bits; ours is exact there"


def _modest(x: Tensor, y: Tensor) -> Tensor:
    return ~(x.isfinite() & y.isfinite() & (x.abs() > 1e6 * y.abs()) & (y != 0))


TABLE = [
    *(Op(n, _one(getattr(torch, n))) for n in _UNARY_EXACT.split()),
    *(Op(n, _two(getattr(torch, n))) for n in _BINARY_EXACT.split()),
    *(Op(n, _two(getattr(torch, n))) for n in _COMPARED.split()),
    *(Op(n, _number(getattr(torch, n)), form="number") for n in f"{_COMPARED} add sub rsub mul div copysign".split()),
    Op("nan_to_num", _one(torch.nan_to_num)),
    *(Op(n, _one(getattr(torch, n))) for n in ("sgn", "conj", "resolve_conj", "resolve_neg", "positive", "real")),
    Op("conj_physical", _one(torch.conj_physical)),
    Op("pos", _one(operator.pos)),
    Op("masked_fill", lambda x, y, z: x.masked_fill(x < y, 0.3)),
    Op("masked_fill", lambda x, y, z: torch.masked_fill(x, mask=x < y, value=0.3), form="named"),
    Op("add", lambda x, y, z: torch.add(input=x, other=y), form="named"),
    Op("pow", lambda x, y, z: torch.pow(input=x, exponent=2.0), form="named"),
    Op("where", lambda x, y, z: torch.where(condition=x < y, input=z, other=y), form="named"),
    Op("lerp", lambda x, y, z: torch.lerp(input=x, end=y, weight=0.1), form="named"),
    Op("addcmul", lambda x, y, z: torch.addcmul(x, tensor1=y, tensor2=z, value=0.3), form="named"),
    Op("sqrt", _one(torch.sqrt), 1, 1, "ATen's sqrt is not correctly rounded, ours is"),
    Op("rsqrt", _one(torch.rsqrt), 0, 0),
    *(Op(n, _one(getattr(torch, n)), 1, 1, _LIBM) for n in _NEAR.split()),
    Op("log10", _one(torch.log10), 2, 1, "ATen multiplies log by a constant"),
    *(Op(n, _one(getattr(torch, n)), 2, 1, _APART) for n in ("tanh", "erfc")),
    *(
        Op(n, _one(getattr(torch, n)), 2, 1, f"{_APART}; ATen overflows a little early", lambda x, y: ~(x.abs() > 88))
        for n in ("sinh", "cosh")
    ),
    Op(
        "erf",
        _one(torch.erf),
        1,
        1,
        f"{_LIBM}; below 1e-3 ATen's for half precision is off by up to 8",
        lambda x, y: ~(x.abs() <= 1e-3),
    ),
    Op("sigmoid", _one(torch.sigmoid), 2, 1, "1 / (1 + exp(-x)): three roundings each"),
    Op("softplus", _one(torch.nn.functional.softplus), 2, 1, _LIBM),
    Op("softplus", lambda x, y, z: torch.nn.functional.softplus(x, 2, threshold=3.0), 2, 1, _LIBM, form="numbers"),
    Op("hypot", _two(torch.hypot), 1, 1, _LIBM),
    Op("atan2", _two(torch.atan2), 1, 1, _LIBM),
    Op("fmod", _two(torch.fmod), 0, 0, _MODEST, _modest),
    Op("fmod", _number(torch.fmod), 0, 0, _MODEST, lambda x, y: _modest(x, torch.full_like(x, 0.3)), "number"),
    Op("remainder", _two(torch.remainder), 0, 0, _MODEST, _modest),
    Op(
        "remainder", _number(torch.remainder), 0, 0, _MODEST, lambda x, y: _modest(x, torch.full_like(x, 0.3)), "number"
    ),
    *(Op(n, _two(getattr(torch, n))) for n in ("logical_and", "logical_or", "logical_xor")),
    Op("bitwise_and", lambda x, y, z: torch.bitwise_and(x < y, y < z)),
    Op("bitwise_or", lambda x, y, z: torch.bitwise_or(x < y, y < z)),
    Op("bitwise_xor", lambda x, y, z: torch.bitwise_xor(x < y, y < z)),
    Op("bitwise_not", lambda x, y, z: torch.bitwise_not(x < y)),
    Op("bitwise_not", lambda x, y, z: ~(x < y), form="operator"),
    Op("max.other", lambda x, y, z: torch.max(x, y)),
    Op("clamp_min", _number(torch.clamp_min)),
    Op("clamp_max", _number(torch.clamp_max)),
    Op("clamp_min", _two(torch.clamp_min), form="tensor"),
    Op("clamp", lambda x, y, z: torch.clamp(x, -0.7, 0.3)),
    Op("clamp", lambda x, y, z: torch.clamp(x, max=0.3), form="max"),
    Op("clip", lambda x, y, z: torch.clip(x, y, z)),
    Op(
        "add",
        lambda x, y, z: torch.add(x, y, alpha=0.3),
        0,
        8,
        "the loop's tail has no FMA; cancellation",
        form="alpha",
    ),
    Op(
        "sub",
        lambda x, y, z: torch.sub(x, y, alpha=0.3),
        0,
        8,
        "the loop's tail has no FMA; cancellation",
        form="alpha",
    ),
    Op(
        "rsub",
        lambda x, y, z: torch.rsub(x, y, alpha=0.3),
        0,
        8,
        "the loop's tail has no FMA; cancellation",
        form="alpha",
    ),
    Op("rsub", lambda x, y, z: 1.0 - x, form="operator"),
    Op("div", lambda x, y, z: 1.0 / x, form="of a number"),
    Op("div", lambda x, y, z: torch.div(x, y, rounding_mode="trunc"), form="trunc"),
    Op("div", lambda x, y, z: torch.div(x, y, rounding_mode="floor"), 0, None, _MODEST, _modest, "floor"),
    Op("floor_divide", _two(torch.floor_divide), 0, None, _MODEST, _modest),
    Op("floordiv", _two(operator.floordiv), 0, None, _MODEST, _modest),
    Op("fma", lambda x, y, z: torch.ops.prims.fma(x, y, z), 0, 0),
    Op("addcmul", torch.addcmul),
    Op("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.3), form="value"),
    Op("addcdiv", torch.addcdiv),
    Op("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.3), form="value"),
    Op("lerp", lambda x, y, z: torch.lerp(x, y, 0.1)),
    Op("lerp", lambda x, y, z: torch.lerp(x, y, 0.9), form="high"),
    Op("lerp", torch.lerp, form="tensor"),
    Op("where", lambda x, y, z: torch.where(x < y, z, y)),
    Op("where", lambda x, y, z: torch.where(x < y, z, 0.5), form="number"),
    Op("where", lambda x, y, z: torch.where(x < y, 1.0, 0.5), form="numbers"),
    Op("pow", _two(torch.pow), 1, 1, _LIBM),
    *(Op("pow", (lambda x, y, z, e=e: torch.pow(x, e)), 0, 0, form=f"{e:g}") for e in (1.0, -1.0, 2.0, 0.0)),
    *(
        Op("pow", (lambda x, y, z, e=e: torch.pow(x, e)), 0, 1, "bfloat16 rounds every product in ATen", form=f"{e:g}")
        for e in (3.0, -2.0)
    ),
    Op("pow", lambda x, y, z: torch.pow(x, 0.5), 1, 1, "sqrt's", lambda x, y: x > -math.inf, "0.5"),
    Op("pow", lambda x, y, z: torch.pow(x, -0.5), 1, 1, "sqrt's", lambda x, y: x > 0, "-0.5"),
    *(Op("pow", (lambda x, y, z, e=e: torch.pow(x, e)), 1, 1, _LIBM, form=f"{e:g}") for e in (1.5, 4.0, 0.3)),
    Op("pow", lambda x, y, z: torch.pow(0.3, x), 1, 1, _LIBM, form="of a number"),
    Op("pow", lambda x, y, z: 0.3**x, 1, 1, _LIBM, form="operator"),
]
