"""Saving and copying optimizers.paddle.RMSProp."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from optimizers.paddle import ClipGradByGlobalNorm, L1Decay, PiecewiseDecay, RMSProp
from tests.support.paddle_support import BOUNDARIES, VALUES, both_modes
from tests.support.training import Step, clones, gradients, parameters, set_gradients, train

OPTIONS: list[dict[str, Any]] = [
    dict(momentum=0.9, centered=True),
    dict(momentum=0.9, weight_decay=L1Decay(0.1), grad_clip=ClipGradByGlobalNorm(0.5)),
]


def through_state_dict(opt: RMSProp, params: list[Any], options: dict[str, Any]) -> tuple[RMSProp, list[Any]]:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new = clones(params)
    other = RMSProp(0.5, parameters=new, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other, new


def through_pickle(opt: RMSProp, params: list[Any], options: dict[str, Any]) -> tuple[RMSProp, list[Any]]:
    return pickle.loads(pickle.dumps((opt, params)))


def through_deepcopy(opt: RMSProp, params: list[Any], options: dict[str, Any]) -> tuple[RMSProp, list[Any]]:
    return copy.deepcopy((opt, params))


@both_modes
@pytest.mark.parametrize("copied", [through_state_dict, through_pickle, through_deepcopy])
@pytest.mark.parametrize("options", OPTIONS, ids=["centered", "clipped"])
def test_copies_continue_alike_and_apart(copied: Any, options: dict[str, Any], mode: str) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, parameters=params, name="first", **options)
    step = Step(opt, mode)
    train(params, step, seeds=range(3))
    opt.clear_grad()
    other, new = copied(opt, params, options)
    assert other.get_lr() == 0.02
    assert other.param_groups[0]["grad_clip"] == opt.param_groups[0]["grad_clip"]
    again = Step(other, mode)
    for t in range(3, 5):
        set_gradients(params, gradients(params, t))
        set_gradients(new, gradients(params, t))
        step()
        again()
        assert all(torch.equal(p, q) for p, q in zip(params, new, strict=True))
    again.check(len(params))
    other.set_lr(0.5)
    set_gradients(new, gradients(params, 9))
    again()
    assert not any(torch.equal(p, q) for p, q in zip(params, new, strict=True))
    assert opt.get_lr() == 0.02


@pytest.mark.parametrize("copied", [through_pickle, through_deepcopy])
def test_copies_keep_name_and_scheduler(copied: Any) -> None:
    scheduler = PiecewiseDecay(BOUNDARIES, VALUES)
    params = parameters()
    opt = RMSProp(scheduler, parameters=params, name="first")
    scheduler.step()
    other, _ = copied(opt, params, {})
    assert other.name == "first"
    scheduler.step()
    assert (opt.get_lr(), other.get_lr()) == (0.4, 0.2)


def test_a_scheduler_stays_in_charge_after_loading() -> None:
    params = parameters()
    saved = RMSProp(0.7, parameters=params).state_dict()
    scheduler = PiecewiseDecay(BOUNDARIES, VALUES)
    opt = RMSProp(scheduler, parameters=params)
    opt.load_state_dict(saved)
    assert opt.get_lr() == 0.2
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.2


def test_a_checkpoint_without_some_options_keeps_the_defaults() -> None:
    params = parameters()
    opt = RMSProp(0.1, rho=0.8, parameters=params)
    saved = opt.state_dict()
    for name in ("rho", "learning_rate", "grad_clip"):
        del saved["param_groups"][0][name]
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["learning_rate"]) == (0.8, 1.0)
