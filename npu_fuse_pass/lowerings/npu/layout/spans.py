"""Planning of spans: members whose tensors are adjacent in memory, which a graph updates as one.

The members of a pointwise group differ in nothing but where their elements lie and in the numbers of the step. Where
the tensors that they write are adjacent and the numbers equal, one 1-D tensor per slot stands for all of them, and the
graph does not grow with their number. Tensors that are only read (gradients) may lie apart: they are concatenated.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder, uncast
from npu_fuse_pass.ir.types import Formula, Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.plan import Plan, Span
from npu_fuse_pass.tensors.memory import in_order, memory_order

# GE's own pass for ConcatD (ZConcatDFusionPass, ops/built-in/fusion_pass/graph_fusion/ai_core/concatd_fusion_pass.cpp)
# cuts one with more than 63 inputs, or 48 where shapes are dynamic, into two levels: everything would be moved twice.
CONCATENATED = 48
_SMALL = 1 << 20  # elements: above, concatenating a tensor takes longer (8 bytes each) than updating it by itself
_IN_A_ROW = 8  # gradients: where that many are adjacent on average, a span for each piece costs less than moving them

Place = dict[int, tuple[int, int, int]]  # tensor slot -> storage, begin, end (addresses)


class Planner:
    """Plans the spans of a group from the addresses and numbers of its members.

    Args:
        group: over the leaves.
        device_members: its members that have elements.
        leaves: of the step.
        uses: number of updates that use a leaf.
        layout: the option.
    """

    def __init__(
        self,
        group: Group,
        device_members: Sequence[int],
        leaves: Sequence[Leaf],
        uses: collections.Counter[int],
        layout: str,
    ) -> None:
        self._group, self._device_members, self._leaves, self._layout = group, device_members, leaves, layout
        self.slots = group.formula.tensor_slots
        self.written = [s for s in group.formula.written if s in self.slots]
        self.read = [s for s in self.slots if s not in self.written]
        self.apart: set[int] = set()
        """Members that had no gradient while others had one: updated alone from then on, as their counters differ."""
        self._why_not = self._unable(uses)

    def _unable(self, uses: collections.Counter[int]) -> str:
        """Why no members of the group can be updated as one; "" if they can."""
        if self._layout == "list":
            return 'layout="list"'
        members = [self._group.members[m] for m in self._device_members]
        leaves = [i for member in members for i in (member[s] for s in self.slots)]
        if not pointwise(self._group.formula):
            return "the formula reduces over each tensor (norms, sizes)"
        if any(self._leaves[i].kind not in ("input", "attribute") for i in leaves):
            return "the step creates some of the tensors"
        if any(uses[i] > 1 for i in leaves):
            return "a tensor has a part in two updates"
        return ""

    def alone(self, reason: str) -> Plan:
        """The plan with every member by itself."""
        return Plan(tuple(Span((m,)) for m in self._device_members), reason if len(self._device_members) > 1 else "")

    def plan(self, values: LeafValues, keys: Sequence[object]) -> Plan:
        """Plan the spans for these tensors.

        Args:
            values: of all leaves.
            keys: per member; equal for equal numbers in this step.
        """
        if self._why_not:
            return self.alone(self._why_not)
        reasons = dict.fromkeys(self.apart, "without a gradient at some steps")
        places: dict[int, Place] = {}
        for m in self._device_members:
            place = None if m in self.apart else self.place(m, values)
            if place is not None:
                places[m] = place
            else:
                reasons.setdefault(m, "its tensors have gaps or lie in different orders")
        spans = [span for stretch in self._stretches(places, keys, reasons) for span in self._cut(stretch, places)]
        found = {m for span in spans for m in span.members}
        spans += [Span((m,)) for m in self._device_members if m not in found]
        alone = sorted((span.members[0] for span in spans if len(span.members) == 1), key=lambda m: m not in self.apart)
        why = next((reasons[m] for m in alone if m in reasons), "tensors too large to be worth moving") if alone else ""
        return Plan(
            tuple(sorted(spans, key=lambda span: min(span.members))), why if len(self._device_members) > 1 else ""
        )

    def place(self, m: int, values: LeafValues) -> Place | None:
        """The addresses of a member's tensors; None if one is missing or the written ones are not in one dense order.

        A read-only tensor in another order has an empty place, which nothing follows.
        """
        member = self._group.members[m]
        given = {s: t for s in self.slots if (t := values[member[s]]) is not None}
        if len(given) < len(self.slots):
            return None
        strides = memory_order([given[s] for s in self.written])
        place: Place = {}
        for s, t in given.items():
            leaf, slot = self._leaves[member[s]], self._group.formula.slots[s]
            wanted = (math.prod(leaf.shape), slot.dtype, leaf.device, torch.strided)
            if (t.numel(), t.dtype, t.device, t.layout) != wanted:
                return None  # the binder raises the error
            if in_order(t, strides):
                start = t.data_ptr()
                place[s] = (t.untyped_storage().data_ptr(), start, start + t.numel() * t.element_size())
            elif s in self.written:
                return None
            else:
                place[s] = (-1, -1, -2)
        return place

    def _stretches(
        self, places: dict[int, Place], keys: Sequence[object], reasons: dict[int, str]
    ) -> Iterator[list[int]]:
        """Stretches of members with adjacent written tensors and equal numbers. Adds to `reasons` why one ends."""
        stretch: list[int] = []
        for m in sorted(places, key=lambda m: places[m][self.written[0]]):
            last = stretch[-1] if stretch else None
            gap = None if last is None else next(gaps(places[last], places[m], self.written), None)
            if last is not None and (gap is not None or keys[last] != keys[m]):
                label = "" if gap is None else self._group.labels[gap]
                why = "the numbers of this step differ" if gap is None else f"{label!r} of neighbours is not adjacent"
                reasons.setdefault(last, why)
                reasons.setdefault(m, why)
                yield stretch
                stretch = []
            stretch.append(m)
        if stretch:
            yield stretch

    def _cut(self, stretch: list[int], places: dict[int, Place]) -> Iterator[Span]:
        """Cut a stretch into spans at the gaps between its gradients if these are few; else gather gradients."""
        ends = [any(True for _ in gaps(places[a], places[b], self.read)) for a, b in itertools.pairwise(stretch)]
        if sum(ends) == 0 or len(stretch) >= _IN_A_ROW * (sum(ends) + 1):
            begins = [0, *(i + 1 for i, ended in enumerate(ends) if ended), len(stretch)]
            yield from (Span(tuple(stretch[a:b])) for a, b in itertools.pairwise(begins))
            return
        for large, members in itertools.groupby(stretch, lambda m: self._layout == "auto" and self._numel(m) > _SMALL):
            for chunk in _chunks(list(members), 1 if large else CONCATENATED):
                pairs = list(itertools.pairwise(chunk))
                apart = {s for a, b in pairs for s in gaps(places[a], places[b], self.read)}
                yield Span(tuple(chunk), tuple(s for s in self.read if s in apart))

    def _numel(self, m: int) -> int:
        return math.prod(self._leaves[self._group.members[m][self.written[0]]].shape)


def gaps(first: Place, second: Place, slots: Sequence[int]) -> Iterator[int]:
    """The slots whose second tensor does not begin at the end of the first, in the same storage."""
    for s in slots:
        storage, _, end = first[s]
        if second[s][:2] != (storage, end):
            yield s


def pointwise(formula: Formula) -> bool:
    """True if elements do not depend on each other, except through sums over all members (totals)."""
    contributed = [_summand(e) for e in formula.contributions]
    inner = [*(e for _, e in formula.writes), *(e for e in contributed if e is not None)]
    found = {e.op for e in postorder(inner)}
    tensors = set(formula.tensor_slots)
    writes = any(slot in tensors for slot in formula.written)
    return writes and None not in contributed and not found & {*REDUCTIONS, "numel"}


def _summand(e: Expr) -> Expr | None:
    """The summand of a contribution; None if it is not a sum."""
    e = uncast(e)
    return e.args[0] if e.op == "sum" else None


def _chunks(members: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(members), size):
        yield members[begin : begin + size]
