"""Reductions over some of a tensor's dimensions, and the expansion of their results to every element.

A tensor is seen as [R0, K0, R1, K1]: dimensions R are reduced, or the small tensor lacks them; K stay. `expand` reads a
small tensor's element [k0, k1] for every element; `sum_over`, `amax_over`, `amin_over` reduce all that meet in one. The
four sizes are scalars among their arguments, so that members of any shape share a formula.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from npu_fuse_pass.ir.expr import Expr, postorder

EXPAND = "expand"
OVER = {"sum_over": "sum", "amax_over": "amax", "amin_over": "amin"}
Layout = tuple[int, int, int, int]


def layout_of(shape: Sequence[int], kept: Collection[int]) -> Layout | None:
    """The four sizes for a contiguous tensor of which some dimensions stay; None where they alternate more often."""
    found = [1, 1, 1, 1]
    place = 0  # of the size that grows: even ones are reduced
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if place % 2 != (dim in kept):
            place += 1
        if place > 3:
            return None
        found[place] *= size
    r0, k0, r1, k1 = found
    return (1, 1, r0, k0) if r1 == k1 == 1 else (r0, k0, r1, k1)  # columns: their elements are adjacent


def leaves_expanded(order: Iterable[Expr]) -> set[int]:
    """Positions (or slots) of the leaves that are read as small tensors."""
    return {e.args[0].value for e in order if e.op == EXPAND}  # type: ignore[misc]


def leaves_whole(order: Iterable[Expr]) -> set[int]:
    """Positions (or slots) of the tensors that are read element by element."""
    tensors = (a for e in order if e.op != EXPAND for a in e.args if a.op == "leaf" and a.tensor)
    return {a.value for a in tensors}  # type: ignore[misc]


def small(writes: Iterable[tuple[int, Expr]], roots: Sequence[Expr]) -> set[int]:
    """Positions (or slots) of the tensors that have an element for several of the others': expanded, or reduced to."""
    found = leaves_expanded(postorder(roots))
    return found | {slot for slot, root in writes if reduces(root)}


def reduces(root: Expr) -> bool:
    """True for a value of a tensor of which dimensions were reduced."""
    return any(e.op in OVER for e in postorder([root]))


def has_dimensions(roots: Sequence[Expr]) -> bool:
    """True if an update works on some of the dimensions, and so on elements in index order."""
    return any(e.op == EXPAND or e.op in OVER for e in postorder(roots))


def elements(roots: Sequence[Expr], sizes: Mapping[int, int], scalars: Mapping[int, float]) -> int:
    """The number of elements that a member is computed on, where all its tensors may be small ones.

    Args:
        sizes: of tensors that are not small, by slot.
        scalars: the values of constants, by slot.
    """
    if sizes:
        return next(iter(sizes.values()))
    for e in postorder(roots):
        if e.op == EXPAND or e.op in OVER:
            found = [int(scalars[a.value]) for a in e.args[1:]]  # type: ignore[index]
            return math.prod(found)
    return 1
