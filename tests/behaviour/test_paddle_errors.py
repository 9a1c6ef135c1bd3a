"""What optimizers.paddle refuses, and how; its names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import optimizers.paddle as paddle
from optimizers.paddle import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue, L1Decay, L2Decay, RMSProp
from tests.support.paddle_support import Loop, both_modes, check, stable
from tests.support.training import parameters


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"learning_rate": 1}, TypeError, "learning rate should be float or LRScheduler, got <class 'int'> here"),
        ({"learning_rate": "x"}, TypeError, "learning rate should be float or LRScheduler, got <class 'str'> here"),
        ({"learning_rate": None}, ValueError, "learning_rate is not set."),
        ({"rho": None}, ValueError, "rho is not set."),
        ({"epsilon": None}, ValueError, "epsilon is not set."),
        ({"momentum": None}, ValueError, "momentum is not set."),
        ({"rho": -0.1}, ValueError, "Invalid value of rho, expect rho >= 0."),
        ({"epsilon": -1e-9}, ValueError, "Invalid value of epsilon, expect epsilon >= 0."),
        ({"momentum": -1}, ValueError, "Invalid value of momentum, expect momentum >= 0."),
        *(
            ({name: wrong}, TypeError, f"{name} should be a number, got {wrong!r}")
            for name in ("rho", "epsilon", "momentum")
            for wrong in ("0.9", (0.9,), 0.9j, 10**400)
        ),
        ({"parameters": 1}, TypeError, "parameters should be a list"),
        ({"momentum": math.nan}, ValueError, "Invalid value of momentum"),
        ({"parameters": None}, AttributeError, "parameters argument given to the Optimizer should not be None"),
        ({"parameters": torch.zeros(1)}, TypeError, "parameters should be a list"),
        ({"parameters": {"params": []}}, TypeError, "parameters should be a list"),
        ({"parameters": []}, ValueError, "empty"),
        ({"grad_clip": 1.0}, TypeError, "'grad_clip' should be an instance of GradientClipBase's derived class"),
        ({"grad_clip": paddle.GradientClipBase()}, TypeError, "'grad_clip' should be an instance"),
        ({"grad_clip": L2Decay(0.1)}, TypeError, "'grad_clip' should be an instance"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay should be float"),
        ({"weight_decay": ClipGradByNorm(0.1)}, TypeError, "weight_decay should be float"),
        ({"weight_decay": paddle.WeightDecayRegularizer(0.1)}, TypeError, "weight_decay should be float"),
        ({"closure": None}, TypeError, "closure"),
    ],
    ids=stable,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as e:
        RMSProp(**{"learning_rate": 0.1, "parameters": parameters(), **arguments})
    assert message in str(e.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rho": -1.0},
        {"rho": "0.9"},
        {"lr": "0.1"},
        {"momentum": None},
        {"grad_clip": 1.0},
        {"weight_decay": "x"},
        {"learning_rate": "x"},
    ],
    ids=str,
)
def test_wrong_options_of_a_group_change_nothing(options: dict[str, Any]) -> None:
    opt = RMSProp(0.1, parameters=parameters())
    with pytest.raises((TypeError, ValueError)):
        opt.add_param_group({"params": parameters(), **options})
    assert len(opt.param_groups) == 1
    saved = opt.state_dict()
    saved["param_groups"][0] |= options
    with pytest.raises((TypeError, ValueError)):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.95


def test_regularisers_refuse_what_is_not_a_number() -> None:
    for kind in (L1Decay, L2Decay):
        assert kind(coeff=1).coeff == 1.0
        with pytest.raises(TypeError, match="coeff"):
            kind("0.1")


@pytest.mark.parametrize("name", ["rho", "epsilon", "momentum", "lr"])
@pytest.mark.parametrize("wrong", ["0.9", None, 0.9j], ids=repr)
def test_a_wrong_number_between_two_steps_is_named_and_changes_nothing(name: str, wrong: Any) -> None:
    params = parameters()
    opt = RMSProp(0.1, parameters=params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before, right = [p.detach().clone() for p in params], opt.param_groups[0][name]
    opt.param_groups[0][name] = wrong
    with pytest.raises(TypeError, match=f"{name} should be a number, got {wrong!r}"):
        opt.step()
    assert all(map(torch.equal, before, params))
    opt.param_groups[0][name] = right
    opt.step()


@pytest.mark.parametrize("kind", [ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue])
def test_bounds_of_clips_are_numbers(kind: Any) -> None:
    for wrong in ("1", None, [1.0], 1j):
        with pytest.raises(TypeError, match=r"(clip_norm|max) should be a number, got"):
            kind(wrong)


def test_a_wrong_regularizer_of_a_parameter_is_refused() -> None:
    params = parameters()
    params[0].regularizer = "l2"
    with pytest.raises(TypeError, match="L1Decay or L2Decay"):
        RMSProp(0.1, parameters=params)


def test_names_of_the_documents() -> None:
    assert paddle.GradientClipByGlobalNorm is ClipGradByGlobalNorm
    assert paddle.GradientClipByNorm is ClipGradByNorm
    assert paddle.GradientClipByValue is ClipGradByValue
    for clip in (ClipGradByGlobalNorm(1.0), ClipGradByNorm(1.0), ClipGradByValue(1.0)):
        assert isinstance(clip, paddle.GradientClipBase)
    for decay in (L1Decay(0.1), L2Decay(0.1)):
        assert isinstance(decay, paddle.WeightDecayRegularizer)
    assert all(hasattr(paddle, name) for name in paddle.__all__)


def test_the_name_has_no_effect() -> None:
    assert RMSProp(0.1, parameters=parameters(), name="first").name == "first"
    assert RMSProp(0.1, parameters=parameters()).name is None


@both_modes
def test_a_parameter_listed_twice_is_a_warning_and_is_updated_once(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    with pytest.warns(UserWarning, match="duplicate"):
        opt = RMSProp(0.02, parameters=[*params, params[0]])
    assert len(opt.param_groups[0]["params"]) == len(params)
    check(params, opt, [Loop(params)], mode)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": params[:1]})


@pytest.mark.parametrize(
    ("boundaries", "values", "message"),
    [
        (3, [0.1], "boundaries should be a list of numbers, got 3"),
        (None, [0.1], "boundaries should be a list of numbers, got None"),
        (["2"], [0.1, 0.2], "each of boundaries should be a number, got '2'"),
        ([2], 0.1, "values should be a list of numbers, got 0.1"),
        ([2], [0.1, None], "each of values should be a number, got None"),
    ],
    ids=str,
)
def test_wrong_pieces_are_named(boundaries: Any, values: Any, message: str) -> None:
    with pytest.raises(TypeError) as e:
        paddle.PiecewiseDecay(boundaries, values)
    assert str(e.value) == message


def test_a_scheduler_that_fails_stays_where_it_is() -> None:
    class Short(paddle.LRScheduler):
        def get_lr(self) -> Any:
            return [0.1, 0.2, None][self.last_epoch]

    scheduler = Short()
    scheduler.step()
    for wrong, message in ((None, "Short.get_lr() returns should be a number, got None"), ("1", "epoch should be a")):
        with pytest.raises(TypeError) as e:
            scheduler.step(wrong)  # type: ignore[arg-type]
        assert message in str(e.value)
        assert (scheduler.last_epoch, scheduler()) == (1, 0.2)


def test_minimize_names_an_argument_that_is_no_list() -> None:
    opt = RMSProp(0.1, parameters=parameters())
    for name in ("parameters", "no_grad_set"):
        with pytest.raises(
            TypeError, match=f"{name} should be a list or set of parameters or names, got <class 'int'>"
        ):
            opt.minimize(torch.zeros(()), **{name: 5})
