"""torch.optim's own classes, and one update written three ways: rule, plain loop, foreach. Names change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from tests.support.training import (
    Step,
    assert_fused,
    assert_one_fused_step,
    clones,
    compiled,
    error,
    gradients,
    last_report,
    parameters,
    profiled,
    set_gradients,
    stated_calls,
    take_over,
    train,
)

ADAM, SGD = torch.optim.Adam, torch.optim.SGD
STOCK = [
    (ADAM, dict(lr=0.02)),
    (ADAM, dict(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)),
    (ADAM, dict(lr=0.02, amsgrad=True)),
    (SGD, dict(lr=0.05, momentum=0.9)),
    (SGD, dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    (SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
]
SHAPES = [(3, 4), (5,), (40, 50), (2, 3, 2), (5,)]

pytestmark = pytest.mark.usefixtures("afresh")  # instances of one class share torch's limit of 8 compiles


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize(("cls", "options"), STOCK, ids=str)
def test_stock(cls: Any, options: dict[str, Any], foreach: bool, dtype: torch.dtype, limit: float) -> None:
    """Every step against eager's from the same values, with another lr at each; one group of all parameters."""
    params = parameters(SHAPES, dtype)
    others = clones(params)
    opt, stock = (cls(p, foreach=foreach, **options) for p in (params, others))
    step = compiled(opt, fullgraph=False)
    for seed in range(8):
        take_over(opt, params, stock, others)
        before = [p.detach().clone() for p in params]
        for o in (opt, stock):
            o.param_groups[0]["lr"] = options["lr"] * (1 + seed)
        grads = gradients(params, seed)
        set_gradients(params, grads)
        set_gradients(others, grads)
        if seed > 3:
            kernels, _ = profiled(step)
            assert sorted(kernels) == stated_calls(last_report())
        else:
            step()
        stock.step()
        for p, q, old in zip(params, others, before, strict=True):
            assert error(p, q, old) <= limit
            assert opt.state[p].keys() == stock.state[q].keys()
            for name, value in stock.state[q].items():
                if isinstance(value, Tensor):
                    assert error(opt.state[p][name], value) <= limit
    for report in npu_fuse_pass.reports():
        assert_fused(report, parameters=len(params))
        assert [g.updates for g in report.groups] == [len(params)]
        assert [g.launches for g in report.groups] == [1]


def test_stock_step_in_a_profile() -> None:
    """Besides the kernel: nothing on tensors of several elements."""
    for cls, options in ((ADAM, dict(lr=0.01)), (SGD, dict(lr=0.01, momentum=0.9))):
        params = parameters(SHAPES)
        step = compiled(cls(params, **options), fullgraph=False)
        train(params, step, seeds=range(3))
        assert_one_fused_step(step)


def test_a_number_has_the_name_of_its_option() -> None:
    """One that differs from an earlier optimizer's is an argument of the graph."""
    for weight_decay in (0.2, 0.3):
        params = parameters(SHAPES)
        train(params, compiled(ADAM(params, weight_decay=weight_decay), fullgraph=False), seeds=range(1))
    assert "param·weight_decay + grad" in str(last_report())


@pytest.mark.parametrize("before", [0, 2])
def test_stock_groups_share_a_kernel(before: int) -> None:
    """Parameter groups that differ in numbers are one group of the pass, each with its own numbers.

    Args:
        before: steps of an optimizer of the class that has one group; the options of the second one did not change.
    """
    other = parameters(SHAPES)
    train(other, compiled(ADAM(other, lr=0.1, weight_decay=0.2), fullgraph=False), seeds=range(before))
    params = parameters(SHAPES)
    others = clones(params)
    opt, stock = (
        ADAM([dict(params=p[:2], lr=0.1, weight_decay=0.2), dict(params=p[2:], weight_decay=0.1)], lr=0.01)
        for p in (params, others)
    )
    step = compiled(opt, fullgraph=False)
    train(params, step)
    train(others, stock.step)
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5
    assert [g.updates for g in last_report().groups] == [len(SHAPES)]
    assert "epsilon = 1e-08" in str(last_report())


def test_stock_under_a_backend_that_passes_through_is_noticed() -> None:
    params = parameters(SHAPES)
    step = Step(ADAM(params), "compiled", backend=lambda gm, inputs: gm.forward, fullgraph=False)
    train(params, step)
    with pytest.raises(AssertionError):
        step.check(len(params))


def test_states_have_memory_of_their_own() -> None:
    """Also the small ones, which get it anew: where a step goes through them, one behind the other."""
    params = parameters([(1024,)] * 100 + [(200, 200)])
    others = clones(params)
    opt, eager = ADAM(params, lr=0.01), ADAM(others, lr=0.01)
    step = npu_fuse_pass.compile_step(opt)
    train(params, step)
    train(others, eager.step)
    assert_fused(last_report(), parameters=len(params))
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5
    states = [t for p in params for t in opt.state[p].values()]
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.is_leaf and t._base is None for t in states)


def test_a_parameter_that_grows_with_its_states() -> None:
    """`resize_` keeps what a state holds, and touches no other one."""
    pairs = []
    for compile_step in (npu_fuse_pass.compile_step, lambda opt: opt.step):
        params = parameters([(2, 3), (4, 3), (5,)])
        opt = ADAM(params, lr=0.01)
        step = compile_step(opt)
        train(params, step)
        grown = params[0]
        grown.data = torch.cat([grown.data, torch.ones(2, 3)])
        for name in ("exp_avg", "exp_avg_sq"):
            opt.state[grown][name].resize_(4, 3)[2:].zero_()
        train(params, step)
        pairs.append([*params, *(t for p in params for t in opt.state[p].values())])
    assert_fused(last_report(), parameters=3)
    assert max(error(t, u) for t, u in zip(*pairs, strict=True)) <= 1e-5
