"""The operations that random update rules are made of: what they take, where they are smooth, and their forms."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
Interval = tuple[float, float]
ANY: Interval = (-50.0, 50.0)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Args:
        kinds: of its arguments: "t" a tensor, "s" a 0-dim tensor, "b" a mask, "c" a number.
        gives: the kind of its result.
        domains: where each argument has to lie ("b" has none).
        torch: its name in torch, where it has an in-place or foreach form under that name.
        keyword: how its number is passed.
    """

    name: str
    kinds: str
    function: Callable[..., Any]
    domains: tuple[Interval, ...]
    gives: str = "t"
    torch: str = ""
    keyword: str = ""
    same_dtype: bool = False

    def call(self, args: Sequence[Any]) -> Any:
        return self.function(*args)

    def in_place(self, args: Sequence[Any]) -> Any:
        positional, keywords = self._split(args)
        return getattr(positional[0], self.torch + "_")(*positional[1:], **keywords)

    @property
    def has_foreach(self) -> bool:
        return bool(self.torch) and hasattr(torch, f"_foreach_{self.torch}_") and "b" not in self.kinds

    def foreach(self, args: Sequence[Any], in_place: bool = False) -> Any:
        positional, keywords = self._split(args)
        return getattr(torch, f"_foreach_{self.torch}{'_' if in_place else ''}")(*positional, **keywords)

    def _split(self, args: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        if not self.keyword:
            return list(args), {}
        return list(args[:-1]), {self.keyword: args[-1]}

    def interval(self, intervals: Sequence[Interval | None]) -> Interval:
        """Where its result lies, by its values on a grid (it is bounded there, and monotone or nearly so)."""
        if self.gives == "b":
            return 0.0, 1.0
        if self.name in _RANGES:
            return _RANGES[self.name](intervals[0])
        numbers = [_ends(i, 3) if k == "c" else [None] for k, i in zip(self.kinds, intervals, strict=True)]
        axes = [_grid(i, k) for k, i in zip(self.kinds, intervals, strict=True) if k != "c"]
        low, high = math.inf, -math.inf
        for chosen in itertools.product(*numbers):
            mesh = iter(torch.meshgrid(*axes, indexing="ij"))
            given = [next(mesh) if c is None else c for c in chosen]
            values = self.function(*(x.bool() if k == "b" else x for k, x in zip(self.kinds, given, strict=True)))
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        return low - 1e-6, high + 1e-6


def _ends(interval: Interval, n: int) -> list[float]:
    return [interval[0] + (interval[1] - interval[0]) * k / (n - 1) for k in range(n)]


def _grid(interval: Interval | None, kind: str) -> torch.Tensor:
    return torch.tensor([0.0, 1.0] if kind == "b" else _ends(interval, 9), dtype=torch.float64)


MOST = 48  # elements of a tensor

_RANGES: dict[str, Callable[[Interval], Interval]] = {
    "sum": lambda i: (min(0, MOST * i[0]), max(0, MOST * i[1])),
    "norm": lambda i: (0.0, math.sqrt(MOST) * max(map(abs, i))),
    "norm_1": lambda i: (0.0, MOST * max(map(abs, i))),
    "norm_inf": lambda i: (0.0, max(map(abs, i))),
    "mean_of_mask": lambda i: (0.0, 1.0),
    **dict.fromkeys(("mean", "amax", "amin", "max"), lambda i: i),
    **dict.fromkeys(("copysign", "atan2", "hypot"), lambda i: (-75.0, 75.0)),
    **dict.fromkeys(("fmod", "remainder"), lambda i: (-50.0, 50.0)),
    "zeros_like": lambda i: (0.0, 0.0),
    "ones_like": lambda i: (1.0, 1.0),
}

POSITIVE: Interval = (0.1, 50.0)
SMALL: Interval = (-4.0, 3.0)
NUMBER: Interval = (-2.0, 2.0)
AWAY: Interval = (0.2, 2.0)


def _unary(domain: Interval, *names: str) -> list[Op]:
    return [Op(n, "t", getattr(torch, n), (domain,), torch=n) for n in names]


def _scalar(op: str, kinds: str, function: Callable[..., Any], *domains: Interval) -> Op:
    return Op(op, kinds, function, domains, gives="s")


_ALL = [
    *_unary(ANY, "neg", "abs", "sign", "sigmoid", "tanh", "sin", "cos", "atan", "erf", "erfc", "asinh"),
    *_unary(ANY, "floor", "ceil", "trunc", "round", "square", "relu", "nan_to_num", "clone"),
    *_unary(SMALL, "exp", "exp2", "expm1", "sinh", "cosh"),
    *_unary(POSITIVE, "log", "log2", "log10", "sqrt", "rsqrt", "reciprocal"),
    *_unary((-0.9, 50.0), "log1p"),
    *_unary((-0.95, 0.95), "asin", "acos", "atanh"),
    *_unary((-1.2, 1.2), "tan"),
    *_unary((1.05, 50.0), "acosh"),
    # two tensors
    Op("add", "tt", torch.add, (ANY, ANY), torch="add"),
    Op("sub", "tt", torch.sub, (ANY, ANY), torch="sub"),
    Op("mul", "tt", torch.mul, ((-7.0, 7.0), (-7.0, 7.0)), torch="mul"),
    Op("div", "tt", torch.div, ((-9.0, 9.0), POSITIVE), torch="div"),
    Op("maximum", "tt", torch.maximum, (ANY, ANY), torch="maximum"),
    Op("minimum", "tt", torch.minimum, (ANY, ANY), torch="minimum"),
    *(Op(n, "tt", getattr(torch, n), (ANY, ANY)) for n in ("fmax", "fmin", "copysign", "hypot")),
    Op("atan2", "tt", torch.atan2, (ANY, POSITIVE)),
    *(Op(n, "tt", getattr(torch, n), (ANY, (0.2, 50.0)), torch=n) for n in ("fmod", "remainder")),
    Op("floor_divide", "tt", torch.floor_divide, ((-9.0, 9.0), (0.2, 50.0))),
    Op("pow", "tt", torch.pow, ((0.1, 4.0), (-2.0, 2.0)), torch="pow"),
    Op(
        "add_alpha",
        "ttc",
        lambda x, y, c: torch.add(x, y, alpha=c),
        (ANY, ANY, (0.2, 0.9)),
        torch="add",
        keyword="alpha",
    ),
    Op(
        "sub_alpha",
        "ttc",
        lambda x, y, c: torch.sub(x, y, alpha=c),
        (ANY, ANY, (0.2, 0.9)),
        torch="sub",
        keyword="alpha",
    ),
    Op("lerp_low", "ttc", torch.lerp, (ANY, ANY, (0.05, 0.45)), torch="lerp", same_dtype=True),
    Op("lerp_high", "ttc", torch.lerp, (ANY, ANY, (0.55, 0.95)), torch="lerp", same_dtype=True),
    Op(
        "addcmul",
        "tttc",
        lambda x, y, z, c: torch.addcmul(x, y, z, value=c),
        (ANY, (-7.0, 7.0), (-7.0, 7.0), (0.1, 0.9)),
        torch="addcmul",
        keyword="value",
    ),
    Op(
        "addcdiv",
        "tttc",
        lambda x, y, z, c: torch.addcdiv(x, y, z, value=c),
        (ANY, (-4.0, 4.0), POSITIVE, (0.1, 0.9)),
        torch="addcdiv",
        keyword="value",
    ),
    # a tensor and a number
    Op("add_c", "tc", torch.add, (ANY, NUMBER), torch="add"),
    Op("rsub_c", "ct", lambda c, x: c - x, (NUMBER, ANY)),
    Op("mul_c", "tc", torch.mul, ((-25.0, 25.0), NUMBER), torch="mul"),
    Op("div_c", "tc", torch.div, ((-9.0, 9.0), AWAY), torch="div"),
    Op("rdiv_c", "ct", lambda c, x: c / x, (NUMBER, POSITIVE)),
    Op("pow_c", "tc", torch.pow, ((0.1, 9.0), (1.2, 1.8)), torch="pow"),
    Op("c_pow", "ct", torch.pow, ((0.3, 0.99), SMALL)),
    Op("power_2", "t", lambda x: x**2, ((-7.0, 7.0),)),
    Op("power_half", "t", lambda x: x**0.5, (POSITIVE,)),
    Op("clamp", "tcc", torch.clamp, (ANY, (-2.0, -1.0), (1.0, 2.0))),
    Op("clamp_min", "tc", torch.clamp_min, (ANY, NUMBER), torch="clamp_min"),
    Op("clamp_max", "tc", torch.clamp_max, (ANY, NUMBER), torch="clamp_max"),
    Op("full_like", "tc", torch.full_like, (ANY, NUMBER)),
    Op("zeros_like", "t", torch.zeros_like, (ANY,)),
    Op("ones_like", "t", torch.ones_like, (ANY,)),
    # a tensor and a 0-dim tensor
    Op("add_s", "ts", torch.add, (ANY, ANY)),
    Op("mul_s", "ts", torch.mul, ((-7.0, 7.0), (-7.0, 7.0)), torch="mul"),
    Op("rsub_s", "st", lambda s, x: s - x, (ANY, ANY)),
    Op("div_s", "ts", torch.div, ((-9.0, 9.0), POSITIVE), torch="div"),
    Op("rdiv_s", "st", lambda s, x: s / x, ((-9.0, 9.0), POSITIVE)),
    Op("s_pow", "st", torch.pow, ((0.3, 0.99), SMALL)),
    Op("where_s", "bts", torch.where, (ANY, ANY, ANY)),
    # masks
    *(Op(n, "tt", getattr(torch, n), (ANY, ANY), gives="b") for n in ("lt", "le", "gt", "ge", "eq", "ne")),
    *(Op(f"{n}_c", "tc", getattr(torch, n), (ANY, NUMBER), gives="b") for n in ("lt", "gt")),
    *(Op(n, "t", getattr(torch, n), (ANY,), gives="b") for n in ("isnan", "isfinite", "isinf")),
    *(Op(f"logical_{n}", "bb", getattr(torch, f"logical_{n}"), (ANY, ANY), gives="b") for n in ("and", "or", "xor")),
    Op("invert", "b", lambda x: ~x, (ANY,), gives="b"),
    Op("where", "btt", torch.where, (ANY, ANY, ANY)),
    Op("where_c", "btc", torch.where, (ANY, ANY, NUMBER)),
    Op("mul_mask", "tb", torch.mul, (ANY, ANY)),
    # reductions
    _scalar("sum", "t", torch.sum, (-4.0, 4.0)),
    _scalar("mean", "t", torch.mean, ANY),
    _scalar("amax", "t", torch.amax, ANY),
    _scalar("amin", "t", torch.amin, ANY),
    _scalar("max", "t", torch.max, ANY),
    Op("norm", "t", torch.linalg.vector_norm, (ANY,), gives="s"),
    _scalar("norm_1", "t", lambda x: torch.linalg.vector_norm(x, 1), (-4.0, 4.0)),
    _scalar("norm_inf", "t", lambda x: x.norm(math.inf), ANY),
    _scalar("mean_of_mask", "b", lambda b: b.to(torch.float64).mean(), ANY),
    # 0-dim tensors
    _scalar("s_add", "ss", torch.add, ANY, ANY),
    _scalar("s_mul", "ss", torch.mul, (-7.0, 7.0), (-7.0, 7.0)),
    _scalar("s_div", "ss", torch.div, (-9.0, 9.0), POSITIVE),
    _scalar("s_sqrt", "s", torch.sqrt, POSITIVE),
    _scalar("s_exp", "s", torch.exp, SMALL),
    _scalar("s_log1p", "s", torch.log1p, (-0.9, 50.0)),
    _scalar("s_rsub", "cs", lambda c, s: c - s, NUMBER, ANY),
    _scalar("s_rdiv", "cs", lambda c, s: c / s, NUMBER, POSITIVE),
    _scalar("c_pow_s", "cs", lambda c, s: c**s, (0.3, 0.99), (0.0, 50.0)),
    _scalar("s_clamp", "scc", torch.clamp, ANY, (-2.0, -1.0), (1.0, 2.0)),
    _scalar("s_where", "ssc", lambda x, y, c: torch.where(x > y, x, c), ANY, ANY, NUMBER),
    _scalar("s_minimum", "ss", torch.minimum, ANY, ANY),
]
OPS: dict[str, Op] = {op.name: op for op in _ALL}
OPS["copy"] = Op("copy", "tt", lambda old, new: new, (ANY, ANY), torch="copy")  # only as a write
CASTS: dict[str, torch.dtype] = {"to_double": torch.float64, "to_float": torch.float32}
OPS |= {n: Op(n, "t", lambda x, d=d: x.to(d), (ANY,)) for n, d in CASTS.items()}
NO_HALF = {"floor_divide"}  # refused in half precision, with a reason
WRITES = ("copy", "add", "sub", "add_alpha", "mul_c", "lerp_low", "addcmul", "addcdiv", "mul_s", "clamp_min", "sqrt")
