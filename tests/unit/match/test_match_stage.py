"""Matching as a stage: what it is asked, how often and how fast it decides, its reasons, and its second opinion."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from typing import Any, TextIO

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.match import find
from npu_fuse_pass.match.algebra import Algebra
from npu_fuse_pass.match.find import match_formula, match_group
from npu_fuse_pass.match.known_kernels import KERNELS, KnownKernel
from npu_fuse_pass.match.result import Match, NoMatch
from npu_fuse_pass.match.verify import disagreement, relations
from tests.support.formulas import FORMULAS
from tests.support.graphs import fused
from tests.support.near_misses import NEAR_MISSES
from tests.support.spellings import STEPS, VALUES
from tests.support.spellings_more import SPELLINGS
from tests.support.training import another_hash_seed
from tests.unit.match.test_match import argument_values, leaf_values


def decisions() -> Any:
    return find._decide.cache_info()


def test_a_structure_is_decided_once() -> None:
    adam = next(s for s in SPELLINGS if s.name == "lerp")
    find._decide.cache_clear()
    first, second = adam.found("constants"), adam.found("constants")
    assert first.scalars is second.scalars and decisions().misses == 1
    captured, only = adam.group("constants")
    numbers = {i: leaf.value for i, leaf in enumerate(captured.leaves) if leaf.kind == "constant"}
    row = {s: numbers[i] for s, i in enumerate(only.members[0]) if i in numbers}
    decided = match_formula(only.formula, [row])
    assert isinstance(decided, Match) and decided.scalars is first.scalars
    other = {s: 0.03 if x == VALUES["lr"] else x for s, x in row.items()}
    assert match_formula(only.formula, [other, row]) is decided  # another learning rate, and several
    beta = {s: 0.8 if x == VALUES["b1"] else x for s, x in row.items()}
    assert isinstance(match_formula(only.formula, [beta]), NoMatch)  # 1 - beta1 did not change with it
    assert decisions().misses == 2


def test_the_first_of_the_table_that_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = next(s for s in SPELLINGS if s.name == "lerp")
    captured, only = adam.group("inputs")
    by_name = {k.name: k for k in KERNELS}
    chosen_from(monkeypatch, by_name["adam"], by_name["momentum"])
    found = match_group(only, captured.leaves)
    assert isinstance(found, Match) and found.kernel.name == "adam"
    given = argument_values(found, *leaf_values(captured, only, adam.arguments("inputs")))
    assert float(given["epsilon"]) == pytest.approx(VALUES["eps"] * (1 - VALUES["b2"] ** (STEPS + 1)) ** 0.5)
    assert found.readable(only.labels)["epsilon"] == "a8·sqrt(1 - beta2_power)"
    chosen_from(monkeypatch, by_name["momentum"])
    none = match_group(only, captured.leaves)
    assert isinstance(none, NoMatch) and "writes 3 tensors" in none.reason
    monkeypatch.undo()
    find._decide.cache_clear()


def chosen_from(monkeypatch: pytest.MonkeyPatch, *kernels: KnownKernel) -> None:
    monkeypatch.setattr(find, "KERNELS", kernels)
    find._decide.cache_clear()


def test_members_with_other_numbers() -> None:
    """Two parameter groups are one group here; what holds for the constants of one member only is no relation."""

    def step(second_weight: float) -> Any:
        def run(p: Any, g: Any, m: Any, q: Any, h: Any, n: Any) -> None:
            for param, grad, average, weight in ((p, g, m, 0.9), (q, h, n, 0.8)):
                average.mul_(weight).add_(grad)
                change = grad + (weight if weight == 0.9 else second_weight) * average
                param.sub_(0.1 * change)

        return run

    tensors = [torch.randn(3, dtype=torch.float64) for _ in range(6)]
    captured, (only,) = fused(step(0.8), *tensors)
    assert len(only.members) == 2
    found = match_group(only, captured.leaves)
    assert isinstance(found, Match) and found.kernel.name == "nesterov"
    captured, (only,) = fused(step(0.7), *tensors)
    assert isinstance(match_group(only, captured.leaves), NoMatch)


def test_why_not() -> None:
    """The reason names the kernel that comes nearest, what agrees, and what does not."""
    reasons = {s.name: s.found("inputs").reason for s in NEAR_MISSES}
    assert reasons["epsilon inside the root"] == "adamw: m, v as in the kernel, but var is different"
    assert "no power of beta1" in reasons["no bias correction"]
    assert "lr would be -" in reasons["update of the wrong sign"]
    assert "weight_decay would be" in reasons["decay without the learning rate"]
    assert "not defined everywhere" in reasons["decay without the learning rate"]
    assert reasons["corrections swapped"].startswith("adamw: lr would carry a bias correction")
    captured, (only,) = fused(lambda p, g: p.sub_(g), *(torch.tensor(x, dtype=torch.float64) for x in (1, 2)))
    assert match_group(only, captured.leaves).reason == "it writes 0-dim tensors only"  # type: ignore[union-attr]


def test_sums_are_no_scalars() -> None:
    """A gradient may be scaled by a sum; a kernel's number may not."""

    def clipped(p: Tensor, g: Tensor, m: Tensor) -> None:
        m.mul_(0.9).add_(g * (1 / (g.square().sum() + 1)))
        p.sub_(0.1 * m)

    def scaled(p: Tensor, g: Tensor, m: Tensor) -> None:
        m.mul_(0.9).add_(g)
        p.sub_(m / (g.square().sum() + 1))

    tensors = [torch.randn(3, dtype=torch.float64) for _ in range(3)]
    captured, (only,) = fused(clipped, *tensors)
    found = match_group(only, captured.leaves)
    assert isinstance(found, Match) and found.prepared == ["grad"]
    captured, (only,) = fused(scaled, *tensors)
    assert isinstance(match_group(only, captured.leaves), NoMatch)


def test_numbers_are_the_second_opinion() -> None:
    """A match with a wrong scalar, or the slots of two tensors exchanged, disagrees with random numbers."""
    adam = next(s for s in SPELLINGS if s.name == "lerp")
    found, (captured, only) = adam.found("inputs"), adam.group("inputs")
    leaves = {s: captured.leaves[i] for s, i in enumerate(only.members[0])}
    ones = {s: ("number", leaf.value) for s, leaf in leaves.items() if leaf.kind == "constant"}
    assert disagreement(only.formula, found, ones, ()) == ""
    scalars = {**found.scalars, "epsilon": found.scalars["lr"]}
    assert "about var" in disagreement(only.formula, dataclasses.replace(found, scalars=scalars), ones, ())
    outputs = {**found.outputs, "m": found.outputs["v"], "v": found.outputs["m"]}
    assert "numbers disagree" in disagreement(only.formula, dataclasses.replace(found, outputs=outputs), ones, ())


@given(formula=FORMULAS)
@settings(max_examples=150, deadline=None)
def test_random_formulas(formula: Formula) -> None:
    """Nothing raises, and what is matched has been checked with numbers."""
    found = match_formula(formula)
    assert "failed" not in getattr(found, "reason", "")
    assert isinstance(found, Match) or found.reason


def test_the_same_in_every_process() -> None:
    """Whatever the seed of hashes is."""
    here = io.StringIO()
    print_matches(here)
    code = "import sys\nfrom tests.unit.match.test_match_stage import print_matches\nprint_matches(sys.stdout)"
    environment = {**os.environ, "PYTHONHASHSEED": another_hash_seed()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == here.getvalue() and "'lr': " in done.stdout


def print_matches(file: TextIO) -> None:
    for s in SPELLINGS[::3] + NEAR_MISSES[::6]:
        f = s.found(s.modes[-1])
        print(f.readable(s.group(s.modes[-1])[1].labels) if isinstance(f, Match) else f, file=file)


def test_where_a_value_is_defined() -> None:
    """Divisions are by what a written value divides by, any number of times, or by a constant; by nothing else."""
    tensors = [torch.rand(3, dtype=torch.float64), *(torch.tensor(0.1 * i, dtype=torch.float64) for i in (1, 2))]
    _, (only,) = fused(lambda p, a, b: p.copy_(p / (a + 1) * b * 3 + b), *tensors)
    formula = only.formula
    (of_b,) = [s for s in formula.scalar_slots if only.labels[s] == "a2"]
    (of_a,) = [s for s in formula.scalar_slots if only.labels[s] == "a1"]
    three = next(s for s in formula.scalar_slots if only.labels[s] == "3")
    algebra = Algebra(formula, dict(relations([{three: 3.3}])))
    (target,) = [algebra.values[id(e)] for _, e in formula.writes]
    a, b, constant = (algebra.slots[s] for s in (of_a, of_b, three))
    divided = next(algebra.values[id(e)] for e in algebra.order if e.op == "div").d
    root = algebra.number(1)._make(divided, algebra.ring.one)
    for value in (1 / root, b / (root * root), b / (root * constant), b / constant, b * a):
        assert algebra.is_defined(value, [target])
    for value in (1 / b, 1 / (root * b), constant / a, 1 / (root + b)):
        assert not algebra.is_defined(value, [target])
    assert not algebra.is_defined(1 / root, [])


def test_a_number_under_a_root() -> None:
    """The root of a scalar that has a number as its factor: a square is taken out, any other number stays inside."""
    tensors = [torch.rand(3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)]
    _, (only,) = fused(lambda p, a: p.copy_(p * a), *tensors)
    algebra = Algebra(only.formula, {})
    a = algebra.slots[next(iter(only.formula.scalar_slots))]
    assert (a * 4).sqrt().equals(a.sqrt() * 2)
    assert not (a * 3).sqrt().equals(a.sqrt() * 3)
