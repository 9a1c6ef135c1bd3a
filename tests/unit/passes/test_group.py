"""Stage 2, group: the same computation is one group, whatever things are called and in whatever order they come."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.ir import expr, types
from npu_fuse_pass.ir import text as formula_text
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.rules import rule
from tests.support.formulas import FORMULAS
from tests.support.graphs import check, fused, traced
from tests.support.training import another_hash_seed, compiled, gradients, last_report, parameters, set_gradients

pytestmark = pytest.mark.usefixtures("same_numbers")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(FORMULAS)
def test_a_formula_survives_its_text(formula):
    """`parse` is the inverse of `serialise`."""
    again = formula_text.parse(formula.text)
    assert formula_text.serialise(again.slots, again.writes, again.contributions) == formula.text
    assert again.slots == formula.slots and again.written == formula.written
    a, b = list(expr.postorder(formula.roots)), list(expr.postorder(again.roots))
    assert [(e.op, e.dtype, e.tensor, len(e.args)) for e in a] == [(e.op, e.dtype, e.tensor, len(e.args)) for e in b]


def test_the_parsed_text_keeps_every_kind_of_expression():
    b = expr.Builder()
    p, s = b.leaf(0, torch.bfloat16, tensor=True), b.leaf(1, torch.float64, tensor=False)
    wide = b.cast(p, torch.float32)
    truth = b.op("and", b.op("lt", wide, s), wide)  # makes a "zero" to compare with
    value = b.cast(b.op("where", truth, wide, b.op("fma", wide, s, wide)), torch.bfloat16)
    slots = (types.Slot(True, torch.bfloat16), types.Slot(False, torch.float64))
    text = formula_text.serialise(slots, [(0, value)], [b.reduce("sum", wide)])
    again = formula_text.parse(text)
    assert formula_text.serialise(again.slots, again.writes, again.contributions) == text
    assert "zero()" in text and "bool[]" in text and "contribute" in text


def adam(p: Any, g: Any, m: Any, v: Any, t: Any) -> None:
    t.add_(1)
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    p.addcdiv_(m, v.sqrt().add_(1e-8), value=-0.01)
    p.mul_(1 - 0.1 / t)


def _members(sizes: list[int]) -> list[list[Tensor]]:
    return [[*(torch.rand(n) + 1 for _ in range(4)), torch.tensor(3.0, dtype=torch.float64)] for n in sizes]


def _step(count: int, order: list[int]) -> Any:
    def step(*tensors: Any) -> None:
        for i in order:
            adam(*tensors[5 * i : 5 * i + 5])

    return step


def test_parameters_are_one_group_in_any_order():
    sizes = [5, 7, 1, 5]
    tensors = list(itertools.chain(*_members(sizes)))
    texts = set()
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        captured, groups = fused(_step(4, order), *tensors)
        (only,) = groups
        assert len(only.members) == 4 and sum(len(u.members) for u in captured.updates) == 4
        texts.add((only.name, only.formula.text))
    assert len(texts) == 1


def test_arguments_may_come_in_any_order():
    """Which placeholder holds what does not matter, nor do names."""
    found = set()
    for order in itertools.permutations(range(4)):

        def step(*tensors: Any, order: tuple[int, ...] = order) -> None:
            adam(*(tensors[i] for i in order), tensors[4])

        (only,) = fused(step, *_members([5])[0])[1]
        found.add(only.formula.text)
    assert len(found) == 1


def test_members_that_interleave_their_operations():
    """List operations, loops, and any mixture: the order of operations of different parameters does not matter."""

    def lists(p: Any, g: Any, q: Any, h: Any) -> None:
        torch._foreach_mul_([p, q], [0.9, 0.8])
        torch._foreach_add_([p, q], [g, h])

    def loop(p: Any, g: Any, q: Any, h: Any) -> None:
        q.mul_(0.8).add_(h)
        p.mul_(0.9).add_(g)

    tensors = [torch.randn(n) for n in (5, 5, 7, 7)]
    (a,), (b,) = (fused(f, *tensors)[1] for f in (lists, loop))
    assert a.formula.text == b.formula.text and len(a.members) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda p, g: p.copy_(p * g), lambda p, g: p.copy_(g * p)),
        (lambda p, g: p.copy_(p + 0.5 * g), lambda p, g: p.copy_(g * 0.5 + p)),
        (lambda p, g: p.copy_(g * g + p), lambda p, g: p.copy_(p + g.square())),
        (lambda p, g: p.copy_(p.sqrt() + g), lambda p, g: p.copy_(g + p**0.5)),
        (lambda p, g: p.copy_((p * g) * (p + g)), lambda p, g: p.copy_((g + p) * (g * p))),
        (lambda p, g: p.copy_(p**-1 + g), lambda p, g: p.copy_(g + p.reciprocal())),
        (lambda p, g: p.copy_(p - 0.1 * g), lambda p, g: p.copy_(torch.sub(p, torch.mul(g, 0.7)))),
        (lambda p, g, h: p.copy_((g * 0.3 + h * 0.7) * p - g), lambda p, g, h: p.copy_(p * (h * 0.7 + g * 0.3) - g)),
    ],
)
def test_the_same_computation_is_the_same_formula(one, other):
    """Commuted arguments, other names of one operation, other numbers."""
    tensors = [torch.rand(5) + 1 for _ in range(one.__code__.co_argcount)]
    (a,), (b,) = (fused(f, *tensors)[1] for f in (one, other))
    assert a.formula.text == b.formula.text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda p, g: p.copy_(p - g), lambda p, g: p.copy_(g - p)),
        (lambda p, g: p.copy_(p / g), lambda p, g: p.copy_(g / p)),
        (lambda p, g: p.copy_((p + g) + g), lambda p, g: p.copy_(p + (g + g))),
        (lambda p, g: p.copy_(p + 0.5 * g), lambda p, g: p.copy_(torch.add(p, g, alpha=0.5))),
        (lambda p, g: p.copy_(p * g), lambda p, g: p.copy_(p * p)),
        (lambda p, g: (p.copy_(p * g), g.copy_(p))[:0], lambda p, g: (p.copy_(p * g), g.copy_(g))[:0]),
    ],
)
def test_different_computations_are_different_formulas(one, other):
    """Also where they are equal in real numbers: what is computed keeps its roundings."""
    tensors = [torch.rand(5) + 1, torch.rand(5) + 1]
    texts = [[g.formula.text for g in fused(f, *tensors)[1]] for f in (one, other)]
    assert texts[0] != texts[1]


def test_numbers_are_kept_apart_and_dtypes_are_groups():
    """Parameters that differ in a number share a formula; parameters that differ in dtype or in rank of work do not."""

    def step(p: Any, g: Any, q: Any, h: Any, r: Any, i: Any) -> None:
        p.sub_(g * 0.1)
        q.sub_(h * 0.3)
        r.sub_(i * 0.1)

    tensors = [torch.randn(5) for _ in range(4)] + [torch.randn(5, dtype=torch.float64) for _ in range(2)]
    captured, groups = check(step, *tensors)
    assert sorted(len(g.members) for g in groups) == [1, 2]
    pair = next(g for g in groups if len(g.members) == 2)
    numbers = {captured.leaves[m[s]].value for m in pair.members for s in pair.formula.scalar_slots}
    assert numbers == {0.1, 0.3}


def test_a_number_that_appears_twice_is_two_slots():
    """Or two parameter groups, in which two numbers happen to be equal in one of them, would differ."""

    def step(p: Any, g: Any, q: Any, h: Any) -> None:
        p.mul_(0.5).add_(g * 0.5)
        q.mul_(0.9).add_(h * 0.1)

    (only,) = check(step, *(torch.randn(5) for _ in range(4)))[1]
    assert len(only.members) == 2


def test_a_total_and_a_number_are_two_formulas():
    """What is a total is added up before it is read; a number that some members have in its place is none."""

    def step(scale: Any, *tensors: Any) -> None:
        params, grads = tensors[::2], tensors[1::2]
        total = torch.stack([(g * g).sum() for g in grads]).sum()
        for p, g, factor in zip(params, grads, (scale, total, total, 0.25), strict=True):
            p.sub_(g * factor)

    tensors = [torch.rand(n) for n in (3, 4, 5, 6) for _ in range(2)]
    _, groups = check(step, torch.tensor(0.5), *tensors, tolerance=1e-5)
    assert sorted((len(g.formula.total_slots), len(g.members)) for g in groups) == [(0, 2), (1, 2)]


def test_no_updates_no_groups():
    captured, groups = fused(lambda p, g: None, torch.randn(3), torch.randn(3))
    assert captured.updates == [] and groups == []


def test_formulas_and_names_are_the_same_in_every_process():
    """Kernels on disk and dumps are found again: nothing depends on Python's string hashes."""
    code = (
        "from tests.unit.passes.test_group import _members, _step, fused, itertools\n"
        "(g,) = fused(_step(2, [1, 0]), *itertools.chain(*_members([5, 7])))[1]; print(g.name); print(g.formula.text)"
    )
    (here,) = fused(_step(2, [0, 1]), *itertools.chain(*_members([5, 7])))[1]
    root = pathlib.Path(__file__).parents[3]
    env = {**os.environ, "PYTHONHASHSEED": another_hash_seed()}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{here.name}\n{here.formula.text}", done.stderr


# Rules that look at sizes ---------------------------------------------------------------------------------------------


@rule(defaults={"lr": 0.1})
def by_size(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    """Large tensors take the gradient, small ones its sign."""
    return param - lr * (grad if param.numel() > 100 else grad.sign())


@rule(defaults={"lr": 0.1})
def by_mean(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    """The size enters as a number."""
    return param - lr * grad.mean() * param.shape[-1]


@pytest.mark.parametrize(("made", "groups"), [(by_size, 2), (by_mean, 1)])
def test_a_rule_that_looks_at_sizes(made, groups):
    shapes = [(3, 4), (20, 20), (4, 3), (5, 50), (2, 2)]
    params, twins = parameters(shapes), parameters(shapes)
    step, twin = compiled(made(params)), made(twins)
    for seed in range(2):
        set_gradients(params, gradients(params, seed))
        set_gradients(twins, gradients(twins, seed))
        step()
        twin.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert len(last_report().groups) == groups


def test_a_deep_rule_stays_cheap():
    """Expressions are graphs: sixty squarings share their parts, and nothing unfolds them into trees."""

    @rule(defaults={"lr": 0.1})
    def deep(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
        x = grad
        for _ in range(60):
            x = (x * x + x).clamp(max=1)
        return param - lr * x

    params = parameters([(3, 4), (5, 5)])
    step = compiled(deep(params))
    set_gradients(params, gradients(params, 0))
    step()
    assert len(last_report().groups[0].formula) < 10_000


def test_one_group_for_lists_loops_and_functional_graphs():
    """The forms in which one optimizer can arrive give one formula."""

    def functional(p: Any, g: Any) -> None:
        p.copy_(torch.ops.aten.sub.Tensor(p, torch.ops.aten.mul.Scalar(g, 0.1)))

    def loop(p: Any, g: Any) -> None:
        p.sub_(0.1 * g)

    def lists(p: Any, g: Any) -> None:
        torch._foreach_sub_([p], torch._foreach_mul([g], 0.1))

    tensors = [torch.randn(5), torch.randn(5)]
    texts = {g.formula.text for f in (functional, loop, lists) for g in group(capture(traced(f, *tensors))).groups}
    assert len(texts) == 1
