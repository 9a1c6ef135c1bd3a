"""Clipping inside the step of optimizers.paddle.RMSProp."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optimizers.paddle import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue, L1Decay, L2Decay, RMSProp
from tests.support.paddle_support import Loop, both_modes, check
from tests.support.training import Step, assert_close, gradients, parameters, set_gradients, train

CLIPS = [
    (ClipGradByGlobalNorm(1.0), ("global", 1.0)),
    (ClipGradByGlobalNorm(1000.0), ("global", 1000.0)),
    (ClipGradByNorm(0.5), ("norm", 0.5)),
    (ClipGradByNorm(2.5), ("norm", 2.5)),
    (ClipGradByValue(0.3), ("value", -0.3, 0.3)),
    (ClipGradByValue(0.5, -0.1), ("value", -0.1, 0.5)),
    (ClipGradByValue(max=1, min=0.25), ("value", 0.25, 1.0)),
]
CLIP_IDS = ["-".join(str(x) for x in clip) for _, clip in CLIPS]


@both_modes
@pytest.mark.parametrize(("given", "clip"), CLIPS, ids=CLIP_IDS)
@pytest.mark.parametrize("decay", [(L2Decay(0.5), ("l2", 0.5)), (L1Decay(0.5), ("l1", 0.5))], ids=["l2", "l1"])
def test_clipping_comes_before_the_regulariser(
    mode: str, given: Any, clip: tuple[Any, ...], decay: tuple[Any, tuple[str, float]]
) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, momentum=0.9, centered=True, parameters=params, weight_decay=decay[0], grad_clip=given)
    check(params, opt, [Loop(params, momentum=0.9, centered=True, decay=decay[1], clip=clip)], mode)


@both_modes
@pytest.mark.parametrize(("given", "clip"), CLIPS[::2], ids=CLIP_IDS[::2])
def test_clipping_in_float32(mode: str, given: Any, clip: tuple[Any, ...]) -> None:
    params = parameters()
    check(params, RMSProp(0.02, parameters=params, grad_clip=given), [Loop(params, clip=clip)], mode)


@both_modes
@pytest.mark.parametrize(("given", "clip"), CLIPS[::2], ids=CLIP_IDS[::2])
def test_need_clip_false_is_left_out(mode: str, given: Any, clip: tuple[Any, ...]) -> None:
    params = parameters(dtype=torch.float64)
    params[1].need_clip = False
    params[2].need_clip = True
    loop = Loop(params, clip=clip, spared=(1,), decay=("l2", 0.1))
    check(params, RMSProp(0.02, parameters=params, grad_clip=given, weight_decay=0.1), [loop], mode)


@both_modes
def test_global_norm_is_that_of_one_group(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    groups = [{"params": params[:2]}, {"params": params[2:], "grad_clip": ClipGradByGlobalNorm(0.2)}]
    opt = RMSProp(0.02, parameters=groups, grad_clip=ClipGradByGlobalNorm(1.0))
    loops = [Loop(params[:2], clip=("global", 1.0)), Loop(params[2:], clip=("global", 0.2))]
    check(params, opt, loops, mode)


@both_modes
def test_global_norm_is_that_of_all_dtypes_and_regularizers_of_a_group(mode: str) -> None:
    params = [*parameters(dtype=torch.float64)[:2], *parameters(dtype=torch.float32)[2:]]
    params[0].regularizer = L1Decay(0.1)
    opt = RMSProp(0.02, parameters=params, grad_clip=ClipGradByGlobalNorm(0.7))
    loop = Loop(params, clip=("global", 0.7), decay=[("l1", 0.1), *[(None, 0.0)] * (len(params) - 1)])
    check(params, opt, [loop], mode, missing=lambda i, t: i == 3 and t % 2 == 1)


@both_modes
def test_global_norm_leaves_the_bits_of_small_gradients(mode: str) -> None:
    params = parameters()
    grads = gradients(params, 0)
    set_gradients(params, grads)
    Step(RMSProp(0.02, parameters=params, grad_clip=ClipGradByGlobalNorm(1e3)), mode)()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


@both_modes
def test_groups_of_different_kinds_of_clipping(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    clips = [ClipGradByGlobalNorm(0.5), ClipGradByNorm(0.5), ClipGradByValue(0.2), None, ClipGradByNorm(0.3)]
    groups = [{"params": [p], "grad_clip": c} for p, c in zip(params, clips, strict=True)]
    wanted = [("global", 0.5), ("norm", 0.5), ("value", -0.2, 0.2), None, ("norm", 0.3)]
    loops = [Loop([p], clip=c) for p, c in zip(params, wanted, strict=True)]
    check(params, RMSProp(0.02, parameters=groups, grad_clip=ClipGradByValue(1.0)), loops, mode)


@both_modes
@pytest.mark.parametrize("given", [ClipGradByNorm(0.1), ClipGradByValue(0.1)], ids=str)
def test_clipping_by_norm_and_by_value_leaves_gradients_alone(mode: str, given: Any) -> None:
    params = parameters()
    set_gradients(params, gradients(params, 0))
    grads = [(p.grad, p.grad._version) for p in params]
    Step(RMSProp(0.02, parameters=params, grad_clip=given), mode)()
    assert all(p.grad is g and g._version == v for p, (g, v) in zip(params, grads, strict=True))


@both_modes
def test_clipping_can_be_exchanged_between_steps(mode: str) -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, momentum=0.9, parameters=params)
    loop = Loop(params, momentum=0.9)
    step = Step(opt, mode)
    for t, (given, clip) in enumerate([(None, None), *CLIPS]):
        opt.param_groups[0]["grad_clip"], loop.options["clip"] = given, clip
        train(params, step, loop, seeds=[t])
        assert_close(params, loop.values)
    step.check(len(params))


def test_clip_arguments() -> None:
    assert (ClipGradByValue(2).min, ClipGradByValue(2).max) == (-2.0, 2.0)
    assert ClipGradByGlobalNorm(1, "group", True).clip_norm == 1.0
    for wrong in (
        lambda: ClipGradByValue(-1.0),
        lambda: ClipGradByValue(1.0, 2.0),
        lambda: ClipGradByNorm(-1.0),
        lambda: ClipGradByGlobalNorm(math.nan),
    ):
        with pytest.raises(ValueError, match="should be"):
            wrong()
