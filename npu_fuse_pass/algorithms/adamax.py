r"""Adamax: Adam with the infinity norm.

$$g \leftarrow g + \lambda p, \quad m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
  u \leftarrow \max(\beta_2 u, |g| + \epsilon), \quad p \leftarrow p - \frac{lr}{1-\beta_1^t} \cdot \frac{m}{u}$$

Source: torch.optim.Adamax, https://arxiv.org/abs/1412.6980 (section 7.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(
    states={"exp_avg": zeros, "exp_inf": zeros},
    defaults={"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
)
def adamax(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update."""
    beta1, beta2 = betas
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_inf = torch.maximum(beta2 * exp_inf, grad.abs() + eps)
    return param - lr / (1 - beta1**step) * exp_avg / exp_inf, exp_avg, exp_inf
