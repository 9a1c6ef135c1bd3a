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
from npu_fuse_pass.capture.stacked import all_met
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
    return all_met(node, lambda n: _met(n, value)) is None


def _met(node: fx.Node, value: Tensor) -> list[fx.Node] | None:
    """What is computed of a tensor entry by entry; None where it is used as a number."""
    found: list[fx.Node] = []
    for user in node.users:
        name, made = operation_name(user), recorded(user)
        if name in _READ or (name in VIEWS and isinstance(made, Tensor) and made.shape != value.shape):
            return None
        plain = name.removeprefix("_foreach_").removesuffix("_")
        if plain not in _ENTRYWISE and plain != "getitem":
            continue
        if not isinstance(made, Tensor) or _is_one(made):
            found.append(user)
        elif plain != "getitem" and made.dim():
            return None
    return found


def _is_one(value: Tensor) -> bool:
    return value.dim() > 0 and all(type(n) is int and n == 1 for n in value.shape)
