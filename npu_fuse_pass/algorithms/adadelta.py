r"""Adadelta.

$$g \leftarrow g + \lambda p, \quad v \leftarrow \rho v + (1-\rho) g^2, \quad
  u = \frac{\sqrt{d + \epsilon}}{\sqrt{v + \epsilon}}\,g, \quad d \leftarrow \rho d + (1-\rho) u^2, \quad
  p \leftarrow p - lr\,u$$

Source: torch.optim.Adadelta, https://arxiv.org/abs/1212.5701.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(
    states={"square_avg": zeros, "acc_delta": zeros}, defaults={"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0}
)
def adadelta(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    acc_delta: Tensor,
    *,
    lr: Tensor,
    rho: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update."""
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    square_avg = rho * square_avg + (1 - rho) * grad * grad
    delta = (acc_delta + eps).sqrt() / (square_avg + eps).sqrt() * grad
    return param - lr * delta, square_avg, rho * acc_delta + (1 - rho) * delta * delta
