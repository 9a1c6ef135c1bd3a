r"""Rprop: steps that grow where the gradient keeps its sign and shrink where it changes it.

$$s \leftarrow \mathrm{clamp}(s \cdot \eta^\pm, s_{min}, s_{max}), \quad
  g \leftarrow 0 \text{ where the sign changed}, \quad p \leftarrow p - s\,\mathrm{sign}(g)$$

Source: torch.optim.Rprop; Riedmiller and Braun, The RPROP Algorithm (1993).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.rules import rule, zeros


@rule(states={"prev": zeros, "step_size": zeros}, defaults={"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)})
def rprop(
    param: Tensor,
    grad: Tensor,
    prev: Tensor,
    step_size: Tensor,
    *,
    etas: tuple[Tensor, Tensor],
    step_sizes: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One update; a step size begins as the learning rate, which is not read afterwards."""
    (shrink, grow), (least, most) = etas, step_sizes
    agreement = (grad * prev).sign()
    shrunk = torch.where(agreement < 0, step_size * shrink, step_size)
    step_size = torch.where(agreement > 0, step_size * grow, shrunk)
    step_size = torch.minimum(torch.maximum(step_size, least), most)
    grad = torch.where(agreement < 0, 0.0, grad)
    return param - grad.sign() * step_size, grad, step_size
