r"""Lion, as a model of the smallest optimizer: a rule needs no class.

$$p \leftarrow p - lr\,(\mathrm{sign}(\beta_1 m + (1-\beta_1) g) + \lambda p), \qquad
  m \leftarrow \beta_2 m + (1-\beta_2) g$$

Source: Chen et al., Symbolic Discovery of Optimization Algorithms, algorithm 2, https://arxiv.org/abs/2302.06675.

    opt = optimizers.lion(model.parameters(), lr=3e-4)
"""

from __future__ import annotations

from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(states={"exp_avg": zeros}, defaults={"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0})
def lion(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: Tensor, beta1: Tensor, beta2: Tensor, weight_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The sign of an average of gradients, with decoupled weight decay."""
    update = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    return param - lr * (update + weight_decay * param), beta2 * exp_avg + (1 - beta2) * grad
