"""Checks, at every step, that the plans of a graph still fit, and new plans where they do not."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.types import Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.host.scalars import holds, picked
from npu_fuse_pass.lowerings.npu.layout.spans import Planner, gaps
from npu_fuse_pass.lowerings.npu.lowered_group import LoweredGroup
from npu_fuse_pass.lowerings.npu.plan import Plan, Span
from npu_fuse_pass.tensors.same import SameTensors

_TRIES = 4  # steps in which a better plan is looked for: DDP settles its buckets after the first step
_PLANS = 8  # plans to make at most, each a compile; after that every member is updated alone, which always fits


class Replanner:
    """The plan of every group, replaced when it does not fit a step.

    It does not if a tensor of a span has moved, or its members differ in numbers or in having a gradient. In the first
    steps a better plan also replaces one that fits.
    """

    def __init__(self, leaves: Sequence[Leaf], groups: Sequence[LoweredGroup], layout: str) -> None:
        members = [(lowered, lowered.group.members[m]) for lowered in groups for m in lowered.device_members]
        uses = collections.Counter(m[s] for lowered, m in members for s in lowered.group.formula.tensor_slots)
        self._leaves, self._groups = leaves, groups
        # a generated kernel has a table of addresses
        layouts = [layout if lowered.generated is None else "list" for lowered in groups]
        self._planners = [
            Planner(lowered.group, lowered.device_members, leaves, uses, each)
            for lowered, each in zip(groups, layouts, strict=True)
        ]
        self._tries, self._left, self._made = _TRIES, _PLANS, False
        self._use([planner.alone("its tensors were not seen yet") for planner in self._planners])

    def update(self, values: LeafValues, numbers: Sequence[Sequence[Tensor]], active: Sequence[Sequence[bool]]) -> None:
        """Make the plans fit a step: `plans` is the same list if they did, else another one.

        Args:
            values: of all leaves.
            numbers: per group: the numbers of its members, float64, of shape () or (members,).
            active: per group and member: True if it takes part.
        """
        fits = self._together(active) and self._equal(numbers) and self._in_place(values, active)
        if (fits and self._made and not self._may_improve(active)) or not any(map(any, active)):
            return
        for planner, lowered, taking_part in zip(self._planners, self._groups, active, strict=True):
            if any(taking_part):
                planner.apart |= {m for m in lowered.device_members if not taking_part[m]}
        found = [
            planner.plan(values, _keys(given, len(lowered.group.members)))
            for planner, lowered, given in zip(self._planners, self._groups, numbers, strict=True)
        ]
        if self._made and fits and _size(found) >= _size(self.plans):
            return
        self._left -= self._made
        self._made = True
        if self._left <= 0:
            found = [planner.alone("tensors keep moving between steps") for planner in self._planners]
        self._use(found)

    def _use(self, plans: list[Plan]) -> None:
        self.plans = plans
        self._same, self._addresses = SameTensors(), list[int]()
        fixed: list[int] = []  # leaves that must not move
        self._extents: list[tuple[int, int]] = []  # of these, the first of each span; how many elements follow
        self._mates: list[tuple[Tensor, Tensor]] = []  # per group: members of spans, and the first of each one's span
        for planner, lowered, plan in zip(self._planners, self._groups, plans, strict=True):
            spans = [span for span in plan.spans if len(span.members) > 1]
            for span in spans:
                slots = [s for s in planner.slots if s not in span.gathered]
                for leaves in ([lowered.group.members[m][s] for m in span.members] for s in slots):
                    fixed += leaves
                    self._extents.append((leaves[0], sum(math.prod(self._leaves[i].shape) for i in leaves)))
            mates = [(m, span.members[0]) for span in spans for m in span.members]
            pairs = torch.tensor(mates, dtype=torch.int64, device="cpu").reshape(-1, 2)
            self._mates.append((pairs[:, 0], pairs[:, 1]))
        self._fixed = picked(fixed)

    def _may_improve(self, active: Sequence[Sequence[bool]]) -> bool:
        complete = all(
            taking_part[m]
            for planner, lowered, taking_part in zip(self._planners, self._groups, active, strict=True)
            for m in lowered.device_members
            if m not in planner.apart
        )
        self._tries -= complete
        return complete and self._tries >= 0

    def _one_storage(self, values: LeafValues) -> bool:
        """True if every span still lies in one storage: freed memory may hold separate tensors now."""
        firsts = [(values[i], elements) for i, elements in self._extents]
        return all(t is not None and holds(t, elements) for t, elements in firsts)

    def _together(self, active: Sequence[Sequence[bool]]) -> bool:
        """True if of every span all members take part, or none."""
        return all(map(all, active)) or all(
            len({taking_part[m] for m in span.members}) == 1
            for plan, taking_part in zip(self.plans, active, strict=True)
            for span in plan.spans
        )

    def _equal(self, numbers: Sequence[Sequence[Tensor]]) -> bool:
        """True if all members of each span have the same numbers, bit by bit."""
        return all(
            torch.equal(bits[members], bits[firsts])
            for given, (members, firsts) in zip(numbers, self._mates, strict=True)
            if len(members)
            for bits in (v.view(torch.int64) for v in given if v.ndim)
        )

    def _in_place(self, values: LeafValues, active: Sequence[Sequence[bool]]) -> bool:
        """True if the tensors of every span that takes part are still adjacent."""
        tensors = self._fixed(values)
        same = self._same.match(tensors)
        if same and self._addresses == list(map(Tensor.data_ptr, tensors)) and self._one_storage(values):
            return True
        spans = zip(self._planners, self.plans, active, strict=True)
        if not all(
            _adjacent(planner, span, values)
            for planner, plan, taking_part in spans
            for span in plan.spans
            if len(span.members) > 1 and taking_part[span.members[0]]
        ):
            return False
        if same or (all(t is not None for t in tensors) and self._same.learn(tensors)):
            self._addresses = list(map(Tensor.data_ptr, tensors))
        return True


def _adjacent(planner: Planner, span: Span, values: LeafValues) -> bool:
    places = [planner.place(m, values) for m in span.members]
    slots = [s for s in planner.slots if s not in span.gathered]
    pairs = itertools.pairwise(places)
    return all(a is not None and b is not None and not any(True for _ in gaps(a, b, slots)) for a, b in pairs)


def _keys(numbers: Sequence[Tensor], members: int) -> list[tuple[int, ...]]:
    """The bits of every member's numbers."""
    columns = [v.view(torch.int64).tolist() for v in numbers if v.ndim]
    return list(zip(*columns, strict=True)) if columns else [()] * members


def _size(plans: Sequence[Plan]) -> tuple[int, int]:
    """The size of a graph: spans, and concatenated tensors."""
    spans = [span for plan in plans for span in plan.spans]
    return len(spans), sum(len(span.members) * len(span.gathered) for span in spans)
