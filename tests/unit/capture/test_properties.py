"""Random steps, as ordinary code for each parameter: fused into as many groups as there are rules, equal to eager."""

from __future__ import annotations

import collections
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.passes.group import group
from tests.support.graphs import run, traced, with_groups
from tests.support.rules_noise import UNIT, assert_within, narrow, runs, settled, tolerance
from tests.support.rules_programs import Problem
from tests.support.rules_strategy import problems
from tests.support.training import FULL


class Counts:
    """What the random steps were."""

    def __init__(self) -> None:
        self.steps = self.exact = self.narrow = self.elements = 0
        self.lengths: list[int] = []
        self.operations: collections.Counter[str] = collections.Counter()
        self.reasons: list[str] = []
        self.totals = 0

    def note(self, problem: Problem, groups: int, reasons: Sequence[str]) -> None:
        expected = groups == problem.groups()
        self.steps += 1
        self.exact += expected and not reasons
        self.totals += bool(problem.total)
        self.reasons += reasons or ([] if expected else [f"{groups} groups, not {problem.groups()}"])
        for family in problem.families:
            self.lengths.append(len(family.program.operations))
            self.operations.update(set(family.program.operations))

    def compare(self, problem: Problem, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """What a step gave is what it gives eagerly."""
        limits = limits_of(problem)
        assert_within(got, wanted, limits, problem)
        near, elements = narrow(limits, wanted)
        self.narrow += near
        self.elements += elements

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {len(self.lengths)} rules, {self.totals} with sums over all gradients; "
            f"{self.exact} fused into exactly their groups; "
            f"{statistics.median(self.lengths)} operations in the median rule, {len(self.operations)} different ones; "
            f"{self.narrow} of {self.elements} elements within 1000 units; otherwise: {self.reasons}"
        )

    def check(self, everything: bool) -> None:
        """`everything`: there are enough of them to say what they are made of."""
        print(self)
        assert self.exact >= 0.95 * self.steps, self
        assert self.narrow >= 0.9 * self.elements, self
        if everything:
            assert statistics.median(self.lengths) >= 12 and len(self.operations) >= 40, self
            assert self.totals >= 0.1 * self.steps, self


def limits_of(problem: Problem) -> list[Tensor]:
    """Of `problem.tensors()`: how far each may be from eager's after the step. "lr" and "n" are exact."""
    counted = torch.tensor(float(problem.counter), dtype=torch.float64)
    coarsest = max((m.program.dtypes[1][1] for m in problem.members), key=UNIT.__getitem__)  # of the gradients
    found = [torch.zeros(()), torch.zeros(())]
    for i, (member, env) in enumerate(zip(problem.members, problem.environments(problem.tensors()), strict=True)):
        env = {role: x + 1 if role == "t" else x + counted if role == "n" else x for role, x in env.items()}
        several = runs(member.program, member.constants, env, problem.seed + i, {"total": coarsest})
        found += [tolerance(dtype, several[role]) for role, dtype in member.program.dtypes]
    return found


def shuffled(problem: Problem) -> dict[str, int]:
    """The groups of the same step with its parameters, and its arguments, in another order."""
    chance = random.Random(problem.seed)
    order = chance.sample(range(len(problem.members)), len(problem.members))
    tensors = problem.tensors()
    places = chance.sample(range(len(tensors)), len(tensors))
    step = problem.step(order)

    def other(*arguments: Any) -> None:
        step(*(arguments[places.index(i)] for i in range(len(places))))

    captured = capture(traced(other, *(tensors[place] for place in places)))
    return {g.formula.text: len(g.members) for g in group(captured).groups}


def check_stages(problem: Problem, how: str, counts: Counts) -> None:
    """The stages by themselves, without Dynamo."""
    tensors = problem.tensors()
    wanted, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
    problem.step()(*wanted)
    graph = traced(problem.step(), *tensors)
    captured = capture(graph)
    captured, groups = with_groups(captured)
    counts.note(problem, len(groups), [f"{u.op}: {u.text}" for u in captured.unfused])
    if captured.unfused:
        npu_fuse_pass.npu_fused(graph, got)(*got)
    else:
        run(captured, groups, got, how)
    counts.compare(problem, got, wanted)
    assert shuffled(problem) == {g.formula.text: len(g.members) for g in groups}, problem


@pytest.mark.slow
@pytest.mark.parametrize(("how", "examples"), [("interpreter", 2000 if FULL else 200), ("kernel", 200 if FULL else 25)])
def test_random_steps(how: str, examples: int) -> None:
    counts = Counts()

    @settled(examples)
    @given(problems())
    def check(problem: Problem) -> None:
        check_stages(problem, how, counts)

    check()
    counts.check(everything=how == "interpreter")


@pytest.mark.slow
def test_random_steps_through_torch_compile() -> None:
    counts = Counts()

    @settled(60 if FULL else 6)
    @given(problems())
    def check(problem: Problem) -> None:
        torch._dynamo.reset()
        npu_fuse_pass.clear_reports()
        tensors = problem.tensors()
        wanted, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
        problem.step()(*wanted)
        torch.compile(problem.step(), backend="npu_fused", fullgraph=True)(*got)
        (report,) = npu_fuse_pass.reports()
        assert report.fallback is None, report
        counts.note(problem, len(report.groups), [f"{u.op}: {u.text}" for u in report.unfused])
        counts.compare(problem, got, wanted)

    check()
    counts.check(everything=False)


def test_units_are_those_of_the_dtypes() -> None:
    assert all(unit == torch.finfo(dtype).eps / 2 for dtype, unit in UNIT.items())
