"""How far a right result may be from eager's: what small errors at every operation of a rule do to its results.

A rule is computed several times in float64, each time with random errors of a few units in the last place of the dtype
that each operation has in the eager step. How far these runs are from each other is how much the rule amplifies
rounding at this element: little in most places, all of it where a comparison is nearly a tie.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from tests.support.rules_ops import OPS
from tests.support.rules_programs import Exactly, Program, Statement, apply

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
RUNS = 8
ERROR = 4.0  # units that every operation may be off
MARGIN = 4.0  # how much farther than its runs are from each other a result may be from eager's

_EXACT = "neg abs sign floor ceil trunc round relu clone nan_to_num clamp clamp_min clamp_max s_clamp maximum minimum"
_EXACT += " fmax fmin copysign where where_s where_c s_where s_minimum zeros_like ones_like full_like max amax amin"
EXACT = {*_EXACT.split(), "norm_inf", "mul_mask"}
# more than one rounding, or float32 numbers and sums in eager that the scalar part of a kernel has in float64
_INSIDE = "add_alpha sub_alpha lerp_low lerp_high addcmul addcdiv sum mean norm norm_1 s_pow c_pow sigmoid"
INSIDE = set(_INSIDE.split())


def settled(examples: int) -> settings:
    """The same examples at every run. A smaller seed makes no smaller rule: nothing is shrunk."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class Errors:
    """Random relative errors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def on(self, x: Any, dtype: torch.dtype) -> Any:
        """A number or tensor in float64, off by up to ERROR units of a dtype; masks stay."""
        if isinstance(x, Tensor) and x.dtype == torch.bool:
            return x
        wide = x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
        error = torch.rand(wide.shape, dtype=torch.float64, generator=self.generator) * 2 - 1
        changed = wide * (1 + ERROR * UNIT[dtype] * error)
        return changed if isinstance(x, Tensor) else float(changed)


class Noisy(Exactly):
    """Computes in float64, with errors of the dtypes that the statements have."""

    def __init__(self, dtypes: Sequence[torch.dtype], seed: int) -> None:
        self.dtypes = dtypes
        self.errors = Errors(seed)

    def call(self, number: int, statement: Statement, args: Sequence[Any]) -> Any:
        op, dtype = OPS[statement.op], self.dtypes[number]
        if dtype == torch.bool:
            return op.call(args)
        if op.name in INSIDE or (op.gives == "s" and op.name not in EXACT):
            args = [self.errors.on(a, dtype) for a in args]
        made = op.call(args)
        rounds_numbers = "c" in op.kinds and made.ndim == 0  # eagerly; scalars of a kernel have theirs in float64
        if op.name in EXACT and not statement.role and not rounds_numbers:
            return made.double()
        return self.errors.on(made, dtype)


class _Dtypes(Exactly):
    """Notes the dtype of every statement."""

    def __init__(self) -> None:
        self.found: list[torch.dtype] = []

    def call(self, number: int, statement: Statement, args: Sequence[Any]) -> Any:
        made = super().call(number, statement, args)
        made = made.to(args[0].dtype) if statement.role else made
        self.found.append(made.dtype)
        return made


def runs(
    program: Program,
    constants: Sequence[float],
    roles: Mapping[str, Tensor],
    seed: int,
    rounded: Mapping[str, torch.dtype] = types.MappingProxyType({}),
) -> dict[str, Tensor]:
    """Every role after the rule, of RUNS computations with errors (stacked).

    "t" has been counted in `roles`; `rounded` are roles that have errors of a dtype already.
    """
    dtypes = _Dtypes()
    apply(program, constants, roles, dtypes)
    made = []
    for k in range(RUNS):
        how = Noisy(dtypes.found, 100 * seed + k)
        wide = {role: how.errors.on(x, rounded[role]) if role in rounded else x.double() for role, x in roles.items()}
        made.append(apply(program, constants, wide, how))
    return {role: torch.stack([m[role] for m in made]) for role in roles}


def tolerance(stored: torch.dtype, several: Tensor) -> Tensor:
    """How far a value may be from eager's, of its runs: infinite where they disagree about being finite."""
    spread = several.amax(0) - several.amin(0)
    limit = MARGIN * (spread + UNIT[stored] * several.abs().amax(0))
    mixed = several.isfinite().any(0) & ~several.isfinite().all(0)
    return torch.where(mixed, torch.inf, limit.nan_to_num(0.0, 0.0))  # all infinite or NaN: equal


def assert_within(got: Sequence[Tensor], wanted: Sequence[Tensor], limits: Sequence[Tensor], about: Any) -> None:
    """Every element of every tensor is as near as its limit; NaN and infinities are where they should be."""
    for i, (a, b, limit) in enumerate(zip(got, wanted, limits, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = a.double(), b.double()
        near = ((a - b).abs() <= limit) | (a == b) | (a.isnan() & b.isnan()) | limit.isinf()
        assert bool(near.all()), f"tensor {i}\n{a}\n{b}\nlimits {limit}\n{about!r}"


def narrow(limits: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[int, int]:
    """How many limits are below a thousand units of what is stored, and how many there are."""
    small = [limit <= 1000 * UNIT[w.dtype] * (1 + w.double().abs()) for limit, w in zip(limits, wanted, strict=True)]
    return sum(int(s.sum()) for s in small), sum(s.numel() for s in small)
