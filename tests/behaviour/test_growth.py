"""The work of a step, and that of a first one, grows with the number of parameters, not with its square."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from tests.support.training import set_gradients

OURS = tuple(str(pathlib.Path(m.__file__ or "").parent) for m in (npu_fuse_pass, optimizers))
FEW, MANY = 24, 96


def instructions(function: Callable[[], Any]) -> int:
    """The number of Python instructions that this package executes in a call."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def ours(params: list[Any]) -> Callable[[], Any]:
    return torch.compile(optimizers.NpuFusedLamb(params, lr=0.1).step, backend="npu_fused")


def stock(params: list[Any]) -> Callable[[], Any]:
    return npu_fuse_pass.compile_step(torch.optim.AdamW(params, lr=0.1, amsgrad=True))


class Counting(torch.optim.Optimizer):
    """Counts steps in Python, changes gradients, and makes new tensors that stay."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["step"] += 1
        for p in group["params"]:
            gradient = p.grad.clone()
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(gradient.sign(), 0.5)
            gradient.mul_(average)
            p.grad.mul_(0.5)
            self.state[p]["last"] = gradient
            self.state[p]["count"] = self.state[p].get("count", torch.tensor(1.0)) + 1
            p.sub_(gradient, alpha=group["lr"] / group["step"])


def captured(params: list[Any]) -> Callable[[], Any]:
    return npu_fuse_pass.compile_step(Counting(params))


def with_stages(params: list[Any]) -> Callable[[], Any]:
    opt = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def step() -> None:
        for p in params:
            p.grad.copy_(torch.sinc(p.grad * 0.5))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    return torch.compile(step, backend="npu_fused")


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("made", [ours, stock, captured, with_stages])
def test_no_step_does_more_for_each_parameter_the_more_there_are(made: Any) -> None:
    first, later = {}, {}
    for n in (FEW, MANY):
        torch._dynamo.reset()
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(n)]
        step = made(params)

        def once(params: Any = params, step: Any = step) -> None:
            set_gradients(params, [torch.ones(5) for _ in params])
            step()

        first[n] = instructions(once)
        for _ in range(4):
            once()
        later[n] = instructions(once)
        report = npu_fuse_pass.reports()[-1]
        assert report.groups and not report.fallback, report
    print(made.__name__, first, later)
    for found in (first, later):
        assert found[MANY] < 1.2 * MANY / FEW * found[FEW], (first, later)
