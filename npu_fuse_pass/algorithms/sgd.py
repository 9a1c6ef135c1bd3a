r"""Stochastic gradient descent with momentum.

$$g \leftarrow g + \lambda p, \qquad b_1 = g, \quad b_t = \mu\,b_{t-1} + (1-d)\,g, \qquad
  p \leftarrow p - lr\,(g + \mu b_t \text{ with nesterov, else } b_t)$$

Source: torch.optim.SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(
    states={"momentum_buffer": zeros.when(lambda group: bool(group["momentum"] != 0))},
    defaults={"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
)
def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    step: Tensor,
    lr: Tensor,
    momentum: Tensor,
    dampening: Tensor,
    weight_decay: Tensor,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    """One update; the first one of a parameter takes the gradient as its buffer, undampened."""
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    if momentum_buffer is not None:
        momentum_buffer = torch.where(step == 1, grad, momentum * momentum_buffer + (1 - dampening) * grad)
        grad = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    return param - lr * grad, momentum_buffer
