"""One update written three ways, as a rule, a plain loop and with foreach, is one group; names change nothing."""

from __future__ import annotations

import dataclasses
import random
import string
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass import rule, zeros
from tests.support.cases import ONE_EACH, Case, over
from tests.support.graphs import batches_of
from tests.support.training import compiled, gradients, last_report, parameters, profiled, set_gradients, train

SHAPES = [(3, 4), (5,), (40, 50), (2, 3, 2), (5,)]

pytestmark = pytest.mark.usefixtures("afresh")  # instances of one class share torch's limit of 8 compiles


NUMBERS = dict(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.05)


def update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam with decoupled decay that looks one step ahead."""
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (grad * grad)
    ahead = beta1 * exp_avg + (1 - beta1) * grad
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    change = ahead / denominator + weight_decay * param
    return param - lr / (1 - beta1**step) * change, exp_avg, exp_avg_sq


by_rule = rule(states=dict(exp_avg=zeros, exp_avg_sq=zeros), defaults=NUMBERS)(update)


class Plain(torch.optim.Optimizer):
    """The same as somebody wrote it yesterday: a loop, with numbers as 0-dim tensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {k: torch.tensor(v, dtype=torch.float64) for k, v in NUMBERS.items()})

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float64)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            state = self.state[p]
            for to, what in zip(lists, (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]), strict=True):
                to.append(what)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *lists)
            if lists[0]:
                self.run(*lists, **{k: group[k] for k in NUMBERS})

    def run(self, params: Any, grads: Any, ms: Any, vs: Any, ts: Any, **k: Any) -> None:
        for p, g, m, v, t in zip(params, grads, ms, vs, ts, strict=True):
            t.add_(1)
            m.copy_(k["beta1"] * m + (1 - k["beta1"]) * g)
            v.mul_(k["beta2"]).add_((1 - k["beta2"]) * (g * g))
            denominator = (v / (1 - k["beta2"] ** t)).sqrt_().add_(k["eps"])
            change = (k["beta1"] * m + (1 - k["beta1"]) * g).div_(denominator).add_(k["weight_decay"] * p)
            p.sub_(k["lr"] / (1 - k["beta1"] ** t) * change)


class Foreach(Plain):
    def run(self, params: Any, grads: Any, ms: Any, vs: Any, ts: Any, **k: Any) -> None:
        torch._foreach_add_(ts, 1)
        torch._foreach_mul_(ms, k["beta1"])
        torch._foreach_add_(ms, torch._foreach_mul(grads, 1 - k["beta1"]))
        squares = torch._foreach_mul(grads, grads)
        torch._foreach_mul_(squares, 1 - k["beta2"])
        torch._foreach_mul_(vs, k["beta2"])
        torch._foreach_add_(vs, squares)
        ahead = torch._foreach_mul(ms, k["beta1"])
        torch._foreach_add_(ahead, torch._foreach_mul(grads, 1 - k["beta1"]))
        denominators = torch._foreach_div(vs, [1 - k["beta2"] ** t for t in ts])
        torch._foreach_sqrt_(denominators)
        for d in denominators:
            d.add_(k["eps"])
        torch._foreach_div_(ahead, denominators)
        torch._foreach_add_(ahead, torch._foreach_mul(params, k["weight_decay"]))
        torch._foreach_mul_(ahead, [k["lr"] / (1 - k["beta1"] ** t) for t in ts])
        torch._foreach_sub_(params, ahead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_update_written_three_ways(dtype: torch.dtype) -> None:
    """Rule, loop and foreach: one group of one name, the same canonical formula, the same bits."""
    found = []
    for make in (by_rule, Plain, Foreach):
        params = parameters(SHAPES, dtype)
        step = compiled(make(params), fullgraph=False)
        train(params, step)
        step.check(len(params))
        report = last_report()
        (node,) = [n for n in report.fused_graph.graph.nodes if "multi_tensor_update" in str(n.target)]
        (group,) = report.groups
        found.append((group.name, node.args[3], group.updates, params))
    assert found[0][:3] == found[1][:3] == found[2][:3]
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0][3], other[3], strict=True))


def test_another_formula_is_another_group() -> None:
    """The comparison above can fail: another order of operations has another text and name."""

    def other(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: Tensor) -> Any:
        return param - lr * grad, exp_avg, exp_avg_sq

    names = []
    for function in (update, other):
        params = parameters(SHAPES)
        opt = rule(states=dict(exp_avg=zeros, exp_avg_sq=zeros), defaults=NUMBERS)(function)(params)
        train(params, compiled(opt))
        names.append(last_report().groups[0].name)
    assert names[0] != names[1]


def run_renamed(case: Case, name: str | None) -> Any:
    """What a case computes and reports under another name of its rule."""
    params = parameters()
    opt = case.build(params)
    if name is not None:
        made = dataclasses.replace(opt.rule_for(opt.param_groups[0]), name=name)
        made.function.__name__ = name
        opt.rule_for = lambda group: made
    step = compiled(opt)
    train(params, step)
    step.check(len(params))
    assert name is None or {batch.rule.name for batch in batches_of(opt)} == {name}
    groups = [(g.name, g.kernel, g.formula, g.updates) for g in last_report().groups]
    set_gradients(params, gradients(params, 9))
    return groups, profiled(step)[0], params


@over(ONE_EACH)
def test_a_rule_renamed_at_random(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "".join(random.choices(string.ascii_letters, k=20))
    want = run_renamed(case, None)
    opt = case.build(parameters())
    function = opt.rule_for(opt.param_groups[0]).function
    monkeypatch.setattr(function, "__name__", function.__name__)  # is put back afterwards
    got = run_renamed(case, name)
    assert got[:2] == want[:2]
    assert all(torch.equal(p, q) for p, q in zip(got[2], want[2], strict=True))
