"""C++ for what works on some of the dimensions (`ir.dimensions`): the sweep that reduces, and what is expanded."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence

from npu_fuse_pass.ir.dimensions import EXPAND, OVER, elements, has_dimensions, small
from npu_fuse_pass.ir.expr import DTYPE_NAMES, Expr, postorder
from npu_fuse_pass.ir.types import Formula, Group, Leaf
from npu_fuse_pass.lowerings.cpu.cpp_ops import STORED

PRELUDE = (pathlib.Path(__file__).parent / "over.h").read_text(encoding="utf-8")
STRIP = 256  # columns that a task reduces; less than over.h's WIDTH
TASK = 16384  # elements of a task, if there are so many
WIDTH = "WIDTH"
_OPS = {"sum_over": "SumOver<{}>", "amax_over": "AmaxOver", "amin_over": "AminOver"}


def sizes_of(leaves: Sequence[Leaf], group: Group) -> tuple[list[int], bool]:
    """How many elements of each member are worked on, and whether they have to be in the order of their indices."""
    formula = group.formula
    few = small(formula.writes, formula.roots)
    slots = formula.tensor_slots
    shapes = [[leaves[member[slot]].shape for slot in slots] for member in group.members]
    ordered = has_dimensions(formula.roots) or any(len(set(row)) > 1 for row in shapes)
    rank = next((k for k, slot in enumerate(slots) if slot not in few), None)
    if rank is not None or not slots:
        return [math.prod(row[rank]) if rank is not None else 1 for row in shapes], ordered
    numbers = ({s: leaves[member[s]].value for s in formula.scalar_slots} for member in group.members)
    return [elements(formula.roots, {}, constants) for constants in numbers], ordered


def tasks_of(leaves: Sequence[Leaf], group: Group) -> list[int]:
    """Five numbers for each task of a kernel that reduces over dimensions: `Args` in kernel.h says which."""
    over = next((e for e in postorder(group.formula.roots) if e.op in OVER), None)
    found: list[int] = []
    for m, member in enumerate(group.members if over is not None else ()):
        r0, k0, r1, k1 = (int(leaves[member[a.value]].value) for a in over.args[1:])  # type: ignore[union-attr,index]
        rows = max(1, TASK // max(1, r0 * r1 * min(k1, STRIP)))
        for first in range(0, k0, rows):
            for begin in range(0, k1, STRIP):
                found += [m, first, min(k0, first + rows), begin, min(k1, begin + STRIP)]
    return found


def buffers(
    body: Sequence[Expr], formula: Formula, var: Callable[[Expr], str], address: Callable[[int], str], size: str
) -> list[str]:
    """Arrays with what small tensors hold for the elements of a sweep; `address` is where a slot's tensor is."""
    lines = []
    for e in body:
        if e.op == EXPAND:
            slot = e.args[0].value
            assert isinstance(slot, int)
            stored = STORED[DTYPE_NAMES[formula.slots[slot].dtype]]
            k0, r1, k1 = (f"int64_t({var(a)})" for a in e.args[2:])
            lines.append(f"  {stored} b{var(e)}[{size}];")
            lines.append(f"  expand(b{var(e)}, (const {stored}*){address(slot)}, start, n, {k0}, {r1}, {k1});")
    return lines


def above(over: Expr, values: Sequence[Expr]) -> list[Expr]:
    """What is computed from a reduction, arguments first."""
    found = {id(over)}
    for e in values:
        if any(id(a) in found for a in e.args):
            found.add(id(e))
    return [e for e in values if id(e) in found and e is not over]


def call(over: Expr, var: Callable[[Expr], str], exact: bool) -> str:
    """The statement that runs a task."""
    sizes = ", ".join(f"int64_t({var(a)})" for a in over.args[1:])
    op = _OPS[over.op].format("true" if exact else "false")
    return f"  reduce_over<{op}>({sizes}, a.task + 5 * c, values, put);"
