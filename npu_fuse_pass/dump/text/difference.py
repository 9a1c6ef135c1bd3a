"""The difference between two groups: dtypes, or the first term in which their formulas differ.

Groups of other dtypes differ in casts, and therefore in the order of sums and products too: both are looked through.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Iterator

from npu_fuse_pass.ir.expr import COMMUTATIVE, DTYPE_NAMES, Expr, postorder, uncast
from npu_fuse_pass.ir.readable import readable_term
from npu_fuse_pass.ir.types import Group


def difference(one: Group, other: Group) -> str:
    """The difference of `other` from `one`, in words."""
    structures = {**_structures(one), **_structures(other)}
    mine, yours = _roots(one), _roots(other)
    if _count(mine, structures) != _count(yours, structures):
        return _other_structure(one, other, structures)
    before, after = _dtypes(one), _dtypes(other)
    if before != after:
        return f"dtype {after} instead of {before}"
    return "the same operations on other tensors, or with casts in other places"


def _other_structure(one: Group, other: Group, structures: dict[int, str]) -> str:
    mine, yours = _roots(one), _roots(other)
    if len(mine) != len(yours):
        return f"another structure: it writes {', '.join(yours)} instead of {', '.join(mine)}"
    # Dynamo's names of states mean nothing: compare the pair of writes that differ least
    pairs = (_first(a, b, structures) for a, b in itertools.product(mine.values(), yours.values()))
    before, after = min((found for found in pairs if found is not None), key=lambda pair: len(postorder(pair)))
    return (
        f"another structure: first it has {readable_term(after, other.labels)} "
        f"instead of {readable_term(before, one.labels)}"
    )


def _roots(group: Group) -> dict[str, Expr]:
    written = {f"{group.labels[slot]}'": e for slot, e in group.formula.writes}
    return dict(sorted(written.items())) | {f"total {i}": e for i, e in enumerate(group.formula.contributions)}


def _count(roots: dict[str, Expr], structures: dict[int, str]) -> collections.Counter[str]:
    return collections.Counter(structures[id(e)] for e in roots.values())


def _dtypes(group: Group) -> str:
    return ", ".join(sorted({DTYPE_NAMES[slot.dtype] for slot in group.formula.slots if slot.tensor}))


def _structures(group: Group) -> dict[int, str]:
    """For every expression a hash of its operations alone, without dtypes, casts, leaves and the order of sums."""
    names: dict[int, str] = {}
    for e in postorder(group.formula.roots):
        below = [names[id(a)] for a in e.args]
        if e.op == "cast":
            names[id(e)] = below[0]
            continue
        if e.op in COMMUTATIVE:
            below.sort()
        text = " ".join([e.op, str(e.op == "leaf" and e.tensor), *below])
        names[id(e)] = hashlib.sha256(text.encode()).hexdigest()
    return names


def _first(a: Expr, b: Expr, structures: dict[int, str]) -> tuple[Expr, Expr] | None:
    """The innermost pair of terms at the same place that differ."""
    a, b = uncast(a), uncast(b)
    if structures[id(a)] == structures[id(b)]:
        return None
    if a.op == b.op and len(a.args) == len(b.args):
        for x, y in _pairs(a, b, structures):
            found = _first(x, y, structures)
            if found is not None:
                return found if found[0].args and found[1].args else (a, b)  # a leaf alone says little
    return a, b


def _pairs(a: Expr, b: Expr, structures: dict[int, str]) -> Iterator[tuple[Expr, Expr]]:
    """Arguments at the same place; of a sum or product, those without an equal on the other side."""
    if a.op not in COMMUTATIVE:
        yield from zip(a.args, b.args, strict=True)
        return
    left, right = list(a.args), list(b.args)
    for x in a.args:
        same = next((y for y in right if structures[id(y)] == structures[id(x)]), None)
        if same is not None:
            left.remove(x)
            right.remove(same)
    yield from zip(left, right, strict=True)
