"""Optimizers that count their steps in Python and take math's functions of them: no compile for each value."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import npu_fuse_pass
from npu_fuse_pass.tools.symbolic import symbolic_numbers

from .support import FULL, assert_close, clones, gradients, parameters, set_gradients

Number = Callable[[float, int], float]

NUMBERS: dict[str, Number] = {
    "math.pow": lambda beta, step: 1 - math.pow(beta, step),
    "power": lambda beta, step: 1 - beta**step,
    "math.sqrt": lambda beta, step: math.sqrt(1 - beta**step),
    "math.log": lambda beta, step: math.log(step + 1),
    "math.log with a base": lambda beta, step: math.log(step + 1, 10),
    "math.exp": lambda beta, step: math.exp(-step / 10),
}


class Counting(torch.optim.Optimizer):
    """Momentum with a factor that is computed from a count in a group or in each state."""

    def __init__(self, params: Any, number: Number, in_group: bool) -> None:
        super().__init__(params, {"lr": 0.1, "beta": 0.9})
        self.number, self.in_group = number, in_group

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self.in_group:
                group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["average"] = torch.zeros_like(p)
                state["step"] += 1
                step = group["step"] if self.in_group else state["step"]
                state["average"].mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p.add_(state["average"], alpha=-group["lr"] * self.number(group["beta"], step))


@pytest.mark.parametrize("in_group", [True, False], ids=["group", "state"])
@pytest.mark.parametrize("name", NUMBERS if FULL else ["math.pow", "math.log with a base"])
def test_counts(name: str, in_group: bool) -> None:
    """Ten steps and two learning rates: a compile that makes the states, one that learns that the count changes, one
    that keeps it, and one for a learning rate that changes."""
    torch._dynamo.reset()
    counters.clear()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Counting(ps, NUMBERS[name], in_group) for ps in (params, others))
    step = npu_fuse_pass.compile_step(opt)
    for seed in range(10):
        for some in (opt, eager):
            some.param_groups[0]["lr"] = 0.1 if seed < 5 else 0.01 * seed
        for ps in (params, others):
            set_gradients(ps, gradients(ps, seed))
        step()
        eager.step()
    assert_close(params, others)
    reports = npu_fuse_pass.reports()
    assert counters["stats"]["unique_graphs"] <= 4
    assert all(report.groups and report.fallback is None and not report.reasons for report in reports)


def test_nobody_elses_compiles_are_touched() -> None:
    """torch has the added names while a step of ours is called, by whichever thread, and not afterwards."""
    names = ("_sym_pow", "_sym_log", "_sym_exp")
    had = [hasattr(torch, name) for name in names]

    def graph_of(function: Callable[[torch.Tensor, int], torch.Tensor]) -> int:
        graphs = []

        def keep(gm: Any, inputs: Any) -> Any:
            graphs.append(gm)
            return gm.forward

        torch._dynamo.reset()
        compiled = torch.compile(function, backend=keep)
        for step in range(3, 6):
            compiled(torch.ones(2), step)
        assert not any(
            node.target.__name__ in names for gm in graphs for node in gm.graph.nodes if callable(node.target)
        )
        return len(graphs)

    inside = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with symbolic_numbers():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with symbolic_numbers():
        thread.start()
        inside.wait(10)
    assert all(hasattr(torch, name) for name in names)
    leave.set()
    thread.join()
    assert [hasattr(torch, name) for name in names] == had
    graph_of(lambda x, step: x * math.pow(0.9, step))
    with pytest.raises(ZeroDivisionError), symbolic_numbers():
        _ = 1 / 0
    assert [hasattr(torch, name) for name in names] == had
