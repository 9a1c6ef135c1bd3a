"""Random update rules written with `npu_fuse_pass.rule`, with a sum over all parameters: fused as they are eagerly."""

from __future__ import annotations

import collections
import inspect
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from npu_fuse_pass import Init, rule, total
from tests.support.graphs import PROGRAMS, captured_step, step_with, with_groups
from tests.support.rules_noise import RUNS, UNIT, Errors, Noisy, assert_within, narrow, settled, tolerance
from tests.support.rules_programs import Exactly, Program, apply
from tests.support.rules_strategy import programs
from tests.support.training import FULL, compiled, last_report

SHAPES = [(5,), (3, 4), (2, 3, 4), (), (5,)]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16]
RATES = (0.1, 0.25)
START = 0.5


def states_of(program: Program) -> list[str]:
    return [role for role, _ in program.dtypes if role.startswith("m")]


def new_values(
    program: Program,
    constants: Sequence[float],
    tensors: Sequence[Tensor],
    lr: Any,
    step: Any,
    squares: Any,
    how: Exactly | None = None,
) -> tuple[Tensor, ...]:
    """One update of one parameter: (param, *states)."""
    names = ["p", "g", *states_of(program)]
    roles = dict(zip(names, tensors, strict=True)) | {"lr": lr, "total": 1 / (1 + squares)}
    if "t" in dict(program.dtypes):
        roles["t"] = step
    made = apply(program, constants, roles, how)
    return tuple(made[name] for name in ["p", *names[2:]])


def rule_of(program: Program, constants: Sequence[float]) -> Any:
    """The program as a rule, with the signature that it would have if it had been written by hand."""

    def random_rule(*tensors: Tensor, lr: Tensor, step: Tensor, squares: Tensor) -> tuple[Tensor, ...]:
        return new_values(program, constants, tensors, lr, step, squares)

    kinds = inspect.Parameter
    named = [kinds(n, kinds.POSITIONAL_OR_KEYWORD) for n in ("param", "grad", *states_of(program))]
    named += [kinds(n, kinds.KEYWORD_ONLY) for n in ("lr", "step", "squares")]
    random_rule.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return rule(
        states={name: Init(START) for name in states_of(program)},
        defaults={"lr": RATES[0]},
        totals={"squares": total(lambda grad: (grad.double() * grad.double()).sum())},
    )(random_rule)


def setting(seed: int) -> tuple[list[torch.nn.Parameter], list[list[Tensor]]]:
    """Parameters of several dtypes, and their gradients at two steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2).to(dtype)

    kinds = list(zip([*SHAPES, (3,)], DTYPES, strict=True))
    params = [torch.nn.Parameter(draw(*kind)) for kind in kinds]
    return params, [[draw(*kind) for kind in kinds] for _ in range(2)]


def optimizer(made: Any, params: Sequence[Any]) -> Any:
    """Two groups with rates of their own."""
    return made([dict(params=list(params[::2]), lr=RATES[0]), dict(params=list(params[1::2]), lr=RATES[1])])


def run(params: Sequence[Any], grads: Sequence[Sequence[Tensor]], step: Callable[[], Any]) -> None:
    for several in grads:
        for p, g in zip(params, several, strict=True):
            p.grad = g.clone()
        step()


def fused_step(opt: Any, how: str, found: list[Any]) -> Callable[[], None]:
    """The stages by themselves, without Dynamo; captured at the first step, as a compiled one is."""
    made: list[Any] = []

    def step() -> None:
        if not made:
            captured, groups = with_groups(captured_step(opt))
            found.append({g.formula.text: len(g.members) for g in groups})
            made.append(PROGRAMS[how](captured.leaves, groups))
        step_with(opt, made[0])

    return step


def limits_of(program: Program, constants: Sequence[float], seed: int) -> list[Tensor]:
    """How far every parameter may be from eager's: from float64 runs with errors."""
    params, grads = setting(seed)
    ends: list[list[Tensor]] = []
    for k in range(RUNS):
        current = [
            (p.detach().double(), *(torch.full_like(p, START).double() for _ in states_of(program))) for p in params
        ]
        for t, several in enumerate(grads):
            squares = sum((g.double() ** 2).sum() for g in several)
            for i, g in enumerate(several):
                stored = params[i].dtype
                work = torch.float64 if stored == torch.float64 else torch.float32
                how = Noisy([work] * len(program.statements), 100 * k + 10 * t + i)
                lr, step = (torch.tensor(x, dtype=torch.float64) for x in (RATES[i % 2], t + 1.0))
                x, *states = current[i]
                made = new_values(program, constants, (x, g.double(), *states), lr, step, squares, how)
                last = Errors(1000 * k + i)
                current[i] = tuple(last.on(x, stored) for x in made)
        ends.append([c[0] for c in current])
    return [tolerance(p.dtype, torch.stack(several)) for p, *several in zip(params, *ends, strict=True)]


@pytest.mark.slow
def test_random_rules() -> None:
    """One group for each dtype, whatever the shapes and groups, in any order; values as eagerly."""
    counts: collections.Counter[str] = collections.Counter()
    lengths = []

    @settled(400 if FULL else 20)
    @given(programs())
    def check(drawn: tuple[Program, tuple[float, ...]]) -> None:
        program, constants = drawn
        made, seed = rule_of(program, constants), len(program.statements)
        (wanted, grads), (got, _), (turned, _) = (setting(seed) for _ in range(3))
        run(wanted, grads, optimizer(made, wanted).step)
        found: list[Any] = []
        run(got, grads, fused_step(optimizer(made, got), "interpreter", found))
        limits = limits_of(program, constants, seed)
        assert_within([p.detach() for p in got], [p.detach() for p in wanted], limits, program)
        lengths.append(len(program.operations))
        near, elements = narrow(limits, [p.detach() for p in wanted])
        counts.update(rules=1, narrow=near, elements=elements)
        counts["exact"] += len(found[0]) == len(set(DTYPES))
        other: list[Any] = []
        run(
            turned[::-1],
            [several[::-1] for several in grads[:1]],
            fused_step(optimizer(made, turned[::-1]), "interpreter", other),
        )
        assert other[0] == found[0]

    check()
    print(dict(counts), "median operations:", statistics.median(lengths))
    assert counts["exact"] >= 0.95 * counts["rules"] and counts["narrow"] >= 0.9 * counts["elements"], counts


@pytest.mark.slow
def test_random_rules_through_torch_compile() -> None:
    @settled(40 if FULL else 5)
    @given(programs())
    def check(drawn: tuple[Program, tuple[float, ...]]) -> None:
        program, constants = drawn
        made, seed = rule_of(program, constants), len(program.statements)
        (wanted, grads), (got, _) = (setting(seed) for _ in range(2))
        run(wanted, grads, optimizer(made, wanted).step)
        step = compiled(optimizer(made, got))
        run(got, grads, step)
        step.check(len(got))
        assert len(last_report().groups) == len(set(DTYPES))
        limits = limits_of(program, constants, seed)
        assert_within([p.detach() for p in got], [p.detach() for p in wanted], limits, program)

    check()


def test_units_are_known() -> None:
    assert set(DTYPES) <= UNIT.keys()
