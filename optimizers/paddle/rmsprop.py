r"""RMSProp of Paddle: eps inside the root, the update always through a momentum buffer, averages from zero.

$$g \leftarrow clip(g), \quad g \leftarrow g + [c\,p \text{ (L2)} \mid c\,sign(p) \text{ (L1)}]$$
$$s \leftarrow \rho s + (1-\rho) g^2, \quad a \leftarrow \rho a + (1-\rho) g, \quad
d = s - [a^2 \text{ if centered}] + \epsilon$$
$$b \leftarrow \mu b + lr\, g/\sqrt{d}, \quad p \leftarrow p - b$$

Source: paddle.optimizer.RMSProp and its kernel, Paddle 3, after slide 29 of Hinton's lecture 6.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler as TorchLRScheduler

from npu_fuse_pass.rules import Rule, rule, total, zeros

from ._base import PaddleOptimizer
from ._number import as_float
from .clip import ClipGradByGlobalNorm, GradientClipBase
from .lr import LRScheduler
from .regularizer import WeightDecayRegularizer

__all__ = ["RMSProp", "paddle_rmsprop", "paddle_rmsprop_global_norm"]

_STATES = {"square_avg": zeros, "grad_avg": zeros.when(lambda group: bool(group["centered"])), "momentum_buffer": zeros}
_DEFAULTS: dict[str, Any] = {"lr": 1e-2, "rho": 0.95, "epsilon": 1e-6, "momentum": 0.0, "centered": False}
_DEFAULTS |= {"clip": None, "clip_min": 0.0, "clip_max": 0.0, "regularizer": None, "coefficient": 0.0}
_Result = tuple[Tensor, Tensor, Tensor | None, Tensor]


@rule(states=_STATES, defaults=_DEFAULTS)
def paddle_rmsprop(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor,
    *,
    lr: Tensor,
    rho: Tensor,
    epsilon: Tensor,
    momentum: Tensor,
    clip: str | None,
    clip_min: Tensor,
    clip_max: Tensor,
    regularizer: str | None,
    coefficient: Tensor,
) -> _Result:
    """One update; clips by value or by the norm of this gradient, and leaves `p.grad` alone."""
    if clip == "value":
        grad = torch.minimum(torch.maximum(grad, clip_min), clip_max)
    elif clip == "norm":
        norm = torch.linalg.vector_norm(grad)
        grad = torch.where(norm > clip_max, grad * (clip_max / norm), grad)
    grad = _regularized(param, grad, regularizer, coefficient)
    return _update(param, grad, square_avg, grad_avg, momentum_buffer, lr, rho, epsilon, momentum)


@rule(
    states=_STATES,
    defaults={**_DEFAULTS, "clip": "global_norm"},
    totals={
        "norm_squared": total(lambda grad: grad.double().square().sum(), over="group").when(
            lambda group: group["clip"] is not None
        )
    },
    writes_grad=True,
)
def paddle_rmsprop_global_norm(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor,
    *,
    lr: Tensor,
    rho: Tensor,
    epsilon: Tensor,
    momentum: Tensor,
    clip: str | None,
    clip_max: Tensor,
    norm_squared: Tensor | None,
    regularizer: str | None,
    coefficient: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """One update; scales by the norm of the group's gradients, and writes the scaled gradient to `p.grad`."""
    if norm_squared is not None:
        grad = grad * (clip_max / torch.maximum(norm_squared.sqrt(), clip_max))
    decayed = _regularized(param, grad, regularizer, coefficient)
    states = (square_avg, grad_avg, momentum_buffer)
    param, square_avg, grad_avg, momentum_buffer = _update(param, decayed, *states, lr, rho, epsilon, momentum)
    return param, grad, square_avg, grad_avg, momentum_buffer


def _regularized(param: Tensor, grad: Tensor, regularizer: str | None, coefficient: Tensor) -> Tensor:
    if regularizer is None:
        return grad
    direction = param.sign() if regularizer == "l1" else param
    return torch.where(coefficient == 0, grad, grad + coefficient * direction)


def _update(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor,
    lr: Tensor,
    rho: Tensor,
    epsilon: Tensor,
    momentum: Tensor,
) -> _Result:
    square_avg = rho * square_avg + (1 - rho) * (grad * grad)
    variance = square_avg
    if grad_avg is not None:
        grad_avg = rho * grad_avg + (1 - rho) * grad
        variance = square_avg - grad_avg * grad_avg
    momentum_buffer = momentum * momentum_buffer + lr * grad / (variance + epsilon).sqrt()
    return param - momentum_buffer, square_avg, grad_avg, momentum_buffer


class RMSProp(PaddleOptimizer):
    """paddle.optimizer.RMSProp, for torch's parameters.

    Where document and code of Paddle differ: Paddle's kernel takes rho, epsilon and momentum as float32, also
    for float64 parameters; so does this class. It differs from Paddle: minimize() runs backward, as the
    document says; a parameter that is listed twice is a warning, as in torch, and is updated once, not twice;
    fp16 and bf16 parameters are computed in float32.

    `p.regularizer` and `p.need_clip` may be set on any parameter; they stand in for Paddle's ParamAttr.
    Groups hold `lr` (the global learning rate, which any torch.optim.lr_scheduler may drive) and
    `learning_rate` (a factor of it), beside rho, epsilon, momentum, centered, weight_decay and grad_clip.

    Args:
        learning_rate: a float, a scheduler of `optimizers.paddle.lr`, which the user steps, or a scheduler of
            torch that drives another optimizer (the learning rate of its first group is taken).
        rho: smoothing of the averages, >= 0.
        epsilon: added under the root, >= 0.
        momentum: factor of the old buffer, >= 0.
        centered: divide by the estimated variance instead of the mean square.
        parameters: parameters, named parameters or parameter groups.
        weight_decay: None, the coefficient of L2Decay, or L1Decay or L2Decay; `p.regularizer` overrides it.
        grad_clip: None, ClipGradByGlobalNorm (over each parameter group), ClipGradByNorm or ClipGradByValue.
        name: kept as an attribute without effect.
        state_dtype: dtype of the states; None means each parameter's own.
        flatten: "params" re-homes the parameters in one buffer per group and dtype (`RuleOptimizer` says more).
        master_weights: keep what half-precision parameters round away (`RuleOptimizer` says more).
        stochastic_rounding: round new values of half-precision parameters by chance (`RuleOptimizer` says more).

    Raises:
        ValueError: learning_rate, rho, epsilon or momentum is None, or one of the last three is negative.
        TypeError: learning_rate is neither float nor scheduler; one of the others is no number; weight_decay or
            grad_clip is of a wrong type.
        AttributeError: parameters is None.
    """

    rule = paddle_rmsprop

    def __init__(
        self,
        learning_rate: float | LRScheduler | TorchLRScheduler,
        rho: float = 0.95,
        epsilon: float = 1e-06,
        momentum: float = 0.0,
        centered: bool = False,
        parameters: Any = None,
        weight_decay: float | WeightDecayRegularizer | None = None,
        grad_clip: GradientClipBase | None = None,
        name: str | None = None,
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        if learning_rate is None:
            raise ValueError("learning_rate is not set.")
        options: dict[str, Any] = {"rho": rho, "epsilon": epsilon, "momentum": momentum, "centered": centered}
        options |= {"weight_decay": weight_decay, "grad_clip": grad_clip}
        _check_numbers(options)
        super().__init__(
            learning_rate,
            parameters,
            options,
            name,
            state_dtype=state_dtype,
            flatten=flatten,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a group with options that are not allowed."""
        _check_numbers(group)
        super().check_group(group)

    def rule_for(self, group: dict[str, Any]) -> Rule:
        """The rule that writes gradients where they are clipped by their global norm."""
        clips_together = isinstance(group["grad_clip"], ClipGradByGlobalNorm)
        return paddle_rmsprop_global_norm if clips_together else paddle_rmsprop

    def hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the rule; rho, epsilon and momentum rounded to float32, as in Paddle's kernel."""
        rounded = {name: ctypes.c_float(as_float(name, group[name])).value for name in ("rho", "epsilon", "momentum")}
        return {**super().hyperparameters(group), **rounded, "centered": bool(group["centered"])}


def _check_numbers(options: dict[str, Any]) -> None:
    for name in ("rho", "epsilon", "momentum"):
        if options[name] is None:
            raise ValueError(f"{name} is not set.")
    for name in ("epsilon", "momentum", "rho"):
        if not as_float(name, options[name]) >= 0.0:
            raise ValueError(f"Invalid value of {name}, expect {name} >= 0.")
