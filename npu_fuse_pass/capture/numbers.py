"""Tensors of one element that a graph uses as numbers: a count or a norm that an optimizer keeps as `torch.zeros(1)`.

What is read with `item()`, given another shape than its own, put into a vector of several or spread over a parameter is
no parameter's tensor, so that it is read as what is 0-dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.flat import VIEWS
from npu_fuse_pass.capture.values import COUNTERS
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.fx_nodes.names import operation_name
from npu_fuse_pass.tensors.sharded import is_dtensor

_READ = ("item", "_local_scalar_dense", "cat", "concat")
_ENTRYWISE = {*ROWS, "to", "float", "double", "clone", "detach", "copy", "fill", "zero"}


def is_number(node: fx.Node, value: Any) -> bool:
    """Whether the graph uses an argument or attribute, which holds `value`, as a number."""
    if not isinstance(value, Tensor) or is_dtensor(value) or value.requires_grad or value.device.type != "cpu":
        return False
    if not _is_one(value) or value.dtype not in (torch.float32, torch.float64, *COUNTERS):
        return False
    found, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            name, made = operation_name(user), recorded(user)
            if name in _READ or (name in VIEWS and isinstance(made, Tensor) and made.shape != value.shape):
                return True
            plain = name.removeprefix("_foreach_").removesuffix("_")
            if plain not in _ENTRYWISE and plain != "getitem":
                continue
            if isinstance(made, Tensor) and not _is_one(made):
                if plain != "getitem" and made.dim():
                    return True
            elif user not in found:
                found.add(user)
                waiting.append(user)
    return False


def _is_one(value: Tensor) -> bool:
    return value.dim() > 0 and all(type(n) is int and n == 1 for n in value.shape)
