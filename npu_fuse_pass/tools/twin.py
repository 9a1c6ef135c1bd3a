"""A copy of an optimizer that shares no memory with it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.tensors.sharded import as_dtensor, is_dtensor, local
from npu_fuse_pass.tools.plain_step import PATCHED


def twin(opt: torch.optim.Optimizer, missing_gradients: bool = True) -> torch.optim.Optimizer:
    """Copy an optimizer into new memory, with the layout and sharing of the original.

    Args:
        missing_gradients: copies of parameters without gradients get zero gradients.
    """
    memo: dict[Any, Any] = {}
    for group in opt.param_groups:
        for p in group["params"]:
            memo[id(p)] = _copied(p, memo, missing_gradients)
    hooks = [name for name in vars(opt) if name.endswith("_hooks")]
    if type(opt).__getstate__ is torch.optim.Optimizer.__getstate__:  # which keeps no attributes of subclasses
        made = object.__new__(type(opt))
        fields = {k: v for k, v in vars(opt).items() if k not in (*PATCHED, *hooks)}
        vars(made).update(copy.deepcopy(fields, memo))
    else:
        made = copy.deepcopy(opt, memo)
    for name in PATCHED:
        vars(made).pop(name, None)
    vars(made).update({name: OrderedDict() for name in hooks})
    return made


def _copied(p: Tensor, memo: dict[Any, Any], missing_gradients: bool) -> Tensor:
    """Copy a parameter with its gradient; tensors that share memory still do."""

    def with_storage(t: Tensor) -> Tensor:
        if is_dtensor(t):
            return as_dtensor(with_storage(local(t)), t)
        storage = copy.deepcopy(t.untyped_storage(), memo)
        return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())

    made: Tensor = with_storage(p.detach())
    made = torch.nn.Parameter(made, p.requires_grad) if isinstance(p, torch.nn.Parameter) else made
    made.requires_grad_(p.requires_grad)
    if p.grad is not None:
        made.grad = with_storage(p.grad) if p.grad.layout == torch.strided else p.grad.clone()
    elif p.requires_grad and missing_gradients:
        made.grad = torch.zeros_like(made)
    return made
