r"""Adagrad.

$$g \leftarrow g + \lambda p, \quad s \leftarrow s + g^2, \quad
  p \leftarrow p - \frac{lr}{1 + (t-1)\,\eta} \cdot \frac{g}{\sqrt s + \epsilon}$$

Source: torch.optim.Adagrad; Duchi et al., Adaptive Subgradient Methods, JMLR 12 (2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(states={"sum": zeros}, defaults={"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10})
def adagrad(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    lr_decay: Tensor,
    weight_decay: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor]:
    """One update."""
    grad = torch.where(weight_decay == 0, grad, grad + weight_decay * param)
    sum = sum + grad * grad
    return param - lr / (1 + (step - 1) * lr_decay) * grad / (sum.sqrt() + eps), sum
