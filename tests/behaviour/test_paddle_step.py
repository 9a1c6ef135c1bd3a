"""optimizers.paddle.RMSProp's update, statement by statement, and its regularisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optimizers.paddle import ClipGradByGlobalNorm, ClipGradByNorm, L1Decay, L2Decay, RMSProp
from tests.support.oracles import float32
from tests.support.paddle_support import Loop, both_modes, check
from tests.support.training import Step, assert_close, error, gradients, parameters, set_gradients, train

# The update -------------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_update(mode: str, dtype: torch.dtype, centered: bool, momentum: float) -> None:
    params = parameters(dtype=dtype)
    options = dict(rho=0.9, epsilon=1e-3, momentum=momentum, centered=centered)
    check(params, RMSProp(0.02, parameters=params, **options), [Loop(params, **options)], mode)


def test_defaults_are_those_of_the_signature() -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, parameters=params)
    group = opt.param_groups[0]
    assert (group["rho"], group["epsilon"], group["momentum"], group["centered"]) == (0.95, 1e-6, 0.0, False)
    assert group["weight_decay"] is None
    assert group["grad_clip"] is None
    check(params, opt, [Loop(params)], "eager")


def test_arguments_are_positional_in_the_documents_order() -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, 0.9, 1e-3, 0.8, True, params, 0.1, ClipGradByNorm(0.5), "prefix")
    loop = Loop(params, rho=0.9, epsilon=1e-3, momentum=0.8, centered=True, decay=("l2", 0.1), clip=("norm", 0.5))
    check(params, opt, [loop], "eager")
    assert opt.name == "prefix"


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(mode: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    start = [p.detach().clone() for p in params]
    opt = RMSProp(0.5, epsilon=1e-12, parameters=params, state_dtype=torch.float32)  # 1e-12 is 0 in float16
    set_gradients(params, [torch.full_like(p, 1e-3) for p in params])
    step = Step(opt, mode)
    step()
    step.check(len(params))
    for p, old in zip(params, start, strict=True):
        square = 0.05 * float(torch.tensor(1e-3, dtype=dtype)) ** 2
        update = 0.5 * float(torch.tensor(1e-3, dtype=dtype)) / math.sqrt(square + 1e-12)
        assert error(p, (old.double() - update).to(dtype)) <= 1e-2


@both_modes
def test_update_goes_through_the_buffer_without_momentum_too(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    before = [p.detach().clone() for p in params]
    opt = RMSProp(0.02, parameters=params)
    set_gradients(params, gradients(params, 0))
    Step(opt, mode)()
    for p, old in zip(params, before, strict=True):
        assert set(opt.state[p]) - {"step"} == {"square_avg", "momentum_buffer"}
        assert error(opt.state[p]["momentum_buffer"], old - p) <= 1e-11


@both_modes
def test_averages_start_at_zero(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, rho=0.75, momentum=0.5, centered=True, parameters=params)
    grads = gradients(params, 0)
    set_gradients(params, grads)
    Step(opt, mode)()
    for p, g in zip(params, grads, strict=True):
        assert error(opt.state[p]["square_avg"], 0.25 * g**2) <= 1e-11
        assert error(opt.state[p]["grad_avg"], 0.25 * g) <= 1e-11


@pytest.mark.parametrize("name", ["rho", "epsilon", "momentum"])
def test_float64_parameters_get_float32_values_of_(name: str) -> None:
    values = {"rho": 0.9, "epsilon": 0.1, "momentum": 0.7}
    rounded = float32(values[name])
    ends = []
    for value in (values[name], rounded, values[name] + 1e-6):
        params = parameters(dtype=torch.float64)
        opt = RMSProp(0.02, parameters=params, **{**values, name: value})
        train(params, opt.step, seeds=range(3))
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert opt.param_groups[0][name] == values[name] + 1e-6  # groups hold what the user wrote


@both_modes
def test_parameters_without_gradients_are_skipped(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, momentum=0.9, parameters=params, weight_decay=0.1)
    loop = Loop(params, momentum=0.9, decay=("l2", 0.1))
    check(params, opt, [loop], mode, missing=lambda i, t: (i + t) % 3 == 0)


# Regularisation ---------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize(
    ("given", "decay"),
    [
        (0.1, ("l2", 0.1)),
        (1, ("l2", 1.0)),
        (L2Decay(0.1), ("l2", 0.1)),
        (L1Decay(0.05), ("l1", 0.05)),
        (L1Decay(), (None, 0.0)),
        (0.0, (None, 0.0)),
        (None, (None, 0.0)),
    ],
    ids=str,
)
def test_weight_decay(mode: str, given: Any, decay: tuple[str | None, float]) -> None:
    params = parameters(dtype=torch.float64)
    with torch.no_grad():
        params[0].view(-1)[0] = 0.0  # sign(0) is 0
    opt = RMSProp(0.02, momentum=0.9, parameters=params, weight_decay=given)
    check(params, opt, [Loop(params, momentum=0.9, decay=decay)], mode)


@both_modes
@pytest.mark.parametrize("default", [None, 0.2, L1Decay(0.3)], ids=str)
def test_a_parameters_regularizer_overrides_weight_decay(mode: str, default: Any) -> None:
    params = parameters(dtype=torch.float64)
    params[0].regularizer = L1Decay(0.1)
    params[1].regularizer = L2Decay(0.4)
    params[2].regularizer = None  # as if it were not set
    rest = {"None": (None, 0.0), "0.2": ("l2", 0.2)}.get(str(default), ("l1", 0.3))
    loop = Loop(params, decay=[("l1", 0.1), ("l2", 0.4), rest, rest, rest])
    check(params, RMSProp(0.02, parameters=params, weight_decay=default), [loop], mode)


@both_modes
@pytest.mark.parametrize("given", [0.0, L1Decay(0.0)], ids=str)
def test_a_coefficient_of_zero_does_not_touch_infinities(mode: str, given: Any) -> None:
    params = [torch.nn.Parameter(torch.tensor([math.inf, 1.0]))]
    opt = RMSProp(0.02, parameters=params, weight_decay=given)
    set_gradients(params, [torch.ones(2)])
    Step(opt, mode)()
    assert params[0][0] == math.inf
    assert params[0][1] < 1.0


# Changing numbers never recompiles --------------------------------------------------------------------------


def test_changed_numbers_take_effect_without_another_compile() -> None:
    params = parameters(dtype=torch.float64)
    params[1].regularizer = L1Decay(0.1)
    clip, decay = ClipGradByGlobalNorm(1.0), L2Decay(0.1)
    opt = RMSProp(0.02, momentum=0.9, parameters=params, weight_decay=decay, grad_clip=clip)
    loop = Loop(params, momentum=0.9, clip=("global", 1.0))

    def change(t: int) -> None:
        opt.set_lr(0.02 / (t + 1))
        clip.clip_norm, decay.coeff, params[1].regularizer.coeff = 1.0 + t, 0.1 * t, 0.3 * t
        numbers = {"rho": 0.9 - 0.1 * t, "epsilon": 10.0**-t, "momentum": 0.9 - 0.2 * t}
        opt.param_groups[0].update(numbers)
        loop.options |= {**numbers, "lr": 0.02 / (t + 1), "clip": ("global", 1.0 + t)}
        loop.options["decay"] = [("l2", 0.1 * t), ("l1", 0.3 * t), *[("l2", 0.1 * t)] * 3]

    check(params, opt, [loop], "compiled", between=change)


# The document's examples, in torch --------------------------------------------------------------------------


@both_modes
def test_documents_first_example(mode: str) -> None:
    linear = torch.nn.Linear(10, 10)
    params = list(linear.parameters())
    rmsprop = RMSProp(learning_rate=0.1, parameters=linear.parameters(), weight_decay=0.01)
    loop = Loop(params, lr=0.1, decay=("l2", 0.01))
    linear(torch.rand(10, 10)).mean().backward()
    grads = [p.grad.clone() for p in params]
    step = Step(rmsprop, mode)
    step()
    rmsprop.clear_grad()
    loop.step(grads)
    assert_close(params, loop.values)
    step.check(2)
