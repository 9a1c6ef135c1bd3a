"""Parameter groups that differ in numbers alone (a learning rate for each layer) are captured once, into one kernel."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass import rule, total, zeros
from npu_fuse_pass.capture import rule as capture
from npu_fuse_pass.passes import group as grouping
from npu_fuse_pass.rules import prelude
from tests.support.training import (
    assert_close,
    assert_fused,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)

SHAPES = [(3, 4), (5,), (), (3, 4)] * 5


def groups(params: list[Any], options: Any) -> list[dict[str, Any]]:
    return [{"params": [p], **options(i)} for i, p in enumerate(params)]


def counted(module: Any, name: str) -> Any:
    return mock.patch.object(module, name, wraps=getattr(module, name))


def test_a_formula_is_traced_checked_and_made_canonical_once() -> None:
    params, others = parameters(SHAPES), parameters(SHAPES)

    def numbers(i: int) -> dict[str, Any]:
        return dict(lr=1e-2 * (i + 1), betas=(0.9, 0.9 + i / 1000), weight_decay=i / 100)

    with counted(prelude, "check_rule") as checks:
        opt = optimizers.NpuFusedAdamW(groups(params, numbers))
    torchs = torch.optim.AdamW(groups(others, numbers))
    step = compiled(opt)
    with counted(capture, "_trace") as traces, counted(grouping, "_canonicalise") as canonical:
        train(params, step, seeds=[0])
    assert checks.call_count == 2  # with matrices, and with vectors
    assert canonical.call_count == traces.call_count <= 2  # 0-dim parameters may need their own
    train(params, step, seeds=range(1, 4))
    train(others, torchs.step, seeds=range(4))
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))
    assert len(last_report().groups) == 1


def test_groups_with_other_options_have_formulas_of_their_own() -> None:
    params, others = parameters(SHAPES), parameters(SHAPES)

    def options(i: int) -> dict[str, Any]:
        return dict(lr=1e-2 * (i + 1), amsgrad=i % 2 == 0)

    opt, torchs = (
        cls(groups(ps, options)) for cls, ps in ((optimizers.NpuFusedAdam, params), (torch.optim.Adam, others))
    )
    step = compiled(opt)
    train(params, step, seeds=range(3))
    train(others, torchs.step, seeds=range(3))
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))
    assert len(last_report().groups) == 2


def _square(grad: Tensor) -> Tensor:
    return (grad * grad).sum()


@pytest.mark.parametrize("over", ["group", "optimizer"])
def test_totals_of_each_group(over: Any) -> None:
    """A total over a group is another one in every group, whatever else these share."""

    @rule(states={"buf": zeros}, defaults=dict(lr=0.1), totals={"square": total(_square, over=over)})
    def normalised(param, grad, buf, *, lr, square):  # type: ignore[no-untyped-def]
        new = 0.9 * buf + grad / (square.sqrt() + 1)
        return param - lr * new, new

    params = parameters(SHAPES)
    others, options = clones(params), (lambda i: dict(lr=1e-2 * (i + 1)))
    opt, eager = normalised(groups(params, options)), normalised(groups(others, options))
    train(params, compiled(opt), seeds=range(3))
    train(others, eager.step, seeds=range(3))
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))


@pytest.mark.parametrize("changed", ["a float", "an int", "a tensor", "betas", "a flag"])
def test_what_changes_between_steps(changed: str) -> None:
    """Whatever kind of number a group holds at a step counts at that step."""
    params, others = parameters(SHAPES), parameters(SHAPES)

    def settings(i: int) -> dict[str, Any]:
        return dict(lr=1e-2 * (i + 1), betas=(0.9, 0.99), amsgrad=False)

    opt, torchs = (
        cls(groups(ps, settings)) for cls, ps in ((optimizers.NpuFusedAdam, params), (torch.optim.Adam, others))
    )
    step = compiled(opt)
    changes: dict[str, Any] = {
        "a float": lambda g, i: g.update(lr=1e-3 * (i + 2)),
        "an int": lambda g, i: g.update(lr=i % 2),
        "a tensor": lambda g, i: g.update(lr=torch.tensor(1e-3 * (i + 2), dtype=torch.float64)),
        "betas": lambda g, i: g.update(betas=(0.8, 0.9 + i / 1000)),
        "a flag": lambda g, i: g.update(amsgrad=i > 1),
    }
    for seed in range(4):
        for some in (opt, torchs):
            for i, g in enumerate(some.param_groups):
                changes[changed](g, i + seed if changed != "a flag" else seed)
                if changed == "a flag" and some is torchs and seed == 2:
                    for p in g["params"]:
                        some.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
                if changed == "a tensor" and some is torchs:
                    g["lr"] = float(g["lr"])
        train(params, step, seeds=[seed])
        train(others, torchs.step, seeds=[seed])
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("make", [optimizers.NpuFusedAdamW, torch.optim.AdamW])
def test_groups_that_are_stepped_one_after_the_other(make: Any) -> None:
    """As DeepSpeed's ZeRO does: each group is the only one of its step. That is planned once, not at every step."""
    params = parameters(((4, 3), (5,), (2, 3)))
    others = clones(params)
    pairs = ((make, params), (torch.optim.AdamW, others))
    opts = [cls([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.0}], lr=0.1) for cls, ps in pairs]
    npu_fuse_pass.compile_optimizer_(opts[0])

    def each_alone(seed: int) -> None:
        for opt, ps in zip(opts, (params, others), strict=True):
            set_gradients(ps, gradients(ps, seed))
            groups = opt.param_groups
            for group in groups:
                opt.param_groups = [group]
                opt.step()
            opt.param_groups = groups
        assert_close(params, others, 1e-5)

    def planned() -> list[int]:
        return [sum(g.updates for g in report.groups) for report in npu_fuse_pass.reports()]

    each_alone(0)
    for opt in opts:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(1, 4):
        each_alone(seed)
    assert planned() == [1, 2]
    for opt, ps in zip(opts, (params, others), strict=True):
        set_gradients(ps, gradients(ps, 4))
        opt.step()
        opt.state[ps[0]]["exp_avg"].mul_(0.5)
    each_alone(5)
    del opts[0].state[params[2]], opts[1].state[others[2]]
    each_alone(6)
    assert planned()[2] == 3 and len(planned()) <= 5
    for report in npu_fuse_pass.reports():
        assert_fused(report, parameters=sum(g.updates for g in report.groups))
