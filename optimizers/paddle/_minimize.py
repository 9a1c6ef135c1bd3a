"""Paddle's `minimize`: backward where it is still to be done, then an update of all or some parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_cleared", "mark_cleared", "minimize"]

# Marks on a gradient, with its version at that time: it was cleared; minimize() has used it. Gradients that were made
# under torch.inference_mode() count no versions, and get none.
_CLEARED, _USED = "_paddle_cleared", "_paddle_used"


def minimize(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    parameters: Iterable[Tensor | str] | None,
    no_grad_set: Iterable[Tensor | str] | None,
) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
    """`PaddleOptimizer.minimize`."""
    groups = optimizer.param_groups
    everything = {p: None for group in groups for p in group["params"]}
    excluded = _find(groups, no_grad_set, "no_grad_set")
    chosen = [p for p in _find(groups, parameters, "parameters") or everything if p not in excluded]
    if any(p.grad is not None and not is_cleared(p) for p in everything):
        if {True} == {_has_mark(p.grad, _USED) for p in chosen if p.grad is not None}:
            warnings.warn("minimize() uses the gradients of its last call again", stacklevel=3)
    elif len(chosen) == len(everything):
        loss.backward()
    elif wanted := [p for p in chosen if p.requires_grad]:
        loss.backward(inputs=wanted)
    left_out = [(p, p.grad) for p in everything.keys() - set(chosen) if p.grad is not None]
    for p, _ in left_out:
        p.grad = None
    try:
        optimizer.step()
    finally:
        for p, grad in left_out:
            p.grad = grad
    updated = [(p, p.grad) for p in chosen if p.grad is not None]
    for _, grad in updated:
        _mark(grad, _USED)
    return [], updated


def mark_cleared(params: Iterable[Tensor]) -> None:
    """Remember that these gradients were cleared: until they are replaced or written, none was produced."""
    for p in params:
        if p.grad is not None:
            _mark(p.grad, _CLEARED)


def is_cleared(param: Tensor) -> bool:
    """True if a parameter has a gradient, and it was not written since it was cleared."""
    return param.grad is not None and _has_mark(param.grad, _CLEARED)


def _mark(grad: Tensor, mark: str) -> None:
    if not grad.is_inference():
        grad.__dict__[mark] = grad._version


def _has_mark(grad: Tensor, mark: str) -> bool:
    return mark in grad.__dict__ and bool(grad.__dict__[mark] == grad._version)


def _find(groups: list[dict[str, Any]], wanted: Iterable[Tensor | str] | None, label: str) -> dict[Tensor, None]:
    """The parameters that an argument of minimize lists."""
    if isinstance(wanted, (Tensor, str)) or not isinstance(wanted, (Iterable, type(None))):
        raise TypeError(f"{label} should be a list or set of parameters or names, got {type(wanted)} here")
    known = {p for group in groups for p in group["params"]}
    names = {n: p for g in groups for n, p in zip(g.get("param_names", ()), g["params"], strict=False)}
    found: dict[Tensor, None] = {}
    for item in wanted or ():
        if isinstance(item, str) and not names:
            raise ValueError(f"{label} has the name {item!r}: give the optimizer model.named_parameters()")
        if not isinstance(item, (Tensor, str)):
            raise TypeError(f"{label} should hold parameters or names, got {type(item)} here")
        param = names.get(item) if isinstance(item, str) else item
        if param is None or param not in known:
            what = f"the name {item!r}" if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
            raise ValueError(f"{label} has {what}, which this optimizer does not update")
        found[param] = None
    return found
