"""A group in an NPU program: its split formula, the kernel that computes it, the members that are updated as one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.totals import adds_nothing
from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.lowerings.npu.emit import dedicated, elementwise, list_operations
from npu_fuse_pass.lowerings.npu.emit import lists as npu_foreach
from npu_fuse_pass.lowerings.npu.emit.dedicated_operations import series
from npu_fuse_pass.lowerings.npu.emit.split import constants_of, slots_of, split
from npu_fuse_pass.lowerings.npu.kernels.launch import KERNEL, Generated
from npu_fuse_pass.lowerings.npu.plan import LayoutCost, Plan, Span
from npu_fuse_pass.lowerings.program import check_written_once
from npu_fuse_pass.match.result import Match, NoMatch
from npu_fuse_pass.reasons import Code

_GIVEN = ("input", "attribute")


class LoweredGroup:
    """One group: how its formula is split, and which members the graph updates as one.

    Members without elements have nothing to do on the device. `plan`: the members updated as one; `note`: why this
    kernel. `generated`: generated kernels, if any; else `dedicated`: one operation per span for the writes to tensors,
    if any.
    """

    def __init__(
        self,
        group: Group,
        leaves: Sequence[Leaf],
        found: Match | NoMatch | None = None,
        chip: str = "",
        kernels: str = "auto",
        generated: Generated | str = "",
    ) -> None:
        formula = group.formula
        self.group, self._leaves = group, leaves
        self.plan = Plan(())
        self.generated = generated if isinstance(generated, Generated) else None
        self.dedicated: dedicated.Dedicated | None = None
        self._lists = False
        if self.generated is not None:
            self.splits = [self.generated.made]
            chosen: dedicated.Dedicated | str = self.generated.note
        else:
            chosen = self._operations(found, chip, kernels, generated)
        self.device_members = [
            i
            for i, member in enumerate(group.members)
            for s in formula.tensor_slots[:1]
            if 0 not in leaves[member[s]].shape
        ]
        inputs = {m[s] for s in formula.scalar_slots if s not in self.states for m in group.members}
        self.device_scalars = {i for i in inputs if leaves[i].kind in _GIVEN and leaves[i].device.type != "cpu"}
        """0-dim leaves on a device, which the host mirrors (`host.mirror`)."""
        not_generated = f"no generated kernel: {generated}" if isinstance(generated, str) and generated else ""
        why = chosen if isinstance(chosen, str) else chosen.note
        self.note = "; ".join(filter(None, (not_generated, why, self.waits)))
        check_written_once(group)

    def _operations(
        self, found: Match | NoMatch | None, chip: str, kernels: str, generated: object
    ) -> dedicated.Dedicated | str:
        """Split the formula for GE operations; returns the dedicated operation, or why there is none.

        Raises:
            Unsupported: GE has none; says why there is no generated kernel, either, if one was asked for.
        """
        try:
            return self._split(found, chip, kernels)
        except Unsupported as e:
            if not generated:
                raise
            both = dataclasses.replace(e.reason, text=f"{e.reason.text}; no generated kernel: {generated}")
            raise Unsupported.of(both) from e

    def _split(self, found: Match | NoMatch | None, chip: str, kernels: str) -> dedicated.Dedicated | str:
        group, leaves, formula = self.group, self._leaves, self.group.formula
        totals = formula.total_slots
        chosen = dedicated.choose(group, found, totals, chip, kernels)
        self.dedicated = None if isinstance(chosen, str) else chosen
        self._lists = kernels != "elementwise" and self.dedicated is None and series(chip) in list_operations.SERIES
        constants = constants_of(group, leaves)
        self.splits = [self.dedicated.split if self.dedicated else split(formula, totals, False, constants)]
        if formula.contributions:
            self.splits.append(split(formula, totals, True, constants))
            empty = any(0 in leaves[m[s]].shape for m in group.members for s in formula.tensor_slots[:1])
            if empty and not all(map(adds_nothing, formula.contributions)):
                why = "a tensor without elements adds something to a total, and GE operations leave such tensors out"
                raise Unsupported(group.name, why, Code.ACROSS_PARAMETERS)
            if self.splits[1].device_slots:
                raise Unsupported(group.name, "a total depends on another total", Code.ACROSS_PARAMETERS)
        for made in self.splits:
            elementwise.check(made.device)
        self._lists = self._lists and npu_foreach.usable(self.splits[0].device)
        return chosen

    @property
    def states(self) -> tuple[int, ...]:
        """Slots of 0-dim states that the device reads and writes, as no host can: they follow from tensors."""
        return () if self.generated is None else self.generated.made.states

    @property
    def in_lists(self) -> bool:
        """True if operations on lists update several spans at once."""
        return self._lists and len(self.plan.spans) > 1

    @property
    def kernel(self) -> str:
        """The kernel that computes the group, for the report."""
        if self.generated is not None:
            return KERNEL
        if self.dedicated is not None:
            return self.dedicated.operation.name
        return list_operations.KERNEL if self.in_lists else "GE elementwise"

    @property
    def waits(self) -> str:
        """The report's note on when the host waits for the device; "" if it never does."""
        if not self.device_scalars:
            return ""
        return (
            f"{len(self.device_scalars)} of its 0-dim tensors are on the device: the host knows what steps write "
            "there, and waits to read them where something else has written one. Writes that torch does not count (to "
            "t.data, collectives, raw kernels) need torch.autograd.graph.increment_version(t)"
        )

    @property
    def plain(self) -> bool:
        """True if kernels="elementwise" would change nothing."""
        return self.generated is None and self.dedicated is None and not self._lists

    def _cost_of_writes(self) -> tuple[int, int]:
        """GE operations, and bytes per element."""
        spans = self.plan.spans
        if not self.in_lists:
            each, size = elementwise.cost(self.splits[0].device) if self.dedicated is None else self.dedicated.cost
            return each * len(spans), size
        operations = size = 0
        for begin in range(0, len(spans), list_operations.LONGEST):
            chunk = spans[begin : begin + list_operations.LONGEST]
            added, size = npu_foreach.cost(self.splits[0].device, len(chunk), self._shared(chunk))
            operations += added
        return operations, size

    def _shared(self, spans: Sequence[Span]) -> list[int]:
        """The scalar slots of the device formula with one number for all of these spans."""
        made, members = self.splits[0], [self.group.members[span.members[0]] for span in spans]
        numbers = [slots_of(e) for e in made.values]
        alike = [len({tuple(m[s] for s in slots if s < len(m)) for m in members}) == 1 for slots in numbers]
        found = [*alike, *(True for _ in made.device_slots)]
        return [s for s, same in zip(made.device.scalar_slots, found, strict=True) if same]

    @property
    def layout(self) -> LayoutCost:
        """The plan and its cost, for the report."""
        if self.generated is not None:
            made = self.generated.kernels
            return LayoutCost("list", "", len(made.launches), made.bytes_per_element)
        first, slots = self.group.formula.tensor_slots[:1], self.group.formula.slots
        elements = moved = 0
        for span in self.plan.spans:
            size = sum(math.prod(self._leaves[self.group.members[m][s]].shape) for m in span.members for s in first)
            elements += size
            moved += size * sum(2 * slots[s].dtype.itemsize for s in span.gathered)
        operations, size = self._cost_of_writes()
        for launches, each in (elementwise.cost(made.device) for made in self.splits[1:]):
            operations, size = operations + launches * len(self.plan.spans), size + each
        operations += sum(len(span.gathered) for span in self.plan.spans)
        size += round(moved / max(1, elements))
        return LayoutCost(self.plan.name, self.plan.reason, operations, size)
