"""Steps of a few operations, each of which goes wrong if one thing in capture, grouping or code generation does."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass import rule, total, zeros
from tests.support.graphs import PROGRAMS, captured_step, check, fused, run, step_with, with_groups
from tests.support.training import assert_close, clones, compiled, gradients, parameters, set_gradients

pytestmark = pytest.mark.usefixtures("same_numbers")


# Capture -------------------------------------------------------------------------------------------------------------


def test_a_counter_that_several_parameters_read_joins_none_of_them() -> None:
    """They read it after it was counted, and keep being one group of two; the counter is a group of its own."""

    def step(n: Any, p: Any, q: Any, g: Any, h: Any) -> None:
        n.add_(1)
        p.sub_(g / n)
        q.sub_(h / n)

    counter = torch.tensor(3.0, dtype=torch.float64)
    captured, groups = check(step, counter, *(torch.randn(n) for n in (5, 7, 5, 7)), tolerance=2e-7)
    assert sorted(len(g.members) for g in groups) == [1, 2]
    assert sum(len(u.members) for u in captured.updates) == 3


def test_a_rate_that_several_parameters_read_joins_none_of_them() -> None:
    def step(lr: Any, p: Any, q: Any, g: Any, h: Any) -> None:
        p.sub_(g * lr)
        q.sub_(h * lr)

    rate = torch.tensor(0.5, dtype=torch.float64)
    (only,) = fused(step, rate, *(torch.randn(n) for n in (5, 7, 5, 7)))[1]
    assert len(only.members) == 2


def test_tensors_that_are_scaled_alone_are_updates_of_their_own() -> None:
    """Only 0-dim counters join a parameter; a tensor that reads itself alone may have another shape."""

    def step(p: Any, g: Any, q: Any, h: Any, average: Any, other: Any) -> None:
        p.sub_(g)
        q.sub_(h)
        average.mul_(0.9)
        other.mul_(0.8)

    _, groups = check(step, *(torch.randn(n) for n in (5, 5, 7, 7, 3, 4)))
    assert [len(g.members) for g in groups] == [2, 2]


@pytest.mark.parametrize(
    "ratio",
    [
        lambda p, g, m: g.norm() / p.norm(),
        lambda p, g, m: g.norm() + p.norm(),
        lambda p, g, m: (g.norm() + m.norm()).sqrt(),
        lambda p, g, m: torch.where(g.norm() > m.norm(), g.norm() + p.norm(), m.norm()),
    ],
)
def test_norms_of_one_parameter_are_no_sum_over_parameters(ratio: Any) -> None:
    """Though nothing but a scalar connects the tensors; with more parameters than there are totals."""

    def step(*tensors: Any) -> None:
        for p, g, m in zip(*(tensors[i::3] for i in range(3)), strict=True):
            p.mul_(ratio(p, g, m))

    sizes = [n for n in (2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10) for _ in range(3)]
    _, (only,) = check(step, *(torch.randn(n, dtype=torch.float64) for n in sizes), tolerance=1e-14)
    assert len(only.members) == 11 and not only.formula.contributions


def test_a_total_beside_a_norm_of_the_parameters_own() -> None:
    """Only one parameter reads the smaller of the two, but all of them the total."""

    def step(*tensors: Any) -> None:
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in tensors[1::2]]))
        for p, g in zip(tensors[::2], tensors[1::2], strict=True):
            p.sub_(g * torch.minimum(norm, p.norm()))

    _, (only,) = check(step, *(torch.randn(4, dtype=torch.float64) for _ in range(6)), tolerance=1e-13)
    assert len(only.members) == 3 and only.formula.contributions


def test_pythons_sum_over_all_parameters() -> None:
    """It starts with 0, which makes no parameter different from the others."""

    def step(*tensors: Any) -> None:
        squares = sum((g * g).sum() for g in tensors[1::2])
        for p, g in zip(tensors[::2], tensors[1::2], strict=True):
            p.sub_(g / (1 + squares))

    _, (only,) = check(step, *(torch.randn(n, dtype=torch.float64) for n in (3, 3, 4, 4, 5, 5)), tolerance=1e-13)
    assert len(only.members) == 3


@pytest.mark.parametrize("shape", [(5,), ()], ids=str)
@pytest.mark.parametrize(
    "same",
    [
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
        lambda x: x.to(x),
        lambda x: x.to(torch.float32, copy=True),
        lambda x: x.to(torch.float32, False, True),
    ],
)
def test_a_cast_to_the_same_dtype_is_the_tensor_itself_unless_a_copy_is_asked_for(same: Any, shape: Any) -> None:
    def step(p: Any, m: Any) -> None:
        view = same(m)
        m.mul_(0.5)
        p.add_(view)

    check(step, torch.randn(shape), torch.randn(shape))


def test_sums_and_products_of_masks() -> None:
    def step(p: Any, g: Any) -> None:
        p.copy_(torch.where((p > 0) * (g > 0), 2.0, torch.where((p > 0) + (g > 0), 1.0, 0.0)))

    check(step, torch.randn(50), torch.randn(50))


# Grouping ------------------------------------------------------------------------------------------------------------


def random_tree(chance: random.Random, depth: int) -> Any:
    """Sums and products of three tensors: nested (operation, left, right) over 0, 1, 2."""
    if depth == 0 or chance.random() < 0.15:
        return chance.randrange(3)
    return chance.choice("+*"), random_tree(chance, depth - 1), random_tree(chance, depth - 1)


def evaluated(tree: Any, tensors: Sequence[Any], swaps: Callable[[], bool]) -> Any:
    if isinstance(tree, int):
        return tensors[tree]
    operation, *parts = tree
    left, right = (evaluated(part, tensors, swaps) for part in parts)
    if swaps():
        left, right = right, left
    return left + right if operation == "+" else left * right


def test_operands_of_sums_and_products_may_be_swapped_everywhere() -> None:
    chance = random.Random(0)
    for _ in range(20):
        tree = ("*", random_tree(chance, 5), random_tree(chance, 5))
        found = set()
        for swaps in (lambda: False, lambda: True, lambda: chance.random() < 0.5):

            def step(p: Any, g: Any, h: Any, tree: Any = tree, swaps: Any = swaps) -> None:
                p.copy_(evaluated(tree, (p, g, h), swaps))

            (only,) = fused(step, *(torch.randn(3) for _ in range(3)))[1]
            found.add(only.formula.text)
        assert len(found) == 1, tree


def test_operands_of_differences_and_quotients_may_not() -> None:
    """Every ordered pair of three tensors, to the last bit."""
    pairs = list(itertools.permutations(range(3), 2))

    def step(*tensors: Any) -> Any:
        differences = [tensors[i] - tensors[j] for i, j in pairs]
        return (*differences, *(tensors[i] / tensors[j] for i, j in pairs))

    tensors = [torch.randn(5) for _ in range(3)]
    captured, groups = fused(step, *tensors)
    for got, wanted in zip(run(captured, groups, tensors, "interpreter"), step(*tensors), strict=True):
        assert torch.equal(got, wanted)


def test_states_may_be_written_in_any_order() -> None:
    """What is written does not depend on the order; the formula must not, either."""
    writes = [
        lambda p, g, states: states[0].mul_(0.9).add_(g),
        lambda p, g, states: states[1].mul_(g),
        lambda p, g, states: states[2].copy_(states[2].abs() + g),
        lambda p, g, states: states[3].sub_(g),
        lambda p, g, states: p.add_(g),
    ]
    texts = set()
    for order in itertools.permutations(writes):

        def step(p: Any, g: Any, *states: Any, order: Any = order) -> None:
            for write in order:
                write(p, g, states)

        (only,) = fused(step, *(torch.randn(3) for _ in range(6)))[1]
        texts.add(only.formula.text)
    assert len(texts) == 1


def test_zeros_of_both_signs_are_two_numbers() -> None:
    def step(p: Any, g: Any, q: Any) -> None:
        p.copy_(g * -0.0)
        q.copy_(torch.copysign(q, torch.zeros_like(q)))

    p, g, q = torch.rand(5) + 1, torch.rand(5) + 1, torch.randn(7)
    check(step, p, g, q)
    captured, groups = fused(step, p, g, q)
    run(captured, groups, [p, g, q], "interpreter")
    assert p.signbit().all() and not q.signbit().any()


# Code generation -----------------------------------------------------------------------------------------------------


def test_extremes_of_one_sign() -> None:
    """The largest of negative numbers and the smallest of positive ones, with more elements than lanes and fewer."""

    def step(p: Any, g: Any) -> None:
        p.sub_(g.amax())
        g.add_(p.amin())

    for n in (3, 16, 40):
        check(step, torch.rand(n) + 1, -1 - torch.rand(n))
        check(step, -1 - torch.rand(n), torch.rand(n) + 1)


def test_every_element_is_written_whatever_the_size() -> None:
    def step(p: Any, q: Any, r: Any) -> None:
        for x in (p, q, r):
            x.mul_(2)

    check(step, torch.randn(1), torch.randn(17), torch.randn(16384 + 1))


# Rules ---------------------------------------------------------------------------------------------------------------


def test_a_rule_counts_from_one_and_sums_over_all_parameters() -> None:
    """Two steps in the stages by themselves, beside two eager ones."""

    @rule(
        states={"mean": zeros}, defaults={"lr": 0.1}, totals={"sum": total(lambda grad: grad.double().square().sum())}
    )
    def made(param: Tensor, grad: Tensor, mean: Tensor, *, lr: Tensor, step: Tensor, sum: Tensor) -> Any:
        mean = mean * 0.5 + grad
        return param - lr / step * mean / (1 + sum), mean

    params = parameters([(3, 4), (5,), (2, 2)])
    others = clones(params)
    opt, eager = made(params), made(others)
    for seed in range(2):
        for own in (params, others):
            set_gradients(own, gradients(own, seed))
        eager.step()
        captured, groups = with_groups(captured_step(opt))
        assert [len(g.members) for g in groups] == [3]
        step_with(opt, PROGRAMS["kernel"](captured.leaves, groups))
        torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)


def test_a_rule_without_states_counts_where_it_reads_the_step() -> None:
    """Eagerly and fused; the counter is in the state dict, so that training goes on where it stopped."""

    @rule(defaults={"lr": 0.5})
    def decaying(param: Tensor, grad: Tensor, *, lr: Tensor, step: Tensor) -> Tensor:
        return param - lr / step * grad

    params = parameters([(3, 4), (5,)])
    others, wanted = clones(params), clones(params)
    opt, eager = decaying(params), decaying(others)
    step = compiled(opt)
    for t in range(1, 4):
        for own in (params, others, wanted):
            set_gradients(own, gradients(own, t))
        step()
        eager.step()
        for p in wanted:
            p.data.sub_(0.5 / t * p.grad)
        assert_close(params, wanted, 1e-6)
        assert_close(others, wanted, 1e-6)
        if t == 2:
            again = decaying(others)
            again.load_state_dict(eager.state_dict())
            eager = again
    step.check(len(params))


def test_a_rule_without_states_counts_where_a_list_has_the_step() -> None:
    @rule(defaults={"lr": 0.5})
    def decaying(param: Tensor, grad: Tensor, *, lr: Tensor, step: Tensor) -> Tensor:
        return param - lr / torch.stack([step, step]).mean() * grad

    params = parameters([(3, 4), (5,)])
    wanted = clones(params)
    opt = decaying(params)
    for t in range(1, 4):
        for own in (params, wanted):
            set_gradients(own, gradients(own, t))
        opt.step()
        for p in wanted:
            p.data.sub_(0.5 / t * p.grad)
        assert_close(params, wanted, 1e-6)


def test_a_total_that_nothing_reads() -> None:
    @rule(defaults={"lr": 0.5}, totals={"squares": total(lambda grad: grad.square().sum())})
    def plain(param: Tensor, grad: Tensor, *, lr: Tensor, squares: Tensor) -> Tensor:
        return param - lr * grad

    params = parameters([(3, 4), (5,)])
    wanted = clones(params)
    step = compiled(plain(params))
    for own in (params, wanted):
        set_gradients(own, gradients(own, 0))
    step()
    for p in wanted:
        p.data.sub_(0.5 * p.grad)
    assert_close(params, wanted, 1e-6)
    step.check(len(params))
