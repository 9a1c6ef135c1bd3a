"""The graph that runs where nothing is fused: what Dynamo took apart is one operation again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import npu_fuse_pass


class Slicing(torch.optim.Optimizer):
    """Adam's arithmetic, and a write to a part of a small parameter, for which nothing is fused."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            average = p.grad.square().add_(0.5)
            average.addcmul_(p.grad, p.grad, value=0.25)
            p.addcdiv_(p.grad, average, value=-self.param_groups[0]["lr"])
            p.as_strided((1,), (1,)).mul_(0.5)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("made", [npu_fuse_pass.compile_step, lambda opt: torch.compile(opt.step, backend="npu_fused")])
def test_products_with_a_value_are_one_operation(made: Callable[[Any], Callable[[], None]]) -> None:
    got, want = ([torch.nn.Parameter(torch.linspace(-1, 1, 7))] for _ in range(2))
    opt, other = Slicing(got), Slicing(want)
    step = made(opt)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "npu_fused", UserWarning)
        for k in range(5):
            for o, (p,) in ((opt, got), (other, want)):
                o.param_groups[0]["lr"] = 0.1 / (k + 1)  # a Python number that changes
                p.grad = torch.linspace(0.5, 2, 7) * (k + 1)
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                step()
            other.step()
    assert torch.equal(got[0], want[0])  # bit for bit, which a multiplication that is not rounded is not
    names = [event.name for event in trace.events()]
    assert npu_fuse_pass.reports()[-1].fallback and "aten::addcmul_" in names and "aten::addcdiv_" in names
    assert "prims::fma" not in names
