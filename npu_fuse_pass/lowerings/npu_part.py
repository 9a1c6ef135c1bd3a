"""A group in an NPU program: how its formula is split, which kernel computes it, which members are updated as one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ..errors import Unsupported
from ..ir import Group, Leaf
from ..match_result import Match, NoMatch
from . import npu_emit, npu_operands
from .npu_layout import Plan
from .npu_split import split


class Part:
    """One group, how its formula is split and which members the graph updates as one.

    Members without elements have nothing to do on the device. `plan` says which are updated as one. `kernel` is what
    computes the group, `note` why. `dedicated`: the writes to tensors are one operation per run.
    """

    def __init__(
        self,
        group: Group,
        leaves: Sequence[Leaf],
        found: Match | NoMatch | None = None,
        chip: str = "",
        kernels: str = "auto",
    ) -> None:
        formula = group.formula
        self.group, self._leaves = group, leaves
        self.plan = Plan(())
        totals = [s for s in formula.scalar_slots if leaves[group.members[0][s]].kind == "total"]
        chosen = npu_operands.choose(group, found, totals, chip, kernels)
        self.dedicated = None if isinstance(chosen, str) else chosen
        self.kernel = "GE elementwise" if isinstance(chosen, str) else chosen.operation.name
        self.note = chosen if isinstance(chosen, str) else chosen.note
        self.splits = [split(formula, totals, contribute=False) if self.dedicated is None else self.dedicated.split]
        if formula.contributions:
            self.splits.append(split(formula, totals, contribute=True))
            if self.splits[1].device_slots:
                raise Unsupported(group.name, "a total depends on another total")
        for made in self.splits:
            npu_emit.check(made.device)
        first = formula.tensor_slots[:1]
        self.on_device = [
            i for i, member in enumerate(group.members) if all(0 not in leaves[member[s]].shape for s in first)
        ]
        if not first:
            self.on_device = []
        for slot in formula.written:
            targets = [member[slot] for member in group.members]
            if len(set(targets)) != len(targets):
                raise Unsupported(group.name, "several members write the same 0-dim tensor")

    @property
    def layout(self) -> Layout:
        """For the report: the plan, and what it costs."""
        first, slots = self.group.formula.tensor_slots[:1], self.group.formula.slots
        elements = moved = 0
        for run in self.plan.runs:
            size = sum(math.prod(self._leaves[self.group.members[m][s]].shape) for m in run.members for s in first)
            elements += size
            moved += size * sum(2 * slots[s].dtype.itemsize for s in run.gathered)
        costs = [npu_emit.cost(made.device) for made in self.splits]
        costs[:1] = [self.dedicated.cost] if self.dedicated is not None else costs[:1]
        gathered = sum(len(run.gathered) for run in self.plan.runs)
        operations = sum(c[0] for c in costs) * len(self.plan.runs) + gathered
        size = sum(c[1] for c in costs) + round(moved / max(1, elements))
        return Layout(self.plan.name, self.plan.reason, operations, size)


@dataclasses.dataclass
class Layout:
    """A group's row in the report: what the fields mean says `report.GroupReport`."""

    name: str
    reason: str
    launches: int
    bytes_per_element: int
