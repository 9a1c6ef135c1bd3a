r"""Adam with decoupled weight decay.

$$p \leftarrow (1 - lr\,\lambda)\,p, \quad \text{then Adam's update with the gradient as it is (adam.py)}$$

Source: torch_npu.optim.NpuFusedAdamW; its algorithm is torch.optim.AdamW's, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse_pass.algorithms.adam import adamw

from ._base import NpuFusedOptimizer


class NpuFusedAdamW(NpuFusedOptimizer):
    """torch_npu.optim.NpuFusedAdamW.

    Where document and code of the original differ: betas of exactly 1 are refused (the document says "> 1").
    Unlike the original, each parameter has its own step count, and half precision computes in float32.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        betas: decay of the running averages of the gradient and its square, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        amsgrad: divide by the largest second moment so far.
        state_dtype: dtype of the states; None means each parameter's own.
        flatten: "params" re-homes the parameters in one buffer per group and dtype (`RuleOptimizer` says more).
        master_weights: keep what half-precision parameters round away (`RuleOptimizer` says more).
        stochastic_rounding: round new values of half-precision parameters by chance (`RuleOptimizer` says more).

    Raises:
        ValueError: a value is not allowed.
    """

    rule = adamw
    torch_class = torch.optim.AdamW
    decouples = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        half: Any = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, state_dtype=state_dtype, flatten=flatten, **half)
