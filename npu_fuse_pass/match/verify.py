"""Numerical checks of a match: relations between constants, and agreement on random values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.ir.expr import Expr, rebuilt
from npu_fuse_pass.ir.fused_op import evaluate
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.match.result import Match

Relation = tuple[str, float]
"""The value of a constant scalar slot: ("number", value); (one of `RELATIONS`, another slot); ("free", x): any in that
of the ranges (-inf, -1), (-1, 0), (0, 1) and (1, inf) in which x lies, or anything at all where x is 0.
"""
RELATIONS: dict[str, Callable[[Any], Any]] = {
    "same": lambda x: x,
    "rest": lambda x: 1 - x,
    "minus": lambda x: -x,
    "minus rest": lambda x: x - 1,
}

_DRAWS = 6
_ELEMENTS = 8
_CLOSE = 1e-9  # float64, values of size one, some cancellation


def relations(constants: Sequence[Mapping[int, float]]) -> tuple[tuple[int, Relation], ...]:
    """Relations between constants: 0.001 is 1 - 0.999, one factor may be minus another one."""
    found: dict[int, Relation] = {}
    columns = {s: [row[s] for row in constants] for s in sorted(constants[0])} if constants else {}
    for slot, values in columns.items():
        found[slot] = _relation(values, {s: columns[s] for s in found if found[s][0] == "free"})
    return tuple(found.items())


def _relation(values: list[float], others: Mapping[int, list[float]]) -> Relation:
    first = values[0]
    if set(values) == {first} and abs(first) <= 4 and (2 * first).is_integer():
        return "number", first
    for slot, known in others.items():
        for how, relation in RELATIONS.items():
            other = [relation(y) for y in known]
            if all(math.isclose(x, y, rel_tol=1e-13) for x, y in zip(values, other, strict=True)):
                return how, slot
    one_range = len({(v > 0, abs(v) > 1) for v in values}) == 1
    return "free", math.copysign(0.5 + (abs(first) > 1), first) if one_range else 0.0


def disagreement(formula: Formula, match: Match, relations: Mapping[int, Relation], compared: Collection[int]) -> str:
    """Compare kernel and formula on random values, in float64 without roundings between.

    Args:
        compared: scalar slots that the formula compares with something; they are zero in one of the draws.

    Returns:
        Why the match is wrong; "" if it is right.
    """
    generator = torch.Generator().manual_seed(0)
    names = [*match.inputs, *match.scalars]
    made: dict[int, Expr] = {}
    wanted = {name: _widened(dict(formula.writes)[slot], made) for name, slot in match.outputs.items()}
    given = {name: _widened(e, made) for name, e in {**match.inputs, **match.scalars}.items()}
    whole = Formula(match.slots, (), (*wanted.values(), *given.values()), "")
    for draw in range(_DRAWS):
        scalars = _scalars(match, relations, generator)
        if draw == 0:
            scalars.update(
                (s, torch.zeros((), dtype=torch.float64, device="cpu")) for s in compared if s not in relations
            )
        found = evaluate(whole, _tensors(match, generator), scalars)
        arguments = {name: found[id(given[name])] for name in names}
        for name in match.kernel.scalars:
            if not bool(arguments[name] >= 0):
                return f"{name} would be {float(arguments[name]):g} for some values of the formula's scalars"
        tensors = [arguments[name] for name in match.kernel.inputs]
        results = match.kernel.function(*tensors, **{name: arguments[name] for name in match.kernel.scalars})
        for name, result in zip(match.kernel.outputs, results, strict=True):
            want = found[id(wanted[name])]
            error = (result - want).abs() / want.abs().clamp(min=1)
            if not bool((error <= _CLOSE).all()):
                return f"random numbers disagree about {name} by {float(error.max()):.2g}"
    return ""


def _tensors(match: Match, generator: torch.Generator) -> dict[int, Tensor]:
    """Values around zero; means of squares between 1 and 2."""
    tensors = {}
    squares = [slot for name, slot in match.outputs.items() if name in match.kernel.nonnegative]
    for slot, kind in enumerate(match.slots):
        if kind.tensor:
            drawn = torch.rand(_ELEMENTS, dtype=torch.float64, generator=generator, device="cpu")
            tensors[slot] = drawn + 1 if slot in squares else 2 * drawn - 1
    return tensors


def _scalars(match: Match, relations: Mapping[int, Relation], generator: torch.Generator) -> dict[int, Tensor]:
    """Values in (0.1, 0.9), constants in their range and with their relations."""
    scalars: dict[int, Tensor] = {}
    for slot, kind in enumerate(match.slots):
        if kind.tensor:
            continue
        drawn = 0.1 + 0.8 * torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
        how, value = relations.get(slot, ("free", 0.5))
        if slot in match.constants or how == "number":
            drawn = torch.tensor(match.constants.get(slot, value), dtype=torch.float64, device="cpu")
        elif how in RELATIONS:
            drawn = RELATIONS[how](scalars[int(value)])
        elif value:
            drawn = (drawn + (abs(value) > 1)) * (1 if value > 0 else -1)
        scalars[slot] = drawn
    return scalars


def _widened(root: Expr, made: dict[int, Expr]) -> Expr:
    """A copy of an expression in float64, without casts. `made`: the copies so far, by the `id` of the original."""

    def copy(e: Expr, below: Sequence[Expr]) -> Expr:
        args = tuple(made[id(a)] for a in below)
        dtype = torch.bool if e.dtype == torch.bool else torch.float64
        if e.op != "cast" or dtype == torch.bool:
            return Expr(e.op, args, e.value, dtype, e.tensor)
        return Expr("cast", args, dtype, dtype, e.tensor) if below[0].dtype == torch.bool else args[0]

    return rebuilt(root, made, lambda e: e.args, copy)
