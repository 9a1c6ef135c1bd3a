r"""Averaged stochastic gradient descent.

$$p \leftarrow (1 - \lambda\,\eta_t)\,p - \eta_t\,g, \quad a \leftarrow a + \mu_t\,(p - a), \quad
  \eta_{t+1} = \frac{lr}{(1 + \lambda\,lr\,t)^\alpha}, \quad \mu_{t+1} = \frac{1}{\max(1, t - t_0)}$$

Source: torch.optim.ASGD; Polyak and Juditsky, SIAM J. Control Optim. 30 (1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros
from npu_fuse_pass.rules.declaration import number


@rule(
    states={"ax": zeros, "eta": number(1e-2), "mu": number(1.0)},
    defaults={"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0.0},
)
def asgd(
    param: Tensor,
    grad: Tensor,
    ax: Tensor,
    eta: Tensor,
    mu: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    lambd: Tensor,
    alpha: Tensor,
    t0: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One update; eta begins as the learning rate, and a changed one counts from the second step on."""
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    param = (1 - lambd * eta) * param - eta * grad
    ax = torch.where(mu == 1, param, ax + mu * (param - ax))
    return param, ax, lr / (1 + lambd * lr * step) ** alpha, 1 / (step - t0).clamp(min=1)
