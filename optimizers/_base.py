"""What the NpuFused classes share: checked hyperparameters and `clip_grad_norm_fused_`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import required

from npu_fuse_pass.rules.declaration import number_of
from npu_fuse_pass.rules.optimizer import RuleOptimizer

__all__ = ["NpuFusedOptimizer", "refuse"]

# hyperparameter -> what its error starts with (the originals' wording), and the smallest allowed value
_NUMBERS: dict[str, tuple[str, float]] = {
    "lr": ("Invalid learning rate", 0.0),
    "eps": ("Invalid epsilon value", 0.0),
    "weight_decay": ("Invalid weight_decay value", 0.0),
    "momentum": ("Invalid momentum value", 0.0),
    "alpha": ("Invalid alpha value", 0.0),
    "dampening": ("Invalid dampening value", -math.inf),
}
_FLAGS = ("amsgrad", "nesterov", "centered", "decoupled_decay", "lr_in_momentum", "adam", "use_global_grad_norm")


class NpuFusedOptimizer(RuleOptimizer):
    """Base of the drop-in classes: every group's hyperparameters are checked before anything is changed.

    Attributes:
        decouples: weight decay acts on the parameter alone; groups of torch's classes may ask for either.
    """

    decouples = False

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        super().__init__(params, {**defaults, **self.checked(defaults)}, **options)

    def checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters among `values`, in the form that groups hold; a ValueError for a wrong one."""
        if values.get("decoupled_weight_decay", self.decouples) != self.decouples:
            other = "NpuFusedAdam adds it to the gradient" if self.decouples else "NpuFusedAdamW decouples it"
            allowed = f"{self.decouples}; {other}"
            raise refuse("Invalid decoupled_weight_decay value", values["decoupled_weight_decay"], allowed)
        return {name: _checked(name, value) for name, value in values.items() if value is not required}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as in torch.optim; they may already have gradients.

        Raises:
            ValueError: an option has a value that is not allowed. Nothing is changed then.
        """
        if isinstance(param_group, dict):
            checked = self.checked(self.complete(param_group))
            param_group.update({name: checked[name] for name in param_group.keys() & checked.keys()})
        super().add_param_group(param_group)

    def saved_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """As in the base class; a ValueError for a saved option with a value that is not allowed."""
        return super().saved_group(self.checked(self.complete(group)))

    @torch.no_grad()
    def clip_grad_norm_fused_(self, max_norm: float, norm_type: float | Literal["inf"] = 2) -> Tensor:
        r"""Scale all gradients in place by \(c = max\_norm / (norm + 10^{-6})\) where \(c < 1\).

        Args:
            max_norm: largest norm of all gradients together.
            norm_type: order of the norm; may be infinity, also as "inf".

        Returns:
            The norm before scaling, computed in float32 for half-precision gradients.
        """
        largest = number_of(max_norm)
        if largest is None or math.isnan(largest) or largest < 0:
            raise refuse("Invalid max_norm value", max_norm, "a number >= 0")
        order = math.inf if norm_type == "inf" else number_of(norm_type) or math.nan
        if not order > 0:
            raise refuse("Invalid norm_type value", norm_type, "a number > 0 or infinity")
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([g.float() if g.itemsize == 2 else g for g in grads if g.numel()], order)
        factor = largest / (norm + 1e-6)
        factor = torch.where(factor < 1, factor, 1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.device))
        return norm


def refuse(label: str, value: object, allowed: str) -> ValueError:
    """The error for a value that is not allowed, in the originals' wording."""
    return ValueError(f"{label}: {value!r} (allowed: {allowed})")


def _checked(name: str, value: Any) -> Any:
    if name in _NUMBERS:
        label, least = _NUMBERS[name]
        return _number(label, value, least, math.inf)
    if name == "betas":
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise refuse("Invalid betas value", value, "two numbers in [0, 1)")
        return tuple(_number(f"Invalid beta parameter at index {i}", beta, 0.0, 1.0) for i, beta in enumerate(value))
    if name in _FLAGS and not isinstance(value, bool):
        raise refuse(f"Invalid {name} value", value, "True or False")
    if name == "maximize" and value:
        raise refuse("Invalid maximize value", value, "False; minimize the negative instead")
    return value


def _number(label: str, value: Any, least: float, bound: float) -> Any:
    """`value` if it is a finite number in [least, bound), or a tensor of one; other kinds of numbers become floats."""
    plain = number_of(value)
    if plain is None or not math.isfinite(plain) or not least <= plain < bound:
        smallest = "a finite number" if least == -math.inf else f"a finite number >= {least:g}"
        raise refuse(label, value, smallest if bound == math.inf else f"{smallest} and < {bound:g}")
    return value if isinstance(value, (int, float, Tensor)) else plain
