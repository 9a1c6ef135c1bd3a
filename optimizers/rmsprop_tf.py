r"""RMSprop as TensorFlow has it: averages start at one, eps inside the root.

$$g \leftarrow g + \lambda p, \quad s \leftarrow s + (1-\alpha)(g^2 - s), \quad s_0 = 1, \quad
a \leftarrow a + (1-\alpha)(g - a), \quad d = \sqrt{s - [a^2 \text{ if centered}] + \epsilon}$$
$$b \leftarrow \mu\,b + lr\,g/d, \quad p \leftarrow p - b; \qquad\text{or}\qquad
  b \leftarrow \mu\,b + g/d,\quad p \leftarrow p - lr\,b$$

(the second with lr_in_momentum=False). With decoupled_decay, \(p \leftarrow p - \lambda p\) comes first.
Source: torch_npu.optim.NpuFusedRMSpropTF, after timm's RMSpropTF.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules import ones, rule, zeros

from ._base import NpuFusedOptimizer


@rule(
    states=dict(square_avg=ones, grad_avg=zeros.when(lambda group: group["centered"]))
    | dict(momentum_buffer=zeros.when(lambda group: group["momentum"] > 0)),
    defaults=dict(lr=1e-2, alpha=0.9, eps=1e-10, weight_decay=0.0, momentum=0.0)
    | dict(centered=False, decoupled_decay=False, lr_in_momentum=True),
)
def rmsprop_tf(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor | None,
    *,
    lr: Tensor,
    alpha: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    decoupled_decay: bool,
    lr_in_momentum: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One update; each gradient is divided by the root of its averaged square."""
    if decoupled_decay:
        param = torch.where(weight_decay == 0, param, param - weight_decay * param)
    else:
        grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    square_avg = square_avg + (1 - alpha) * (grad * grad - square_avg)
    if grad_avg is not None:
        grad_avg = grad_avg + (1 - alpha) * (grad - grad_avg)
    variance = square_avg if grad_avg is None else square_avg - grad_avg * grad_avg
    update = grad / (variance + eps).sqrt()
    if momentum_buffer is None:
        return param - lr * update, square_avg, grad_avg, None
    momentum_buffer = momentum * momentum_buffer + (lr * update if lr_in_momentum else update)
    return param - (momentum_buffer if lr_in_momentum else lr * momentum_buffer), square_avg, grad_avg, momentum_buffer


class NpuFusedRMSpropTF(NpuFusedOptimizer):
    """torch_npu.optim.NpuFusedRMSpropTF.

    Where document and code of the original differ: the document refers to timm's RMSpropTF, whose decoupled
    decay is p *= 1 - lr * weight_decay today; torch_npu's code, and this class, do p -= weight_decay * p,
    without lr.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        alpha: smoothing of the averages, >= 0.
        eps: added under the root, >= 0.
        weight_decay: L2 penalty, or the decay of the parameter with decoupled_decay; >= 0.
        momentum: factor of the old buffer, >= 0. With 0 there is no buffer.
        centered: divide by the estimated variance instead of the mean square.
        decoupled_decay: weight decay acts on the parameter only.
        lr_in_momentum: the learning rate enters the buffer, as in TensorFlow, not the update.
        state_dtype: dtype of the states; None means each parameter's own.
        flatten: "params" re-homes the parameters in one buffer per group and dtype (`RuleOptimizer` says more).
        master_weights: keep what half-precision parameters round away (`RuleOptimizer` says more).
        stochastic_rounding: round new values of half-precision parameters by chance (`RuleOptimizer` says more).

    Raises:
        ValueError: a value is not allowed.
    """

    rule = rmsprop_tf

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.9,
        eps: float = 1e-10,
        weight_decay: float = 0,
        momentum: float = 0.0,
        centered: bool = False,
        decoupled_decay: bool = False,
        lr_in_momentum: bool = True,
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"centered": centered, "decoupled_decay": decoupled_decay, "lr_in_momentum": lr_in_momentum}
        half: Any = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, state_dtype=state_dtype, flatten=flatten, **half)
