"""The backend from a training loop's point of view: how often it compiles, what a step runs, what it leaves behind."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import npu_fuse_pass
from npu_fuse_pass import npu_fused
from optimizers import NpuFusedAdam
from tests.support.cases import BY_NAME, CASES, ONE_EACH, Case, over
from tests.support.training import (
    Step,
    assert_close,
    assert_fused,
    assert_one_fused_step,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    profiled,
    set_gradients,
    stated_calls,
    train,
)


class Counting:
    """The backend under test, counting how often Dynamo calls it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return npu_fused(gm, example_inputs, **kwargs)


@over(CASES)
def test_fullgraph(case: Case) -> None:
    """A step is what the report states and nothing else."""
    params = parameters([(3, 4), (5,), (40, 50), (), (2, 0)])
    opt, oracle = case.build(params), case.oracle(params)
    step = compiled(opt, fullgraph=True)
    train(params, step, oracle, [0, 1])
    step.check(len(params))
    set_gradients(params, gradients(params, 3))
    oracle.step(gradients(params, 3))
    assert_one_fused_step(step)
    assert_close(params, oracle.values)


def loop(opt: Any, params: list[Tensor], step: Any, rounds: int) -> list[Tensor]:
    """A loop that changes everything that a training may change; the same every time. Returns all values it saw."""
    chance = random.Random(0)
    schedulers = [StepLR(opt, 1, 0.99), OneCycleLR(opt, 0.05, total_steps=2 * rounds)]
    saved: dict[str, Any] = {}
    history = []
    for t in range(rounds):
        grads: list[Tensor | None] = list(gradients(params, t))
        for i in range(len(params)):
            if chance.random() < 0.3 or t % 37 == 5:
                grads[i] = None
        set_gradients(params, grads)
        step()
        for scheduler in schedulers:
            scheduler.step()
        if t % 10 == 4:
            opt.param_groups[0]["weight_decay"] = chance.choice([0, 0.0, 0.1, 0.3])
        if t == rounds // 4:
            saved = copy.deepcopy(opt.state_dict())
        if t in (rounds // 2, 3 * rounds // 4):
            opt.load_state_dict(copy.deepcopy(saved))  # torch keeps the tensors that it is given
        history.append(torch.cat([p.detach().flatten() for p in params]))
    return history


def test_one_compile_in_200_steps() -> None:
    """Schedulers, weight decay, checkpoints and None gradients: one backend call, numbers as eager and torch.optim."""
    params = parameters(dtype=torch.float64)
    twins, others = clones(params), clones(params)
    opt = NpuFusedAdam(params, lr=0.01)
    backend = Counting()
    step = compiled(opt, backend=backend)
    history = loop(opt, params, step, 200)
    assert backend.calls == 1
    assert [r.cause for r in npu_fuse_pass.reports()].count("compile") == 1
    assert_fused(last_report(), parameters=len(params))
    set_gradients(params, gradients(params, 0))
    assert_one_fused_step(step)
    twin, stock = NpuFusedAdam(twins, lr=0.01), torch.optim.Adam(others, lr=0.01)
    assert_close(history, loop(twin, twins, twin.step, 200), 1e-11)
    assert_close(history, loop(stock, others, stock.step, 200), 1e-11)
    assert backend.calls == 1


def test_loading_a_checkpoint_plans_nothing_anew() -> None:
    params = parameters()
    opt = NpuFusedAdam(params)
    step = compiled(opt)
    train(params, step)
    saved = opt.state_dict()
    for _ in range(2):
        train(params, step)
        opt.load_state_dict(saved)
    train(params, step)
    assert [r.cause for r in npu_fuse_pass.reports()] == ["compile"]


def test_twelve_instances_stay_compiled() -> None:
    """More instances of a class than torch's limit of 8 compiles, with at most one compile for each."""
    backend = Counting()
    made = []
    for i in range(12):
        params = parameters([(3, 4), (2,)], seed=i)
        opt = NpuFusedAdam(params, lr=0.01 * (i + 1))
        made.append((params, compiled(opt, backend=backend), BY_NAME["adam"].oracle(params)))
        made[-1][2].options = [{"lr": 0.01 * (i + 1)}] * 2
    for seed in range(3):
        for params, step, oracle in made:
            train(params, step, oracle, [seed])
    assert 1 <= backend.calls <= 12
    for params, step, oracle in made:
        set_gradients(params, gradients(params, 9))
        oracle.step(gradients(params, 9))
        assert_one_fused_step(step)
        assert_close(params, oracle.values)


def test_profile_of_several_groups() -> None:
    """Three dtypes are three kernels; sums over all parameters are calls of their own, and the report says so."""
    params = [p for d in (torch.float16, torch.float32, torch.float64) for p in parameters(dtype=d)]
    step = compiled(BY_NAME["lamb_global"].build(params))
    train(params, step)
    step.check(len(params))
    report = last_report()
    assert len(report.groups) == 3
    assert len(stated_calls(report)) == 6
    assert_one_fused_step(step)


def test_an_unfused_step_shows_in_its_profile() -> None:
    params = parameters()
    opt = NpuFusedAdam(params)
    step = compiled(opt)
    train(params, step)
    for wrong in (opt.step, compiled(opt, platform="eager"), lambda: (step(), step()), lambda: None):
        with pytest.raises(AssertionError):
            assert_one_fused_step(wrong)
    assert any("aten::mul" in op for op in profiled(opt.step)[1])


@over(ONE_EACH)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends(case: Case, backend: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, "compiled", backend=backend)
    train(params, step, oracle)
    grads: list[Tensor | None] = [None, *gradients(params, 8)[1:]]
    set_gradients(params, grads)
    step()
    oracle.step(grads)
    assert_close(params, oracle.values)
