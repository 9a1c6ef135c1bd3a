"""A captured step of DTensors as a step of their local parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from npu_fuse_pass.ir.expr import REDUCTIONS, postorder
from npu_fuse_pass.ir.types import Captured, Update
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.tensors.sharded import alike, holds_values, local


def of_this_process(captured: Captured, dtensors: Mapping[int, Tensor]) -> Captured:
    """The step with the shapes of local parts, or unfused with the reason why local parts differ.

    Args:
        dtensors: the leaves that are DTensors, by index.
    """
    if not captured.updates:
        return captured
    reason = _why_not(captured, dtensors)
    if reason is not None:
        return Captured(captured.leaves, [], [reason])
    leaves = list(captured.leaves)
    for i, t in dtensors.items():
        leaves[i] = dataclasses.replace(leaves[i], shape=tuple(map(int, local(t).shape)))
    return dataclasses.replace(captured, leaves=leaves)


def _why_not(captured: Captured, dtensors: Mapping[int, Tensor]) -> Reason | None:
    if captured.segments or captured.stores or captured.unfused:
        return captured.unfused[0] if captured.unfused else Code.SHARDED("original operations take DTensors")
    if any(o.leaf is not None and captured.leaves[o.leaf].shape for o in captured.returned):
        return Code.SHARDED("the graph returns a tensor")
    if not all(map(holds_values, dtensors.values())):
        return Code.SHARDED("a DTensor holds a part of a sum")
    return next((r for update in captured.updates if (r := _why_not_alone(update, captured, dtensors))), None)


def _why_not_alone(update: Update, captured: Captured, dtensors: Mapping[int, Tensor]) -> Reason | None:
    """The reason why an update cannot be computed from local parts alone; None if it can."""
    roots = [e for _, e in (*update.writes, *update.contributions)]
    reduced = update.contributions or any(e.op in (*REDUCTIONS, "numel") for e in postorder(roots))
    for member in update.members:
        tensors = [dtensors.get(i) for i in member if captured.leaves[i].shape]
        spread = [t for t in tensors if t is not None]
        if not spread:
            continue
        if reduced:
            return Code.SHARDED("the step takes norms or sums of DTensors")
        if len(spread) < len(tensors) or not all(alike(spread[0], t) for t in spread):
            remedy = "give gradients the layout of their parameters: p.grad.redistribute(placements=p.placements)"
            return Code.SHARDED("tensors of one update are distributed in different ways", "", remedy)
    return None
