r"""LAMB as torch_npu has it: no bias correction, the parameter's norm limited to 10.

$$g \leftarrow g / \max(1, \lVert\text{all } g\rVert) \text{ if asked}, \quad m, v \text{ as Adam}, \quad
u = \frac{m}{\sqrt v + \epsilon} + \lambda p, \quad
r = \frac{\min(\lVert p\rVert, 10)}{\lVert u\rVert}, \quad p \leftarrow p - lr\,r\,u$$

with r = 1 where one of its norms is 0. Norms are of one parameter, but the first, which is of all gradients.
Source: torch_npu.optim.NpuFusedLamb, after pytorch-lamb, https://arxiv.org/abs/1904.00962 (not NVLAMB, not
timm's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, total, zeros

from ._base import NpuFusedOptimizer


@rule(
    states={"exp_avg": zeros, "exp_avg_sq": zeros},
    defaults=dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, adam=False, use_global_grad_norm=False),
    totals={"grad_sq": total(lambda grad: grad.double().square().sum()).when(lambda g: g["use_global_grad_norm"])},
)
def lamb(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    grad_sq: Tensor | None,
    lr: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
    weight_decay: Tensor,
    adam: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update; the step is as long as the parameter's norm asks for."""
    if grad_sq is not None:
        grad_norm = grad_sq.sqrt()
        grad = torch.where(grad_norm <= 1, grad, grad / grad_norm)
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    update = exp_avg / (exp_avg_sq.sqrt() + eps)
    update = torch.where(weight_decay == 0, update, update + weight_decay * param)
    if adam:
        return param - lr * update, exp_avg, exp_avg_sq
    param_norm = torch.linalg.vector_norm(param).clamp(max=10)
    update_norm = torch.linalg.vector_norm(update)
    ratio = torch.where((param_norm == 0) | (update_norm == 0), 1.0, param_norm / update_norm)
    return param - lr * ratio * update, exp_avg, exp_avg_sq


class NpuFusedLamb(NpuFusedOptimizer):
    """torch_npu.optim.NpuFusedLamb.

    Where document and code of the original differ: eps is 1e-6 by default (the document's text says 1e-8, its
    signature 1e-6), and betas of exactly 1 are refused (the document says "> 1"). Unlike the original, a
    negative weight decay is refused, use_global_grad_norm works, norms are in float32 for half precision, and
    a NaN in the global norm is not taken for a small one: it reaches every parameter.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        betas: decay of the running averages of the gradient and its square, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: added to the update, >= 0.
        adam: take 1 for the ratio of norms. An attribute of the optimizer, not an option of a group.
        use_global_grad_norm: divide gradients by their common norm if it exceeds 1. An attribute, likewise.
        state_dtype: dtype of the states; None means each parameter's own.
        flatten: "params" re-homes the parameters in one buffer per group and dtype (`RuleOptimizer` says more).
        master_weights: keep what half-precision parameters round away (`RuleOptimizer` says more).
        stochastic_rounding: round new values of half-precision parameters by chance (`RuleOptimizer` says more).

    Raises:
        ValueError: a value is not allowed.
    """

    rule = lamb
    decouples = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        adam: bool = False,
        use_global_grad_norm: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self.checked({"adam": adam, "use_global_grad_norm": use_global_grad_norm})
        self.adam, self.use_global_grad_norm = adam, use_global_grad_norm
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        half: Any = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, state_dtype=state_dtype, flatten=flatten, **half)

    def hyperparameters(self, group: dict[str, Any]) -> Mapping[str, Any]:
        """The group's options and the attributes."""
        return {**group, "adam": self.adam, "use_global_grad_norm": self.use_global_grad_norm}
