"""What compiled steps mean for autograd, threads, copies, and for memory when an optimizer is gone."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from typing import Any

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass.lowerings.cpu import program as cpu_program
from optimizers import NpuFusedAdam
from tests.support.cases import BY_NAME, ONE_EACH, Case, over
from tests.support.training import (
    assert_close,
    assert_fused,
    at_once,
    compiled,
    parameters,
    profiled,
    stated_calls,
    train,
)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda c: c.name)
@pytest.mark.parametrize("form", ["eager", "compiled", "within a graph"])
def test_gradients_are_gone_after_zero_grad(case: Case, form: str) -> None:
    """Their memory is what the next forward pass uses; an optimizer that kept them would double it."""
    params = parameters([(3, 4), (5,)])
    opt = case.build(params)

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    steps = {
        "eager": lambda: opt.step,
        "compiled": lambda: compiled(opt),
        "within a graph": lambda: torch.compile(tail, backend="npu_fused", fullgraph=True),
    }
    step = steps[form]()
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        gradients = [weakref.ref(p.grad) for p in params]
        step()
        opt.zero_grad()
        assert [g() for g in gradients] == [None, None]
    assert form == "eager" or not npu_fuse_pass.reports()[-1].reasons


def test_two_threads() -> None:
    """Two optimizers in two threads at once, compiled and stepped there."""
    made = []
    for i, name in enumerate(("adam", "lamb")):
        params = parameters([(50, 60), (7,)], seed=i)
        made.append((params, compiled(BY_NAME[name].build(params)), BY_NAME[name].oracle(params)))
    at_once(*(functools.partial(train, *one, range(30)) for one in made))
    for params, step, oracle in made:
        assert_close(params, oracle.values, 2e-3)
        assert sorted(profiled(step)[0]) in [stated_calls(r) for r in npu_fuse_pass.reports()]


@over(ONE_EACH)
def test_a_deleted_optimizer_frees_everything(case: Case) -> None:
    params = parameters()
    opt = case.build(params)
    step = compiled(opt)
    train(params, step)
    flat = [t for s in opt.state.values() for n, t in s.items() if n != "step"]
    held = [weakref.ref(x) for x in (*params, *(t._base if t._base is not None else t for t in flat), opt)]
    del params, opt, step, flat
    gc.collect()
    assert [r() for r in held] == [None] * len(held)


class Gathering(torch.optim.Optimizer):
    """Makes its states in a method that Dynamo runs while it traces; the graph then holds them."""

    def _init_group(self, group: Any, params: list[Any]) -> None:
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
            params.append(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Any] = []
            self._init_group(group, params)
            for p in params:
                self.state[p]["average"].lerp_(p.grad, 0.1)
                p.sub_(self.state[p]["average"], alpha=group["lr"])


@pytest.mark.parametrize("tool", [npu_fuse_pass.compile_step, npu_fuse_pass.compile_optimizer_])
def test_a_deleted_optimizer_frees_what_a_graph_holds(tool: Any) -> None:
    params = parameters([(10,)] * 5)
    opt = Gathering(params, {"lr": 0.1})
    made = tool(opt)
    train(params, made.step if made is opt else made)
    assert npu_fuse_pass.reports()[-1].groups
    npu_fuse_pass.clear_reports()
    held = [weakref.ref(opt.state[p]["average"]) for p in params]
    assert programs()
    del opt, made
    gc.collect()
    assert not programs() and not any(r() is not None for r in held)


def blocks_that_stay(case: Case, backend: str, count: int) -> float:
    """Memory blocks for each parameter that a compiled optimizer leaves behind."""

    def once() -> None:
        params = parameters([(10,)] * count)
        opt = case.build(params)
        step = torch.compile(opt.step, backend=backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            step()
        if backend == "npu_fused":
            assert_fused(npu_fuse_pass.reports()[-1], parameters=count)

    def blocks() -> int:
        npu_fuse_pass.clear_reports()  # the last 64 are kept, with what they show
        gc.collect()
        return sys.getallocatedblocks()

    once()
    before = blocks()
    once()
    once()
    return (blocks() - before) / 2 / count


@over(ONE_EACH)
def test_a_deleted_optimizer_takes_its_plan_along(case: Case) -> None:
    """Dynamo keeps something of each compile for good, whatever the backend; a plan is 40 blocks for each parameter."""
    assert blocks_that_stay(case, "npu_fused", 100) <= blocks_that_stay(case, "eager", 100) + 3


def test_a_deleted_optimizer_takes_the_plan_of_a_graph_along() -> None:
    """One that is stepped in a larger function; the plan is of both."""
    params = parameters([(10,)] * 5)
    both = [NpuFusedAdam(params[:2]), NpuFusedAdam(params[2:])]

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt in both:
            opt.step()

    for p in params:
        p.grad = torch.ones_like(p)
    torch.compile(tail, backend="npu_fused", fullgraph=True)()
    assert_fused(npu_fuse_pass.reports()[-1], parameters=5)
    npu_fuse_pass.clear_reports()
    assert programs()
    both.pop()
    gc.collect()
    assert not programs()


def programs() -> list[Any]:
    """Those of this test's parameters."""
    found = [x for x in gc.get_objects() if type(x) is cpu_program.Program]
    return [x for x in found if sum(len(k.group.members) for k in x.kernels) == 5]
