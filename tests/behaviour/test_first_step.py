"""The first step of an optimizer that nobody here wrote runs as it is; what is compiled then finds its states made."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.reasons import Code
from tests.support.training import (
    Unseen,
    assert_close,
    assert_fused,
    clones,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
    warned,
)

SHAPES = [(3, 4), (5,)]


class Copies(torch.optim.Optimizer):
    """Momentum whose states are copies made by `copy.deepcopy`, which Dynamo refuses, and a cube that no kernel has."""

    def __init__(self, params: Any, unfused: bool = False, several: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self.unfused, self.several = unfused, several
        self.called: list[int] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if len(state) == 0:
                state["average"] = copy.deepcopy(p.grad)
            state["average"].mul_(0.9).add_(p.grad)
            p.add_(state["average"].cumsum(0) if self.unfused else state["average"], alpha=-0.1)
        return loss


class Stateless(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


pytestmark = pytest.mark.usefixtures("afresh")


@pytest.mark.parametrize(("cls", "in_place"), [(Copies, False), (Stateless, True)], ids=["states", "none, in place"])
def test_the_second_step_is_the_first_that_is_compiled(cls: Any, in_place: bool) -> None:
    params = parameters(SHAPES)
    others = clones(params)
    opt, eager = cls(params), cls(others)
    step = npu_fuse_pass.compile_optimizer_(opt).step if in_place else npu_fuse_pass.compile_step(opt)
    train(params, step, seeds=range(1))
    assert not npu_fuse_pass.reports()
    train(params, step, seeds=range(1, 4))
    train(others, eager.step)
    assert_close(params, others)
    assert len(npu_fuse_pass.reports()) == 1
    assert_fused(last_report(), parameters=2)


def test_a_first_step_that_fails_was_none() -> None:
    """The next one makes the states, which Dynamo cannot: it would leave the code of all steps to Python."""
    params = parameters(SHAPES)
    others = clones(params)
    opt, eager = Copies(params), Copies(others)
    step = npu_fuse_pass.compile_step(opt)

    def no_batch() -> None:
        raise StopIteration

    with pytest.raises(StopIteration):
        step(no_batch)
    train(params, step)
    train(others, eager.step)
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))


def test_states_of_a_checkpoint_are_compiled_at_once() -> None:
    params = parameters(SHAPES)
    others = clones(params)
    before, eager = Copies(params), Copies(others)
    train(params, before.step, seeds=range(2))
    opt = Copies(params)
    opt.load_state_dict(before.state_dict())
    train(params, npu_fuse_pass.compile_step(opt), seeds=range(2, 3))
    train(others, eager.step, seeds=range(3))
    assert_close(params, others)
    assert_fused(last_report(), parameters=2)


def test_hooks_and_closures_run_once_in_every_step() -> None:
    params = parameters(SHAPES)
    opt = Copies(params)
    called: list[str] = []
    opt.register_step_pre_hook(lambda *args: called.append("pre"))
    opt.register_step_post_hook(lambda *args: called.append("post"))

    def closure() -> Tensor:
        called.append("closure")
        set_gradients(params, gradients(params, 0))
        return torch.tensor(float(len(called)))

    step = npu_fuse_pass.compile_step(opt)
    losses = [float(step(closure)) for _ in range(3)]
    assert called == ["pre", "closure", "post"] * 3 and losses == [2, 5, 8]
    assert_fused(last_report(), parameters=2)


def test_strict_raises_at_the_step_that_is_compiled() -> None:
    params = parameters(SHAPES)
    step = npu_fuse_pass.compile_step(Copies(params, unfused=True), strict=True)
    train(params, step, seeds=range(1))
    before = [p.detach().clone() for p in params]
    with pytest.raises(npu_fuse_pass.UnfusedError, match="cumsum"):
        train(params, step, seeds=range(1, 2))
    assert_close(params, before)


@pytest.mark.parametrize("in_place", [False, True], ids=["compile_step", "compile_optimizer_"])
def test_what_never_reaches_the_backend_is_said_at_the_second_step(in_place: bool) -> None:
    params = parameters(SHAPES)
    others = clones(params)
    opt = Unseen(params)
    step = npu_fuse_pass.compile_optimizer_(opt).step if in_place else npu_fuse_pass.compile_step(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(params, step, seeds=range(1))
    said: Any = pytest.warns(UserWarning, match="nothing was compiled.*two steps of Unseen")
    with said if in_place else pytest.raises(npu_fuse_pass.NotCapturedError, match=r"two steps of Unseen.*Dynamo"):
        train(params, step, seeds=range(1, 2))
    if in_place:
        assert not warned(lambda: train(params, step, seeds=range(2, 4)))
    train(others, Unseen(others).step, seeds=range(4 if in_place else 2))
    assert_close(params, others)


class Looping(Stateless):
    """Reads a value in a loop, which Dynamo then skips as a whole."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad.sum() > 0:
                p.sub_(p.grad)


class LoopingItself(Stateless):
    """The same without a decorator: Dynamo skips the step itself, and only counts why."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad.sum() > 0:
                p.data.sub_(p.grad)


@pytest.mark.parametrize("cls", [Looping, LoopingItself])
def test_the_error_says_why_and_where_a_loop_is_skipped(cls: Any) -> None:
    params = parameters(SHAPES)
    step = npu_fuse_pass.compile_step(cls(params))
    with pytest.raises(
        npu_fuse_pass.NotCapturedError, match=r"Data-dependent branching \(.*test_first_step.py:\d+, in step"
    ):
        train(params, step, seeds=range(2))
    assert "test_first_step.py:" in str(npu_fuse_pass.explain(cls(params)).fallback)


class LoopingBehindAClosure(Stateless):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        for p in self.param_groups[0]["params"]:
            if p.grad.sum() > 0:
                p.data.sub_(p.grad)
        return loss


def test_that_a_closure_runs_apart_is_not_why_a_step_is_not_captured() -> None:
    params = parameters(SHAPES)
    step = npu_fuse_pass.compile_step(LoopingBehindAClosure(params))
    with pytest.raises(npu_fuse_pass.NotCapturedError, match=r"Data-dependent branching \(.*test_first_step.py:\d+"):
        train(params, lambda: step(lambda: torch.ones(())), seeds=range(2))


def doubled(x: Tensor) -> Tensor:
    return x * 2


class LoopingAround(Stateless):
    """Dynamo skips the loop, with the updates in it, and compiles a function that it calls."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            x = doubled(p.grad)
            if x.sum() > 0:
                p.data.sub_(x)


@pytest.mark.parametrize("options", [None, {}, {"strict": True}], ids=["compile_step", "compile_optimizer_", "strict"])
def test_a_step_of_which_graphs_update_nothing_is_not_captured(options: Any) -> None:
    params = parameters(SHAPES)
    others = clones(params)
    opt = LoopingAround(params)
    in_place = options is not None
    step = npu_fuse_pass.compile_optimizer_(opt, **options).step if in_place else npu_fuse_pass.compile_step(opt)
    train(params, step, seeds=range(1))
    said: Any = pytest.warns(UserWarning, match="nothing was compiled.*Data-dependent branching")
    with pytest.raises(npu_fuse_pass.NotCapturedError, match="no update") if options != {} else said:
        train(params, step, seeds=range(1, 2))
    if options == {}:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(params, step, seeds=range(2, 4))
    train(others, LoopingAround(others).step, seeds=range(4 if options == {} else 2))
    assert_close(params, others)
    assert npu_fuse_pass.explain(LoopingAround(params)).reasons[0].code is Code.VALUE


class InPlaceOfAPart(Stateless):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p[:1].sub_(p.grad[:1])


@pytest.mark.parametrize("in_place", [False, True], ids=["compile_step", "compile_optimizer_"])
def test_a_step_that_is_all_fallback_is_said_once_and_strict_raises(in_place: bool) -> None:
    def compiled(params: Any, **options: Any) -> Any:
        opt = InPlaceOfAPart(params)
        if in_place:
            return npu_fuse_pass.compile_optimizer_(opt, **options).step
        return npu_fuse_pass.compile_step(opt, **options)

    params = parameters(SHAPES)
    others = clones(params)
    step = compiled(params)
    said = warned(lambda: train(params, step, seeds=range(5)))
    assert len(said) == 1 and "not fused, the original step runs: sub_: writes in place through a view" in said[0]
    assert "What to do: write to the whole tensor" in said[0]
    train(others, InPlaceOfAPart(others).step, seeds=range(5))
    assert_close(params, others)
    step = compiled(params, strict=True)
    train(params, step, seeds=range(1))
    with pytest.raises(npu_fuse_pass.UnfusedError, match="writes in place through a view"):
        train(params, step, seeds=range(1, 2))


def test_a_parameter_whose_gradient_comes_later() -> None:
    """Its state is made within a compiled step, or eagerly where Dynamo refuses, and is right."""
    params = parameters(SHAPES)
    others = clones(params)
    opt, eager = Copies(params), Copies(others)
    step = npu_fuse_pass.compile_step(opt)
    for ps, some in ((params, step), (others, eager.step)):
        for seed in range(4):
            set_gradients(ps, [g if i == 0 or seed > 1 else None for i, g in enumerate(gradients(ps, seed))])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="npu_fused: a step of Copies ran eagerly")
                some()
    assert_close(params, others)


def test_explain_reports_the_steps_that_follow() -> None:
    report = npu_fuse_pass.explain(Copies(parameters(SHAPES)))
    assert_fused(report, parameters=2)
    report = npu_fuse_pass.explain(Copies(parameters(SHAPES), unfused=True))
    assert [reason.code for reason in report.reasons] == [Code.OPERATION]


class Counted(torch.optim.Optimizer):
    """Looks for a count beside the parameters' states, as madgrad.MADGRAD: Dynamo meets a parameter as a key first."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if "k" not in self.state:
            self.state["k"] = torch.zeros((), dtype=torch.int64)  # type: ignore[index]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(0.9).add_(p.grad)
                p.sub_(buffer, alpha=self.param_groups[0]["lr"])
        self.state["k"] += 1  # type: ignore[index]


@pytest.mark.parametrize("plain", [False, True], ids=["compile_step", "torch.compile"])
def test_new_gradients_of_parameters_that_are_keys_compile_nothing(plain: bool) -> None:
    params = parameters(SHAPES)
    opt, other = Counted(params), Counted(clones(params))
    step = torch.compile(opt.step, backend="npu_fused") if plain else npu_fuse_pass.compile_step(opt)
    train(params, step, seeds=range(3))
    npu_fuse_pass.clear_reports()
    train(params, step, seeds=range(3, 7))
    train(other.param_groups[0]["params"], other.step, seeds=range(7))
    assert not npu_fuse_pass.reports()
    assert_close(params, other.param_groups[0]["params"], 1e-6)
