"""Stage 2: bring every update into canonical form and put equal ones together.

Leaves lose their identity and become slots; constants become scalar slots too, so that two parameter groups that
differ in a number share a formula; a slot that holds a total is of another kind. Arguments of commutative operations
and the writes are put into an order that does not depend on names: by structural hash, refined once by how each leaf
is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from npu_fuse_pass.ir.expr import COMMUTATIVE, DTYPE_NAMES, Expr, postorder, rebuilt
from npu_fuse_pass.ir.text import serialise
from npu_fuse_pass.ir.types import Captured, Formula, Group, Grouped, GroupedSegment, Leaf, Slot, Update, group_name

_DTYPE_INDEX = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}


@dataclasses.dataclass(frozen=True)
class _Canonical:
    """A formula, and for every slot the position in the member that fills it (or the constant or total)."""

    formula: Formula
    sources: tuple[Expr, ...]
    totals: tuple[int, ...]


def group(captured: Captured) -> Grouped:
    """The groups of a captured step, segment by segment; its leaves get the constants and totals that fill slots."""
    leaves = list(captured.leaves)
    segments = tuple(GroupedSegment(_groups(s.updates, leaves), tuple(s.calls)) for s in captured.segments)
    groups = _groups(captured.updates, leaves)
    return Grouped(tuple(leaves), segments, groups, tuple(captured.stores))


def _groups(updates: Sequence[Update], leaves: list[Leaf]) -> tuple[Group, ...]:
    """One group for each distinct formula, members as captured; appends constants and totals to `leaves`."""
    found: dict[str, Group] = {}
    extra: dict[tuple[str, str], int] = {}

    def extra_leaf(leaf: Leaf) -> int:
        key = (leaf.kind, leaf.name)  # a number's name: 0.0 and -0.0 are two
        if key not in extra:
            extra[key] = len(leaves)
            leaves.append(leaf)
        return extra[key]

    known: dict[tuple[int, int], _Canonical] = {}  # by what is written: batches of one formula share it
    for update in updates:
        shared = id(update.writes), id(update.contributions)
        if shared not in known:
            known[shared] = _canonicalise(update)
        canonical = known[shared]
        text = canonical.formula.text
        labels = tuple(_label(update, e) for e in canonical.sources)
        made = found.setdefault(text, Group(group_name(text), canonical.formula, [], [], labels))
        made.labels = tuple(map(_better, made.labels, labels))
        fixed = {}
        for slot, source in enumerate(canonical.sources):
            if source.op == "const":
                assert isinstance(source.value, float)
                fixed[slot] = extra_leaf(Leaf("constant", repr(source.value), value=source.value, fixed=True))
            elif source.op == "total":
                assert isinstance(source.value, int)
                fixed[slot] = extra_leaf(Leaf("total", f"total_{source.value}", source.value, fixed=True))
        for member in update.members:
            ids = [fixed[s] if s in fixed else member[e.value] for s, e in enumerate(canonical.sources)]  # type: ignore[index]
            made.members.append(tuple(ids))
            made.totals.append(canonical.totals)
    return tuple(found.values())


def _better(known: str, other: str) -> str:
    """Dynamo names some leaves by their index in a list only; another member may have the real name."""
    return other if known.startswith("state") and not other.startswith("state") else known


def _label(update: Update, source: Expr) -> str:
    if source.op == "leaf":
        assert isinstance(source.value, int)
        return update.labels[source.value]
    return f"{source.value:g}" if source.op == "const" else f"total_{source.value}"


def _canonicalise(update: Update) -> _Canonical:
    roots = [e for _, e in update.writes] + [e for _, e in update.contributions]
    order = postorder(roots)
    written = {position for position, _ in update.writes}
    colour: dict[object, int] = {e.value: int(e.value in written) for e in order if e.op == "leaf"}
    keys = _structure(order, colour)
    for position, root in update.writes:  # tell leaves of one kind apart by what is written to them
        colour[position] = keys[id(root)]
    keys = _structure(order, colour)
    colour = _by_use(order, roots, keys, colour)  # and then by where they are read
    keys = _structure(order, colour)
    writes = sorted(update.writes, key=lambda w: keys[id(w[1])])
    rebuilt = _Rebuild(keys)
    new_roots = [rebuilt.copy(e) for _, e in writes]
    contributions = [rebuilt.copy(e) for _, e in update.contributions]
    new_writes = [(rebuilt.slot_of_leaf(p, update.slots[p]), r) for (p, _), r in zip(writes, new_roots, strict=True)]
    for position in update.needs:
        rebuilt.slot_of_leaf(position, update.slots[position])
    text = serialise(rebuilt.slots, new_writes, contributions)
    formula = Formula(tuple(rebuilt.slots), tuple(new_writes), tuple(contributions), text)
    return _Canonical(formula, tuple(rebuilt.sources), tuple(number for number, _ in update.contributions))


def _structure(order: list[Expr], colour: dict[object, int]) -> dict[int, int]:
    """A hash of every expression that does not depend on the names of leaves nor on constants' values.

    Only hashes of integers are used: those are the same in every process, so that dumps and kernels are too.
    """
    keys: dict[int, int] = {}
    for e in order:
        below = [keys[id(a)] for a in e.args]
        if e.op in COMMUTATIVE:
            below.sort()
        own = colour[e.value] if e.op == "leaf" else 0
        op = "leaf" if e.op in ("const", "total") else e.op
        keys[id(e)] = hash((_op_number(op), _DTYPE_INDEX[e.dtype], e.tensor, own, *below))
    return keys


def _by_use(order: list[Expr], roots: list[Expr], keys: dict[int, int], colour: dict[object, int]) -> dict[object, int]:
    """Colours of leaves refined by the operations above them, up to the roots."""
    above: dict[int, list[int]] = {id(e): [] for e in order}
    for root in roots:
        above[id(root)].append(keys[id(root)])
    refined = dict(colour)
    for e in reversed(order):
        context = hash(tuple(sorted(above[id(e)])))
        if e.op == "leaf":
            refined[e.value] = hash((colour[e.value], context))
        for k, a in enumerate(e.args):
            above[id(a)].append(hash((context, keys[id(e)], 0 if e.op in COMMUTATIVE else k)))
    return refined


def _op_number(op: str) -> int:
    return int.from_bytes(op.encode(), "little")


class _Rebuild:
    """Copies expressions with leaves, constants and totals replaced by slots, numbered by first visit."""

    def __init__(self, keys: dict[int, int]) -> None:
        self._keys = keys
        self._made: dict[int, Expr] = {}
        self._leaf_slots: dict[object, int] = {}
        self.slots: list[Slot] = []
        self.sources: list[Expr] = []

    def copy(self, root: Expr) -> Expr:
        """A root's copy; slots are numbered in the order in which leaves are met, first arguments first."""
        return rebuilt(root, self._made, self._ordered, self._copied)

    def _ordered(self, e: Expr) -> Sequence[Expr]:
        return sorted(e.args, key=lambda a: self._keys[id(a)]) if e.op in COMMUTATIVE else e.args

    def _copied(self, e: Expr, args: Sequence[Expr]) -> Expr:
        if e.op in ("leaf", "const", "total"):
            return Expr("leaf", (), self._slot(e), e.dtype if e.tensor else torch.float64, e.tensor)
        return Expr(e.op, tuple(self._made[id(a)] for a in args), e.value, e.dtype, e.tensor)

    def slot_of_leaf(self, position: int, stored: Slot) -> int:
        """The slot of a leaf; a new one where the update does not read it."""
        if position not in self._leaf_slots:
            self._slot(Expr("leaf", (), position, stored.dtype, stored.tensor))
        return self._leaf_slots[position]

    def _slot(self, e: Expr) -> int:
        slot = len(self.slots)
        if e.op == "leaf":
            self._leaf_slots[e.value] = slot
        self.slots.append(Slot(e.tensor, e.dtype if e.tensor else torch.float64, e.op == "total"))
        self.sources.append(e)
        return slot
