"""The rounds in which totals are added up: one may depend on another (a norm of gradients that were clipped before)."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.types import Group, Leaf


def rounds(groups: Sequence[Group], leaves: Sequence[Leaf]) -> int:
    """The number of times that contributions are computed and added up until every total is right; 0 without totals."""
    return max(depths(groups, leaves).values(), default=0)


def depths(groups: Sequence[Group], leaves: Sequence[Leaf]) -> dict[int, int]:
    """For each total that something is added to, the round in which it is right, from 1 on."""
    read: dict[int, set[int]] = {}
    for group in groups:
        for k, root in enumerate(group.formula.contributions):
            slots = {e.value for e in postorder([root]) if e.op == "leaf" and not e.tensor}
            for member, totals in zip(group.members, group.totals, strict=True):
                given = (leaves[member[s]] for s in slots)  # type: ignore[index]
                read.setdefault(totals[k], set()).update(leaf.index for leaf in given if leaf.kind == "total")
    depth: dict[int, int] = {}

    def deep(total: int) -> int:
        if total not in depth:
            depth[total] = 1 + max(map(deep, read.get(total, ())), default=0)
        return depth[total]

    return {total: deep(total) for total in read}


def adds_nothing(contribution: Expr) -> bool:
    """Whether a member without elements adds 0 to a total, by the form of what it adds: sums of nothing are 0."""
    zero: dict[int, bool] = {}
    for e in postorder([contribution]):
        below = [zero[id(a)] for a in e.args]
        if e.op in ("cast", "sqrt", "abs", "neg", "add", "sub"):
            zero[id(e)] = all(below)
        else:
            zero[id(e)] = e.op in ("sum", "zero") or (e.op == "mul" and any(below)) or (e.op == "div" and below[0])
    return zero[id(contribution)]


def total_slots(groups: Sequence[Group], leaves: Sequence[Leaf]) -> list[frozenset[int] | None]:
    """For each group the scalar slots that hold totals; None for all where contributions are computed several times."""
    if rounds(groups, leaves) > 1:
        return [None] * len(groups)
    return [frozenset(g.formula.total_slots if g.formula.contributions else ()) for g in groups]
