"""Plain `torch.compile(opt.step, backend="npu_fused")` of optimizers of other people: two compiles, for ever."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from tests.support.training import assert_close, clones, gradients, parameters, set_gradients

SHAPES = ((3, 4), (5, 1), (4, 6))
LRS = (0.1, 0.1, 0.05, 0.05, 0.02, 0.03, 0.03, 0.01)  # of eight steps


class InState(torch.optim.Optimizer):
    """Momentum with an average and a Python count for each parameter, as public libraries write it."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9, **options})

    def correction(self, beta: float, step: int) -> float:
        return 1 - beta**step  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["average"] = torch.zeros_like(p)
                state["step"] += 1
                self.update(p, p.grad, state, group, state["step"])

    def update(self, p: Tensor, grad: Any, state: dict[str, Any], group: dict[str, Any], step: int) -> None:
        state["average"].mul_(group["beta"]).add_(grad, alpha=1 - group["beta"])
        p.add_(state["average"], alpha=-group["lr"] / self.correction(group["beta"], step))


class InGroup(InState):
    """The count is the group's, and the first step makes it."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            for p in group["params"]:
                self.state[p].setdefault("average", torch.zeros_like(p))
                self.update(p, p.grad, self.state[p], group, group["step"])


class WithPow(InState):
    def correction(self, beta: float, step: int) -> float:
        return 1 - math.pow(beta, step)


class Counted:
    """A plain compiled step beside an eager one; `compiles` has what the backend compiled at each step."""

    def __init__(self, make: Callable[..., Any], **options: Any) -> None:
        torch._dynamo.reset()
        self.params = parameters(SHAPES)
        others = clones(self.params)
        self.opt, self.eager = make(self.params, **options), make(others, **options)
        self.step = torch.compile(self.opt.step, backend="npu_fused")
        self.seeds = itertools.count()
        self.compiles: list[int] = []

    def train(self, lrs: tuple[float, ...] = LRS) -> None:
        """Steps with these learning rates, each equal to the eager one's."""
        for lr in lrs:
            grads = gradients(self.params, next(self.seeds))
            before = len(npu_fuse_pass.reports())
            for opt, step in ((self.opt, self.step), (self.eager, self.eager.step)):
                opt.param_groups[0]["lr"] = lr
                set_gradients(opt.param_groups[0]["params"], grads)
                step()
            self.compiles.append(len(npu_fuse_pass.reports()) - before)
            assert_close(list(self.values(self.opt)), list(self.values(self.eager)))

    def values(self, opt: Any) -> Iterator[Tensor]:
        """Parameters, states and numbers of the group."""
        for p in opt.param_groups[0]["params"]:
            yield p
            yield from (torch.as_tensor(value, dtype=torch.float32) for value in opt.state[p].values())
        for value in opt.param_groups[0].values():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield torch.tensor(value, dtype=torch.float64)


def momentum(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


@pytest.fixture(autouse=True)
def no_reports() -> None:
    npu_fuse_pass.clear_reports()


@pytest.mark.parametrize("make", [InState, InGroup, WithPow, momentum], ids=["state", "group", "math.pow", "SGD"])
def test_two_compiles_in_eight_steps_with_five_learning_rates(make: Any) -> None:
    """The first makes states, the second finds them; all numbers that change are symbolic then."""
    counted = Counted(make)
    counted.train()
    assert counted.compiles == [1, 1, 0, 0, 0, 0, 0, 0]
    assert_fused()


def assert_fused() -> None:
    """Every compile fused the updates of all parameters, with nothing left."""
    for report in npu_fuse_pass.reports():
        assert report.fallback is None and not report.reasons, report
        of_tensors = [group for group in report.groups if group.dtype == "f32"]  # a count is an f64 of its own
        assert sum(group.updates for group in of_tensors) == len(SHAPES), report


class Ranked(InState):
    """The first step leaves numbers in the states that shape tensors, count rounds and choose a branch."""

    def update(self, p: Tensor, grad: Any, state: dict[str, Any], group: dict[str, Any], step: int) -> None:
        rows, rounds = state.setdefault("rows", p.shape[0]), state.setdefault("rounds", 2)
        state["average"].mul_(torch.full((rows, 1), 0.9)).add_(grad)
        for _ in range(rounds):
            state["average"].mul_(0.5)
        p.add_(state["average"], alpha=-group["lr"] if step < 5 else group["lr"])


def test_numbers_that_shape_tensors_and_choose_what_runs_keep_their_guards() -> None:
    """A number whose value the graph needs is part of it: another value is another graph, and never the old one."""
    counted = Counted(Ranked)
    counted.train()
    assert counted.compiles == [1, 1, 0, 0, 1, 0, 0, 0]
    assert_fused()
    for opt in (counted.opt, counted.eager):
        for state in opt.state.values():
            state["rounds"] = 3
    counted.train(LRS[:3])
    assert counted.compiles[8:] == [1, 0, 0]


def test_states_from_a_checkpoint_and_a_second_optimizer_of_the_class() -> None:
    counted = Counted(InState)
    counted.train(LRS[:4])
    loaded = Counted(InState)
    for opt, source in ((loaded.opt, counted.opt), (loaded.eager, counted.eager)):
        opt.load_state_dict(source.state_dict())
    loaded.train()
    assert sum(loaded.compiles) <= 2
    assert_fused()


def test_compiles_of_other_backends_are_as_before() -> None:
    """They count on Dynamo's own guesses, which need a third compile, and do not see math.pow as an operation."""
    npu = Counted(WithPow)
    npu.train(LRS[:3])
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    for make, compiles in ((InState, 3), (WithPow, 6)):
        counted = Counted(make)
        counted.step = torch.compile(counted.opt.step, backend=keep)
        graphs.clear()
        counted.train(LRS[:6])
        assert len(graphs) == compiles
    assert not any(hasattr(torch, name) for name in ("_sym_pow", "_sym_exp"))
