r"""Stochastic gradient descent with momentum.

$$g \leftarrow g + \lambda p, \qquad b_1 = g, \quad b_t = \mu\,b_{t-1} + (1-d)\,g, \qquad
  p \leftarrow p - lr\,(g + \mu b_t \text{ with nesterov, else } b_t)$$

Source: torch_npu.optim.NpuFusedSGD; its algorithm is torch.optim.SGD's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import required

from npu_fuse_pass.algorithms.sgd import sgd

from ._base import NpuFusedOptimizer


class _NesterovError(ValueError, TypeError):
    """A refusal of nesterov=True: a ValueError in the original's code, a TypeError in its document."""


class NpuFusedSGD(NpuFusedOptimizer):
    """torch_npu.optim.NpuFusedSGD.

    Where document and code of the original differ: nesterov with momentum <= 0 or dampening != 0 is a
    ValueError in the code and a TypeError in the document; here it is both. Unlike the original, "the first
    update" is per parameter. A parameter that is listed twice is updated twice, each time from what the update before
    has made; torch.optim.SGD begins its buffer anew in both updates of the first step.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0; required.
        momentum: factor of the old buffer, >= 0. With 0 there is no buffer and dampening has no effect.
        dampening: the new gradient counts (1 - dampening).
        weight_decay: L2 penalty, >= 0.
        nesterov: look ahead along the buffer; needs momentum > 0 and dampening 0.
        state_dtype: dtype of the states; None means each parameter's own.
        flatten: "params" re-homes the parameters in one buffer per group and dtype (`RuleOptimizer` says more).
        master_weights: keep what half-precision parameters round away (`RuleOptimizer` says more).
        stochastic_rounding: round new values of half-precision parameters by chance (`RuleOptimizer` says more).

    Raises:
        ValueError: lr is missing, or a value is not allowed.
    """

    rule = sgd
    torch_class = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float = required,  # type: ignore[assignment]
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        flatten: str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov}
        half: Any = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, defaults, state_dtype=state_dtype, flatten=flatten, **half)

    def checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """As in the base class; also refuses nesterov without what it needs."""
        needs = "Nesterov momentum requires a momentum and zero dampening"
        nesterov = values["nesterov"] is True
        try:
            checked = super().checked(values)
        except ValueError as error:
            raise (_NesterovError(f"{error}. {needs}") if nesterov else error) from None
        if nesterov and (checked["momentum"] == 0 or checked["dampening"] != 0):
            got = f"momentum={checked['momentum']!r}, dampening={checked['dampening']!r}"
            raise _NesterovError(f"{needs}, got {got} (allowed: momentum > 0, dampening 0)")
        return checked
