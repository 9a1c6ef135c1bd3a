r"""RMSprop as torch.optim has it, where epsilon is added to the root.

$$g \leftarrow g + \lambda p, \quad v \leftarrow \alpha v + (1-\alpha) g^2, \quad
  a \leftarrow \alpha a + (1-\alpha) g \text{ (centered)},$$
$$u = g / (\sqrt{v - a^2} + \epsilon), \quad b \leftarrow \mu b + u, \quad p \leftarrow p - lr\,b$$

Source: torch.optim.RMSprop; slide 29 of Hinton's lecture 6, and https://arxiv.org/abs/1308.0850 for centered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(
    states={
        "square_avg": zeros,
        "momentum_buffer": zeros.when(lambda group: bool(group["momentum"] > 0)),
        "grad_avg": zeros.when(lambda group: bool(group["centered"])),
    },
    defaults={"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False},
)
def rmsprop(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None,
    grad_avg: Tensor | None,
    *,
    lr: Tensor,
    alpha: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One update."""
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    square_avg = torch.addcmul(alpha * square_avg, (1 - alpha) * grad, grad)
    variance = square_avg
    if grad_avg is not None:  # rounded as torch's: what is left of a constant gradient's variance is roundings alone
        grad_avg = torch.lerp(grad_avg, grad, 1 - alpha)
        variance = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1)
    update = grad / (variance.sqrt() + eps)
    if momentum_buffer is not None:
        update = momentum_buffer = momentum * momentum_buffer + update
    return param - lr * update, square_avg, momentum_buffer, grad_avg
