"""Counts and norms that an optimizer keeps as tensors of one element: numbers where they are used as numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.passes.rewrite import rewrite
from npu_fuse_pass.pipeline import group
from tests.support.graphs import PROGRAMS, run, traced, with_groups

SHAPES = ((3, 4), (5,), (1,), (2, 3))
State = dict[str, Any]


class Keeping(torch.optim.Optimizer):
    """An optimizer with a state of one element for each parameter and one for all."""

    def __init__(self, params: Any, update: Callable[..., None], dtype: torch.dtype) -> None:
        super().__init__(params, {"d": 1e-3, "growth": 1.5})
        self.update = update
        ps = self.param_groups[0]["params"]
        self.state["k"] = torch.tensor([0])  # type: ignore[index]
        self.state["whole"] = torch.zeros(1, dtype=dtype)  # type: ignore[index]
        for p in ps:
            self.state[p] = {"own": torch.ones(1, dtype=dtype), "avg": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        self.update(self, self.param_groups[0], [p for p in self.param_groups[0]["params"] if p.grad is not None])


def a_count(opt: Any, group: State, params: list[Tensor]) -> None:
    k = opt.state["k"].item()
    for p in params:
        p.sub_(p.grad, alpha=0.1 / math.pow(k + 1, 0.5))
    opt.state["k"] += 1


def weights(opt: Any, group: State, params: list[Tensor]) -> None:
    own = [opt.state[p]["own"] for p in params]
    torch._foreach_mul_(own, 0.9)
    torch._foreach_add_(own, 1.0)
    for p, w in zip(params, torch._foreach_reciprocal(own), strict=True):
        opt.state[p]["avg"].lerp_(p.grad, weight=w.to(p.dtype).reshape(()))
        p.sub_(opt.state[p]["avg"])


def a_distance(opt: Any, group: State, params: list[Tensor]) -> None:
    """As D-adaptation estimates it."""
    sums = torch.zeros((1,), dtype=params[0].dtype)
    for p in params:
        opt.state["whole"].add_(torch.dot(p.grad.flatten(), p.flatten()), alpha=0.3)
        sums.add_(p.grad.pow(2).sum())
    found = 2.0 * opt.state["whole"] / sums.sqrt()
    group["d"] = max(group["d"], min(found.item(), group["d"] * group["growth"]))
    for p in params:
        p.sub_(p.grad, alpha=group["d"])


def a_scale(opt: Any, group: State, params: list[Tensor]) -> None:
    for p in params:
        own = opt.state[p]["own"]
        own.mul_(0.5).add_(p.grad.norm(), alpha=0.5)
        p.sub_(p.grad * own, alpha=0.1)


def averages_of_norms(opt: Any, group: State, params: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    averages = torch.cat([opt.state[p]["own"] for p in params]).mul_(0.9).add_(norms, alpha=0.1)
    torch._foreach_copy_([opt.state[p]["own"] for p in params], averages.split(1))
    larger = torch.where(averages > norms, averages, 1.0)
    torch._foreach_sub_(params, torch._foreach_mul([p.grad * 0.1 for p in params], larger.unbind()))


def entries_are_written(opt: Any, group: State, params: list[Tensor]) -> None:
    own = torch.cat([opt.state[p]["own"] for p in params])
    own.add_(torch.stack(torch._foreach_norm([p.grad for p in params])))
    torch._foreach_copy_([opt.state[p]["own"] for p in params], own.split(1))
    factors = own.sqrt().add_(1.0).reciprocal_().unbind()
    torch._foreach_addcmul_(params, [p.grad for p in params], factors, value=-0.1)
    torch._foreach_mul_(factors, 0.5)
    torch._foreach_addcmul_(params, [p.grad for p in params], factors, value=-0.1)


def a_vector_is_read_after_its_entries_were_written(opt: Any, group: State, params: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    torch._foreach_mul_(norms.unbind(), 0.5)  # the vector sees it
    torch._foreach_sub_(params, torch._foreach_mul([p.grad * 0.1 for p in params], (norms + 1.0).unbind()))


def entries_are_taken_twice(opt: Any, group: State, params: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    first, second = norms.unbind(), norms.unbind()
    torch._foreach_mul_(first, 0.5)  # the others see it
    torch._foreach_sub_(params, torch._foreach_mul([p.grad * 0.1 for p in params], second))


def entries_of_a_vector_that_is_written(opt: Any, group: State, params: list[Tensor]) -> None:
    own = torch.cat([opt.state[p]["own"] for p in params])
    entries = own.split(1)
    own.add_(torch.stack(torch._foreach_norm([p.grad for p in params])))  # the entries see it
    torch._foreach_copy_([opt.state[p]["own"] for p in params], entries)
    torch._foreach_sub_(params, torch._foreach_mul([p.grad * 0.1 for p in params], own.unbind()))


def a_parameter_of_one_element(opt: Any, group: State, params: list[Tensor]) -> None:
    """What is kept of it is a tensor like any other parameter's."""
    for p in params:
        opt.state[p]["avg"].mul_(0.9).add_(p.grad)
        p.sub_(opt.state[p]["avg"], alpha=0.1)


def elements_of_it_are_added(opt: Any, group: State, params: list[Tensor]) -> None:
    opt.state["whole"].add_(params[2].grad)  # of shape (1,), as the parameter
    read = opt.state["whole"].item()
    for p in params:
        p.sub_(p.grad, alpha=0.1 + 0.01 * read)


def a_mask(opt: Any, group: State, params: list[Tensor]) -> None:
    for p in params:
        scale = p.grad.abs()
        scale[scale < 0.5] = float("inf")
        p.sub_(p.grad / scale, alpha=0.1)


def a_choice_of_numbers(opt: Any, group: State, params: list[Tensor]) -> None:
    group["d"] += 0.01
    if group["d"] not in [group["growth"], 0.0]:
        group["growth"] += 0.5
    for p in params:
        p.sub_(p.grad, alpha=group["d"])


UPDATES = [
    a_count,
    weights,
    a_distance,
    a_scale,
    averages_of_norms,
    entries_are_written,
    a_parameter_of_one_element,
    elements_of_it_are_added,
    a_mask,
    a_choice_of_numbers,
    a_vector_is_read_after_its_entries_were_written,
    entries_are_taken_twice,
    entries_of_a_vector_that_is_written,
]
LEFT = UPDATES[-3:]


def steps(update: Callable[..., None], compiled: bool, dtype: torch.dtype) -> tuple[list[Any], Any]:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]
    opt = Keeping(params, update, dtype)
    step = npu_fuse_pass.compile_step(opt) if compiled else opt.step
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        step()
    kept = [opt.state["k"], opt.state["whole"], *(t for p in params for t in opt.state[p].values())]  # type: ignore[index]
    return [*params, *kept, opt.param_groups[0]["d"], opt.param_groups[0]["growth"]], step


@pytest.mark.parametrize("update", UPDATES)
def test_tensors_of_one_element(update: Callable[..., None]) -> None:
    want, _ = steps(update, False, torch.float64)
    got, step = steps(update, True, torch.float32)
    for a, b in zip(got, want, strict=True):
        x, y = torch.as_tensor(a), torch.as_tensor(b)
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y.double(), rtol=2e-6, atol=2e-6)
    report = step._tracked.ran[-1]
    if update in LEFT:  # an entry is a view
        assert report.reasons
    else:
        assert report.groups and not report.reasons, report


def test_programs_and_the_rewritten_graph_agree() -> None:
    """The interpreter and fused nodes take the same tensors of one element as the kernel does."""

    def update(p: Any, held: Any, count: Any) -> Any:
        held.mul_(0.5)
        count.add_(1)
        p.sub_(held * p)
        return held.reshape(()) * 2, count.item() + 0.5

    given = (torch.randn(3, 4), torch.rand(1), torch.tensor([4]))
    captured, groups = with_groups(capture(traced(update, *given), numbers=True))
    assert not captured.unfused
    want = [t.clone() for t in given]
    returned = update(*want)
    for how in PROGRAMS:
        got = [t.clone() for t in given]
        results = run(captured, groups, got, how)
        assert results[0].shape == () and results[1].shape == ()
        for a, b in zip([*got, *results], [*want, *map(torch.as_tensor, returned)], strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-7, atol=1e-7)
    made, got = rewrite(group(copy.copy(captured))), [t.clone() for t in given]
    made(*got)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_an_original_operation_gets_the_tensor_and_not_the_number() -> None:
    def update(p: Any, held: Any) -> None:
        number = held.double().reshape(())  # of the same dtype: the number itself
        p.sub_(torch.cumsum(held, 0) + torch.logcumsumexp(number.unsqueeze(0), 0))

    given = (torch.randn(3, 4, dtype=torch.float64), torch.rand(1, dtype=torch.float64))
    want, got = ([t.clone() for t in given] for _ in range(2))
    update(*want)
    graph = traced(update, *given)
    assert capture(graph, numbers=True).leaves[1].held == (1,)
    with torch.no_grad():
        npu_fuse_pass.npu_fused(graph, got)(*got)
    torch.testing.assert_close(got, want)
