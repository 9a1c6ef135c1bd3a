"""Warnings name the line of whoever trains: while compiling, at a step, and of tools."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from tests.support.training import gradients, parameters, set_gradients

pytestmark = pytest.mark.usefixtures("afresh")


class Viewed(torch.optim.Optimizer):
    """Writes to a part of a parameter, which no kernel does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p[0].sub_(p.grad[0])


@npu_fuse_pass.rule(defaults={"lr": 0.1})
def cumulated(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    return param - lr * torch.cumsum(grad, 0)


def while_compiling_a_class() -> Callable[[], Any]:
    return torch.compile(ready(Viewed).step, backend="npu_fused")


def while_compiling_a_rule() -> Callable[[], Any]:
    return torch.compile(ready(cumulated).step, backend="npu_fused")


def at_a_step() -> Callable[[], Any]:
    opt = ready(optimizers.NpuFusedSGD)
    step = torch.compile(opt.step, backend="npu_fused")
    step()
    first, second = opt.param_groups[0]["params"]
    second.data = first.data
    return step


def of_a_dump() -> Callable[[], Any]:
    options = {"dump": "/dev/null/nowhere"}
    return torch.compile(ready(optimizers.NpuFusedSGD).step, backend="npu_fused", options=options)


def of_compile_step() -> Callable[[], Any]:
    opt = torch.optim.Adam(parameters(((3, 4), (3, 4))), fused=True)
    return lambda: npu_fuse_pass.compile_step(opt)


def ready(make: Callable[..., Any]) -> Any:
    params = parameters(((3, 4), (3, 4)))
    set_gradients(params, gradients(params, 0))
    return make(params, lr=0.1)


@pytest.mark.parametrize(
    "prepare",
    [while_compiling_a_class, while_compiling_a_rule, at_a_step, of_a_dump, of_compile_step],
    ids=lambda f: f.__name__,
)
def test_a_warning_names_the_users_line(prepare: Callable[[], Callable[[], Any]]) -> None:
    call = prepare()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        call()
    ours = [w for w in caught if "npu_fused" in str(w.message)]
    assert ours, [str(w.message) for w in caught]
    lines = {line, prepare.__code__.co_firstlineno + 2}  # of a lambda above: its own
    assert {w.filename for w in ours} == {__file__} and {w.lineno for w in ours} <= lines, [
        (w.filename, w.lineno, str(w.message)) for w in ours
    ]


def test_a_match_that_reads_a_total_and_a_counter_prints() -> None:
    """Its reason has roots and other operations in it, which are no slots."""
    params = [torch.nn.Parameter(torch.full((4, 4), 1.0 + i)) for i in range(2)]
    ms, vs = [torch.zeros(4, 4) for _ in params], [torch.zeros(4, 4) for _ in params]

    @torch.no_grad()
    def step(t: int) -> None:
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        for p, m, v in zip(params, ms, vs, strict=True):
            m.lerp_(p.grad, 0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
        total = sum((v / c2).sum() for v in vs) / 32
        for p, m, v in zip(params, ms, vs, strict=True):
            p.mul_(1 - 1e-2 / (total.sqrt() + 1e-8)).addcdiv_(m, (v / c2).sqrt() + 1e-8, value=-0.01 / c1)

    compiled = torch.compile(step, backend="npu_fused", dynamic=True)
    for t in range(2, 5):
        set_gradients(params, [torch.linspace(-1, t, 16).reshape(4, 4)] * 2)
        compiled(t)
    reports = npu_fuse_pass.reports()
    assert reports and all(r.groups and not r.reasons for r in reports)
    for report in reports:
        assert str(report) and all(g.match or "$" not in g.no_match for g in report.groups)
