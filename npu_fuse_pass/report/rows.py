"""The report's rows of groups: formulas, memory traffic, and matches in the formula's names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

from npu_fuse_pass.ir.expr import DTYPE_NAMES
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.types import Group, Grouped, Leaf
from npu_fuse_pass.match.result import Match, NoMatch
from npu_fuse_pass.report.report import GroupReport, KernelMatch

Matches = Mapping[str, Match | NoMatch]
"""By the group's name."""


def group_report(
    g: Group, leaves: Sequence[Leaf], lowering: str, kernel: str, bytes_per_element: int, launches: int
) -> GroupReport:
    """The report's row of a fused group."""
    slots = g.formula.tensor_slots
    first = next((s for s in g.formula.written if s in slots), slots[0] if slots else 0)
    leaf = leaves[g.members[0][first]]
    return GroupReport(
        name=g.name,
        formula=readable(g.formula, _labels(g, leaves)),
        updates=len(g.members),
        dtype=DTYPE_NAMES.get(leaf.dtype, str(leaf.dtype)),
        device=str(leaf.device),
        lowering=lowering,
        kernel=kernel,
        bytes_per_element=bytes_per_element,
        launches=launches,
        elements=sum(max((math.prod(leaves[m[s]].shape) for s in slots), default=0) for m in g.members),
        _of_params=g.of_params,
        _returned=all(leaves[m[s]].kind == "output" for m in g.members for s in g.formula.written),
    )


def show_matches(rows: Sequence[GroupReport], grouped: Grouped, matches: Callable[[], Matches]) -> None:
    """Set the matches of the rows of groups that write leaves. `matches` is called when one is first read."""
    named = {g.name: g for g in grouped.groups}
    for row in rows:
        if row.writes == "leaves":
            row._matched = functools.partial(_kernel_match, named[row.name], grouped.leaves, matches)


def _kernel_match(g: Group, leaves: Sequence[Leaf], matches: Callable[[], Matches]) -> KernelMatch | str:
    found = matches()[g.name]
    if isinstance(found, NoMatch):
        return found.reason
    labels, kernel = _labels(g, leaves), found.kernel
    tensors = {name: labels[slot] for name, slot in found.outputs.items()}
    arguments = found.readable(labels)
    return KernelMatch(kernel.name, tensors, arguments, list(found.assumptions), found.tolerance)


def _labels(g: Group, leaves: Sequence[Leaf]) -> list[str]:
    """The names of a group's slots; a constant's value where all members share it."""
    return [_label(g, leaves, slot) for slot in range(len(g.formula.slots))]


def _label(g: Group, leaves: Sequence[Leaf], slot: int) -> str:
    values = {leaves[m[slot]].value for m in g.members} if leaves[g.members[0][slot]].kind == "constant" else set()
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return f"c{slot}" if values else g.labels[slot]
