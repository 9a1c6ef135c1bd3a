"""Sums and extremes of numbers over a process group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_over(group: Any, ops: Sequence[str], values: Tensor) -> None:
    """Reduce numbers over the processes of a group, in place: one collective, whatever their count.

    Args:
        group: a torch.distributed.ProcessGroup.
        ops: of each number: "sum", "amax" or "amin". NaN wins an extreme, as in torch.
        values: float64, of one dimension.
    """
    if set(ops) <= {"sum"}:
        dist.all_reduce(values, group=group)
        return
    of_each = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_each, values, group=group)
    rows = torch.stack(of_each)
    for i, op in enumerate(ops):
        values[i] = getattr(rows[:, i], op)()


def largest_over(groups: Iterable[Any], values: Tensor) -> None:
    """Take the maximum of each number over all processes of these groups, in place."""
    for group in groups:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
