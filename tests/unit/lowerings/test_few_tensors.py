"""Steps of few tensors, which Python checks, as those of small models; test_input_check.py has the native check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from tests.support.cases import ONE_EACH, Case, over
from tests.support.training import assert_close, assert_fused, clones, compiled, last_report, parameters, tier, train
from tests.unit.lowerings.test_input_check import BETWEEN, SHAPES, Params, checks, side_by_side, swapped, watched

FEW = SHAPES[:3]


@pytest.fixture(autouse=True)
def native(usual_input_check: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The native checks of a test: there are none."""
    return checks(monkeypatch)


@pytest.mark.parametrize("more", [-1, 0])
def test_from_how_many_tensors_on_the_check_is_native(more: int, usual_input_check: int, native: list[bool]) -> None:
    """A parameter and its gradient are two."""
    params = parameters([(5,)] * (usual_input_check // 2 + more))
    twins = clones(params)
    opt = optimizers.NpuFusedSGD(params, lr=0.1)
    side_by_side(params, compiled(opt), twins, torch.optim.SGD(twins, lr=0.1), 5)
    assert native == [] if more else True in native
    assert watched(opt) == (more == 0)
    assert_close(params, twins, 1e-6)


@over(ONE_EACH)
def test_every_optimizer(case: Case, native: list[bool]) -> None:
    params = parameters([(3, 4), (5,)])
    oracle, step = case.oracle(params), compiled(case.build(params))
    train(params, step, oracle, range(5))
    assert_close(params, oracle.values)
    step.check(len(params))
    assert native == []


@pytest.mark.parametrize("change", [f for f, _ in BETWEEN], ids=lambda f: f.__name__)
def test_what_changes_between_steps_is_noticed(change: Callable[[Params], None], native: list[bool]) -> None:
    params = parameters(FEW)
    twins = clones(params)
    opt, eager = optimizers.NpuFusedAdam(params, lr=0.1), torch.optim.Adam(twins, lr=0.1)
    side_by_side(params, compiled(opt), twins, eager, 8, change)
    assert_close(params, twins, 1e-5)
    assert native == []


@pytest.mark.parametrize("change", tier([f for f, _ in BETWEEN if f is not swapped]), ids=lambda f: f.__name__)
def test_what_changes_between_steps_of_stock_optimizers(change: Callable[[Params], None], native: list[bool]) -> None:
    params = parameters(FEW)
    twins = clones(params)
    opt, eager = (torch.optim.SGD(ps, lr=0.1, momentum=0.9) for ps in (params, twins))
    side_by_side(params, compiled(opt, fullgraph=False), twins, eager, 8, change)
    assert_close(params, twins, 1e-5)
    assert native == []


@pytest.mark.parametrize("make", [torch.optim.AdamW, optimizers.NpuFusedAdamW], ids=["stock", "rule"])
def test_training_of_a_small_model(make: Any, native: list[bool]) -> None:
    """Three parameters; a rate that is scheduled, clipped gradients, a frozen layer, a checkpoint."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False))
    twin = copy.deepcopy(model)
    opt, eager = make(model.parameters(), lr=0.05), torch.optim.AdamW(twin.parameters(), lr=0.05)
    step = npu_fuse_pass.compile_step(opt)
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (opt, eager)]
    for k in range(10):
        x = torch.randn(8, 4)
        for net, update in ((model, step), (twin, eager.step)):
            net.zero_grad()
            net[0].requires_grad_(k not in (4, 5))
            net(x).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            update()
        if k == 6:
            opt.load_state_dict(copy.deepcopy(eager.state_dict()))
            eager.load_state_dict(copy.deepcopy(opt.state_dict()))
        for rate in rates:
            rate.step()
    assert_close([*model.parameters()], [*twin.parameters()], 1e-5)
    assert_fused(last_report(), parameters=3)
    assert native == []
