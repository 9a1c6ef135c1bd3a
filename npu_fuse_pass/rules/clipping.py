"""Let Dynamo capture `torch.nn.utils.clip_grad_norm_` together with a step, where torch is older than 2.11.

There Dynamo ends the graph at the C function that sorts the gradients by device and dtype; newer versions trace it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from npu_fuse_pass.private_torch import find

_TRACED_SINCE = (2, 11)


def older_than(version: tuple[int, int]) -> bool:
    """True if this torch is older than `version` (major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) < version


@functools.cache
def let_clipping_be_captured() -> None:
    """Give Dynamo the grouping of gradients in Python, for this process; eager calls stay C++."""
    if older_than(_TRACED_SINCE):
        original = find("torch.utils._foreach_utils._group_tensors_by_device_and_dtype")
        if original is not None:
            torch.compiler.substitute_in_graph(original)(grouped)


def grouped(
    tensorlistlist: list[list[Tensor | None]], with_indices: bool = False
) -> dict[tuple[torch.device, torch.dtype], tuple[list[list[Tensor | None]], list[int]]]:
    """Sort the positions of parallel lists by device and dtype of their first tensor, in the order of appearance.

    Returns:
        (device, dtype) -> (the lists' entries of that kind, their positions if `with_indices`).
    """
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[list[Tensor | None]], list[int]]] = {}
    for position, entries in enumerate(zip(*tensorlistlist, strict=True)):
        for tensor in entries:
            if tensor is not None:
                break
        else:
            continue
        kind = (tensor.device, tensor.dtype)
        if kind not in groups:
            groups[kind] = ([[] for _ in tensorlistlist], [])
        lists, positions = groups[kind]
        for of_kind, entry in zip(lists, entries, strict=True):
            of_kind.append(entry)
        if with_indices:
            positions.append(position)
    return groups
