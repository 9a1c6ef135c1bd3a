"""Learning rates of optimizers.paddle.RMSProp: groups' factors, set_lr, Paddle's and torch's schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import optimizers.paddle as paddle
from optimizers.paddle import PiecewiseDecay, PiecewiseLR, RMSProp
from tests.support.paddle_support import BOUNDARIES, VALUES, Loop, both_modes, check
from tests.support.training import parameters

TWELVE = [0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0, 1.0, 1.0]

# Learning rate ----------------------------------------------------------------------------------------------


@both_modes
def test_a_groups_learning_rate_is_a_factor(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    groups = [{"params": params[:2]}, {"params": params[2:], "learning_rate": 0.1, "weight_decay": 0.5}]
    opt = RMSProp(0.2, parameters=groups, weight_decay=0.01)
    assert opt.get_lr() == 0.2
    loops = [Loop(params[:2], lr=0.2, decay=("l2", 0.01)), Loop(params[2:], lr=0.02, decay=("l2", 0.5))]

    def halve(t: int) -> None:
        if t == 3:
            opt.set_lr(0.1)
            loops[0].options["lr"], loops[1].options["lr"] = 0.1, 0.01

    check(params, opt, loops, mode, between=halve)
    assert opt.get_lr() == 0.1


@both_modes
def test_groups_have_options_of_their_own_and_can_be_added(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, parameters=params[:2])
    own = dict(rho=0.8, epsilon=1e-2, momentum=0.5, centered=True)
    opt.add_param_group({"params": params[2:], "learning_rate": 3, **own})
    loops = [Loop(params[:2]), Loop(params[2:], lr=0.06, **own)]
    check(params, opt, loops, mode)


def test_set_lr_and_get_lr() -> None:
    opt = RMSProp(0.1, parameters=parameters())
    for value in (0.2, 0.3, 1):
        assert opt.set_lr(value) is None
        assert opt.get_lr() == value
        assert type(opt.get_lr()) is float


@pytest.mark.parametrize("value", [torch.tensor(0.1), "0.1", None], ids=repr)
def test_set_lr_takes_only_numbers(value: Any) -> None:
    opt = RMSProp(0.1, parameters=parameters())
    with pytest.raises(TypeError, match="must be float"):
        opt.set_lr(value)
    assert opt.get_lr() == 0.1


@pytest.mark.parametrize("scheduler", [PiecewiseDecay(BOUNDARIES, VALUES), PiecewiseLR(BOUNDARIES, VALUES)])
def test_set_lr_refuses_to_fight_a_scheduler(scheduler: Any) -> None:
    opt = RMSProp(scheduler, parameters=parameters())
    with pytest.raises(RuntimeError) as e:
        opt.set_lr(0.1)
    assert str(e.value) == (
        "optimizer's learning rate can't be LRScheduler when invoke this API, because this will lead to conflict."
    )


def test_get_lr_with_a_scheduler_follows_it() -> None:
    scheduler = PiecewiseDecay(BOUNDARIES, VALUES)
    opt = RMSProp(scheduler, parameters=parameters())
    seen = []
    for _ in range(12):
        opt.step()
        seen.append(opt.get_lr())
        scheduler.step()
    assert seen == TWELVE


@both_modes
def test_steps_with_a_scheduler(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    scheduler = PiecewiseDecay([1, 3], [0.1, 0.02, 0.3])
    groups = [{"params": params[:2]}, {"params": params[2:], "learning_rate": 0.5}]
    opt = RMSProp(scheduler, momentum=0.9, parameters=groups)
    loops = [Loop(params[:2], momentum=0.9), Loop(params[2:], momentum=0.9)]

    def follow(t: int) -> None:
        if t:
            scheduler.step()
        lr = [0.1, 0.02, 0.02, 0.3, 0.3][t]
        loops[0].options["lr"], loops[1].options["lr"] = lr, 0.5 * lr

    check(params, opt, loops, mode, between=follow)
    assert [g["lr"] for g in opt.param_groups] == [0.3, 0.3]


# Schedulers -------------------------------------------------------------------------------------------------


def values_of(scheduler: paddle.LRScheduler, steps: int = 12) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(scheduler())
        scheduler.step()
    return seen


def test_piecewise_decay() -> None:
    assert values_of(PiecewiseDecay(BOUNDARIES, VALUES)) == TWELVE
    assert values_of(PiecewiseDecay(BOUNDARIES, VALUES, last_epoch=0))[:4] == [0.2, 0.4, 0.4, 0.6]
    assert values_of(PiecewiseDecay(BOUNDARIES, VALUES, -1, False)) == TWELVE
    for boundaries, values in (([], [1.0]), ([1, 2], [0.1, 0.2])):
        with pytest.raises(ValueError, match="boundaries"):
            PiecewiseDecay(boundaries, values)


def test_piecewise_lr_of_the_document_begins_where_its_third_argument_says() -> None:
    assert values_of(PiecewiseLR(BOUNDARIES, VALUES, 0)) == TWELVE
    assert values_of(PiecewiseLR(BOUNDARIES, VALUES)) == TWELVE
    assert values_of(PiecewiseLR(BOUNDARIES, VALUES, begin=3), 4) == [0.4, 0.6, 0.6, 0.8]
    assert isinstance(PiecewiseLR(BOUNDARIES, VALUES), PiecewiseDecay)


def test_scheduler_steps_to_an_epoch_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = PiecewiseDecay(BOUNDARIES, VALUES, verbose=True)
    scheduler.step(epoch=5)
    assert (scheduler(), scheduler.last_epoch) == (0.6, 5)
    assert capsys.readouterr().out.splitlines()[-1] == "Epoch 5: PiecewiseDecay set learning rate to 0.6."


def test_scheduler_state_is_saved_by_the_user() -> None:
    scheduler = PiecewiseDecay(BOUNDARIES, VALUES)
    for _ in range(5):
        scheduler.step()
    other = PiecewiseDecay(BOUNDARIES, VALUES)
    other.set_state_dict(scheduler.state_dict())
    assert values_of(other, 4) == [0.6, 0.8, 0.8, 1.0]
    with pytest.raises(RuntimeError, match="last_epoch"):
        other.set_state_dict({"last_lr": 0.1})
    with pytest.warns(UserWarning, match="unused"):
        other.set_dict({**scheduler.state_dict(), "more": 1})


def test_own_schedulers_derive_from_the_base() -> None:
    class Inverse(paddle.LRScheduler):
        def get_lr(self) -> float:
            return self.base_lr / (1 + self.last_epoch)

    scheduler = Inverse(0.3)
    opt = RMSProp(scheduler, parameters=parameters())
    scheduler.step()
    assert opt.get_lr() == 0.15
    with pytest.raises(TypeError, match="must be float"):
        Inverse("0.3")
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        Inverse(-1)


TORCH_SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=9),
    lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[2]
    ),
]


@both_modes
@pytest.mark.parametrize("make", TORCH_SCHEDULERS, ids=["step", "lambda", "cosine", "one_cycle", "sequential"])
def test_torchs_schedulers_drive_the_global_learning_rate(make: Callable[[Any], Any], mode: str) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, momentum=0.9, parameters=[{"params": params[:2]}, {"params": params[2:], "learning_rate": 0.5}])
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02, momentum=0.9)
    scheduler, wanted = make(opt), make(reference)
    loops = [Loop(params[:2], momentum=0.9), Loop(params[2:], momentum=0.9)]

    def follow(t: int) -> None:
        if t:
            scheduler.step()
            reference.step()
            wanted.step()
        group = reference.param_groups[0]
        assert opt.get_lr() == group["lr"]
        assert [g["learning_rate"] for g in opt.param_groups] == [1.0, 0.5]
        for loop, factor in zip(loops, (1.0, 0.5), strict=True):
            loop.options |= {"lr": group["lr"] * factor, "momentum": group["momentum"]}

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would be one
        check(params, opt, loops, mode, steps=7, between=follow)


def test_reduce_lr_on_plateau() -> None:
    opt = RMSProp(0.1, parameters=parameters())
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for _ in range(3):
        opt.step()
        scheduler.step(1.0)
    assert opt.get_lr() == 0.025


def test_a_torch_scheduler_of_another_optimizer_can_be_the_learning_rate() -> None:
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = lr_scheduler.StepLR(other, 1, gamma=0.5)
    params = parameters(dtype=torch.float64)
    opt, loop = RMSProp(scheduler, parameters=params), Loop(params)

    def follow(t: int) -> None:
        loop.options["lr"] = 0.4 * 0.5**t
        if t:
            other.step()
            scheduler.step()

    check(params, opt, [loop], "eager", between=follow)
    with pytest.raises(RuntimeError, match="conflict"):
        opt.set_lr(0.1)


# The document's examples, in torch --------------------------------------------------------------------------


def test_documents_example_of_set_lr() -> None:
    rmsprop = RMSProp(0.1, parameters=torch.nn.Linear(10, 10).parameters())
    for lr in (0.2, 0.3, 0.4, 0.5, 0.6):
        rmsprop.set_lr(lr)
        assert rmsprop.get_lr() == lr


def test_documents_example_of_get_lr() -> None:
    rmsprop = RMSProp(0.001, parameters=torch.nn.Embedding(10, 10).parameters())
    assert rmsprop.get_lr() == 0.001
    linear = torch.nn.Linear(10, 10)
    scheduler = PiecewiseLR(BOUNDARIES, VALUES, 0)
    rmsprop = RMSProp(scheduler, parameters=linear.parameters())
    linear(torch.rand(10, 10)).mean().backward()
    assert rmsprop.get_lr() == pytest.approx(0.2, rel=1e-6)
    for wanted in TWELVE:
        rmsprop.step()
        assert rmsprop.get_lr() == pytest.approx(wanted, rel=1e-6)
        scheduler.step()
