r"""NAdam: Adam with Nesterov momentum, whose coefficient grows with the steps.

$$\mu_t = \beta_1 \left(1 - \tfrac12\,0.96^{\,t\psi}\right), \quad \Pi_t = \Pi_{t-1}\,\mu_t,$$
$$p \leftarrow p - lr\,\frac{(1-\mu_t)\,g / (1-\Pi_t) + \mu_{t+1}\,m / (1-\Pi_t\,\mu_{t+1})}
  {\sqrt{v / (1-\beta_2^t)} + \epsilon}$$

Source: torch.optim.NAdam; Dozat, Incorporating Nesterov Momentum into Adam (2016).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros
from npu_fuse_pass.rules.declaration import number


@rule(
    states={"exp_avg": zeros, "exp_avg_sq": zeros, "mu_product": number(1.0)},
    defaults=dict(
        lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3, decoupled_weight_decay=False
    ),
)
def nadam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mu_product: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
    weight_decay: Tensor,
    momentum_decay: Tensor,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One update; weight decay is added to the gradient or shrinks the parameter first."""
    beta1, beta2 = betas
    if decoupled_weight_decay:
        param = (1 - lr * weight_decay) * param
    else:
        grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    mu, following = (beta1 * (1 - 0.5 * 0.96 ** (count * momentum_decay)) for count in (step, step + 1))
    mu_product = (mu_product * mu.float()).float().double()  # torch multiplies and keeps it in float32
    of_grad, of_average = (1 - mu) / (1 - mu_product), following / (1 - mu_product * following)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    param = param - lr * of_grad * grad / denominator - lr * of_average * exp_avg / denominator
    return param, exp_avg, exp_avg_sq, mu_product
