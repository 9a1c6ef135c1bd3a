"""What each stage promises to the next one, checked: on in tests, and with the option `verify`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from npu_fuse_pass.ir import types
from npu_fuse_pass.ir.dimensions import small
from npu_fuse_pass.ir.expr import DTYPES, Expr, postorder


class BrokenPromiseError(AssertionError):
    """A stage gave what it promises not to give: a fault of this package."""


def captured(step: types.Captured) -> None:
    """Check updates before they are grouped.

    Every write has an expression, whose dtype a slot of that kind can hold; expressions read positions of a member and
    numbers only; members have one leaf for each position, of the slot's dtype.

    Raises:
        BrokenPromiseError: says which update, and what is wrong with it.
    """
    for update in (*(u for segment in step.segments for u in segment.updates), *step.updates):
        positions = range(len(update.slots))
        where = f"update of {', '.join(update.labels)}"
        _expect(len(update.labels) == len(update.slots), where, "has other numbers of labels and slots")
        gives = bool(update.writes or update.contributions)  # a parameter may add to a total alone
        _expect(gives and bool(update.members), where, "writes nothing, or has no members")
        for position, _ in update.writes:
            _expect(position in positions, where, f"writes position {position} of {len(positions)}")
        _check_writes(where, update.writes, update.slots)
        roots = [e for _, e in (*update.writes, *update.contributions)]
        _check_reads(where, roots, update.slots)
        _check_members(where, update.members, update.slots, step.leaves, small(update.writes, roots))


def grouped(step: types.Grouped) -> None:
    """Check groups before they are matched and lowered: as `captured`, with every slot filled and no other leaf read.

    Raises:
        BrokenPromiseError: says which group, and what is wrong with it.
    """
    for g in step.all_groups:
        formula = g.formula
        _expect(len(g.labels) == len(formula.slots), g.name, "has other numbers of labels and slots")
        _expect(len(set(formula.written)) == len(formula.written), g.name, "writes a slot twice")
        _check_writes(g.name, formula.writes, formula.slots)
        _check_reads(g.name, formula.roots, formula.slots, totals=False)
        _check_members(g.name, g.members, formula.slots, step.leaves, small(formula.writes, formula.roots))
        contributed = {len(totals) for totals in g.totals}
        _expect(len(g.totals) == len(g.members), g.name, "has members without totals")
        _expect(contributed <= {len(formula.contributions)}, g.name, "has contributions that go nowhere")


def _check_writes(where: str, writes: Iterable[tuple[int, Expr]], slots: Sequence[types.Slot]) -> None:
    for position, root in writes:
        slot = slots[position]
        _expect(slot.tensor or not root.tensor, where, f"writes a tensor into the number {position}")
        if slot.tensor:
            _expect(root.dtype == slot.dtype, where, f"writes {root.dtype} into {position}, which holds {slot.dtype}")


def _check_reads(where: str, roots: Sequence[Expr], slots: Sequence[types.Slot], totals: bool = True) -> None:
    for e in postorder(roots):
        if e.op == "leaf":
            inside = isinstance(e.value, int) and e.value in range(len(slots))
            _expect(inside, where, f"reads position {e.value} of {len(slots)}")
            slot = slots[e.value]  # type: ignore[index]
            _expect(slot.tensor == e.tensor, where, f"reads position {e.value} as what it is not: tensor or number")
            _expect(not e.tensor or slot.dtype == e.dtype, where, f"reads position {e.value} as {e.dtype}")
        elif e.op in ("const", "total"):
            _expect(totals, where, f"holds a {e.op} that is no slot")
        else:
            _expect(e.dtype in DTYPES.values(), where, f"computes {e.op} in {e.dtype}")


def _check_members(
    where: str,
    members: Iterable[Sequence[int]],
    slots: Sequence[types.Slot],
    leaves: Sequence[types.Leaf],
    few: Collection[int],
) -> None:
    for member in members:
        _expect(len(member) == len(slots), where, f"has a member of {len(member)} leaves for {len(slots)} slots")
        _expect(all(i in range(len(leaves)) for i in member), where, "has a member that names no leaf")
        tensors = [leaves[i] for i, slot in zip(member, slots, strict=True) if slot.tensor]
        dtypes = [slot.dtype for slot in slots if slot.tensor]
        _expect([leaf.dtype for leaf in tensors] == dtypes, where, "has a member of other dtypes")
        shapes = {
            leaves[i].shape
            for s, (i, slot) in enumerate(zip(member, slots, strict=True))
            if slot.tensor and s not in few
        }
        _expect(len(set(map(math.prod, shapes))) <= 1, where, f"has a member of several shapes: {sorted(shapes)}")


def _expect(holds: bool, where: str, otherwise: str) -> None:
    if not holds:
        raise BrokenPromiseError(f"{where} {otherwise}")
