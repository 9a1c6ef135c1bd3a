r"""RAdam: Adam whose second moment counts from the step at which its variance is known.

$$\rho_\infty = \frac{2}{1-\beta_2} - 1, \quad \rho_t = \rho_\infty - \frac{2t\beta_2^t}{1-\beta_2^t}, \quad
  r = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}},$$
$$p \leftarrow p - lr\,\frac{m}{1-\beta_1^t} \cdot
  \begin{cases} r\sqrt{1-\beta_2^t} / (\sqrt v + \epsilon) & \rho_t > 5 \\ 1 \end{cases}$$

Source: torch.optim.RAdam, https://arxiv.org/abs/1908.03265.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(
    states={"exp_avg": zeros, "exp_avg_sq": zeros},
    defaults=dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False),
)
def radam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
    weight_decay: Tensor,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update; weight decay is added to the gradient or shrinks the parameter first."""
    beta1, beta2 = betas
    if decoupled_weight_decay:
        param = (1 - lr * weight_decay) * param
    else:
        grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    known = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / known
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    factor = torch.where(length > 5, (rectified.clamp(min=0) * known).sqrt(), 1.0)
    update = torch.where(length > 5, exp_avg / (exp_avg_sq.sqrt() + eps), exp_avg)
    return param - lr / (1 - beta1**step) * factor * update, exp_avg, exp_avg_sq
