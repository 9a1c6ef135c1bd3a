r"""Adam, with weight decay as an L2 penalty or decoupled (AdamW).

$$g \leftarrow g + \lambda p \text{ (Adam)}, \quad p \leftarrow (1 - lr\,\lambda)\,p \text{ (AdamW)},$$
$$m \leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2,$$
$$p \leftarrow p - \frac{lr}{1-\beta_1^t} \cdot \frac{m}{\sqrt{\hat v}\,/\sqrt{1-\beta_2^t} + \epsilon}$$

with \(\hat v = v\), or with amsgrad the largest v so far (before bias correction).
Source: torch.optim.Adam and AdamW, https://arxiv.org/abs/1412.6980 and https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros

States = tuple[Tensor, Tensor, Tensor | None]

states = {"exp_avg": zeros, "exp_avg_sq": zeros, "max_exp_avg_sq": zeros.when(lambda group: bool(group["amsgrad"]))}


def adam_update(
    param: Tensor, grad: Tensor, old: States, step: Tensor, lr: Tensor, betas: tuple[Tensor, Tensor], eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The part that Adam and AdamW share: new moments and the bias-corrected update."""
    (exp_avg, exp_avg_sq, max_exp_avg_sq), (beta1, beta2) = old, betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    largest = exp_avg_sq if max_exp_avg_sq is None else max_exp_avg_sq
    denominator = largest.sqrt() / (1 - beta2**step).sqrt() + eps
    return param - lr / (1 - beta1**step) * exp_avg / denominator, exp_avg, exp_avg_sq, max_exp_avg_sq


@rule(states=states, defaults={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False})
def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One update; weight decay is added to the gradient."""
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    return adam_update(param, grad, (exp_avg, exp_avg_sq, max_exp_avg_sq), step, lr, betas, eps)


@rule(states=states, defaults={"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False})
def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One update; weight decay shrinks the parameter first."""
    param = (1 - lr * weight_decay) * param
    return adam_update(param, grad, (exp_avg, exp_avg_sq, max_exp_avg_sq), step, lr, betas, eps)
