r"""Adam, with weight decay as an L2 penalty.

$$g \leftarrow g + \lambda p, \quad m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
  v \leftarrow \beta_2 v + (1-\beta_2) g^2,$$
$$p \leftarrow p - \frac{lr}{1-\beta_1^t} \cdot \frac{m}{\sqrt{\hat v}\,/\sqrt{1-\beta_2^t} + \epsilon}$$

with \(\hat v = v\), or with amsgrad the largest v so far (before bias correction).
Source: torch_npu.optim.NpuFusedAdam; its algorithm is torch.optim.Adam's, https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros

from ._base import NpuFusedOptimizer

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


class NpuFusedAdam(NpuFusedOptimizer):
    """torch_npu.optim.NpuFusedAdam.

    Where document and code of the original differ: betas of exactly 1 are refused (the document says "> 1").
    Unlike the original, each parameter has its own step count, and half precision computes in float32 (the
    document's own example is NaN in the original, because eps=1e-8 is zero in float16).

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        betas: decay of the running averages of the gradient and its square, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: L2 penalty, >= 0.
        amsgrad: divide by the largest second moment so far.
        state_dtype: dtype of the states; None means each parameter's own.
        flatten: "params" re-homes the parameters in one buffer per group and dtype (`RuleOptimizer` says more).
        master_weights: keep what half-precision parameters round away (`RuleOptimizer` says more).

    Raises:
        ValueError: a value is not allowed.
    """

    rule = adam
    torch_class = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults, state_dtype=state_dtype, flatten=flatten, master_weights=master_weights)
