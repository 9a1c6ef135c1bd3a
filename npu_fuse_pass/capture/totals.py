"""Sums over several parameters (a global norm, a check for infinities), found in what was captured.

A scalar that adds up numbers of different parameters becomes a *total*: every parameter contributes its own number to
it, and what is computed from the total (a root, a clip factor) stays in the formulas that use it. A number of one
tensor that updates of tensors of another shape read is a total with one addend.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.disjoint import Disjoint
from npu_fuse_pass.ir.expr import REDUCTIONS, Builder, Expr, postorder, rebuilt
from npu_fuse_pass.ir.types import Leaf
from npu_fuse_pass.reasons import Code

_SEVERAL = -1  # stands for "numbers of more than one parameter"
_FEW = 8  # totals that are no sum (the larger of two norms): each is a scalar of every update, so not for N parameters


@dataclasses.dataclass(frozen=True)
class Contribution:
    """One parameter's addend of a total."""

    total: int
    expr: Expr


def separate(
    roots: Sequence[Expr], written: Sequence[int], leaves: Sequence[Leaf], builder: Builder, first: int = 0
) -> tuple[list[Expr], list[Contribution], int]:
    """Replace scalars over several parameters, and those of one that updates of others read, by totals.

    Args:
        roots: what is written.
        written: the leaf that each root goes to.
        first: number of the first total.

    Returns:
        New roots, the contributions, and the number after the last total.

    Raises:
        Unsupported: numbers of many parameters are combined by other than adding.
    """
    order = postorder(roots)
    if not any(e.op in REDUCTIONS for e in order):
        return list(roots), [], first
    owner = _owners(order, roots, written, leaves)
    elsewhere = _read_elsewhere(order, owner, leaves)
    if _SEVERAL not in owner.values() and not elsewhere:
        return list(roots), [], first
    totals = _Totals(owner, elsewhere, builder, first)
    return [totals.rebuilt(root) for root in roots], totals.contributions, totals.next


def _owners(
    order: Sequence[Expr], roots: Sequence[Expr], written: Sequence[int], leaves: Sequence[Leaf]
) -> dict[int, int | None]:
    """For every expression the owner of the tensors below it: a representative leaf, None, or _SEVERAL (scalars only).

    Tensors that an elementwise operation combines belong to one parameter.
    """
    sets = Disjoint()
    below: dict[int, int] = {}
    for e in order:
        if e.tensor:
            found = [e.value] if e.op == "leaf" else [below[id(a)] for a in e.args if a.tensor]
            assert all(isinstance(f, int) for f in found)
            for other in found[1:]:
                sets.join(other, found[0])  # type: ignore[arg-type]
            below[id(e)] = found[0]  # type: ignore[assignment]
    for root, leaf in zip(roots, written, strict=True):
        if root.tensor and leaves[leaf].shape:
            sets.join(leaf, below[id(root)])
    places = {key: sets.find(leaf) for key, leaf in below.items()}
    for user, read in _read_by_one(order, places, roots, [sets.find(leaf) for leaf in written], leaves):
        sets.join(read, user)
    owner: dict[int, int | None] = {}
    for e in order:
        if e.tensor:
            owner[id(e)] = sets.find(below[id(e)])
        else:
            several = {owner[id(a)] for a in e.args} - {None}
            owner[id(e)] = None if not several else next(iter(several)) if len(several) == 1 else _SEVERAL
    return owner


def _read_by_one(
    order: Sequence[Expr],
    places: Mapping[int, int],
    roots: Sequence[Expr],
    written: Sequence[int],
    leaves: Sequence[Leaf],
) -> Iterator[tuple[int, int]]:
    """Pairs of one parameter's tensors that only a scalar connects, as the norms in a trust ratio do.

    A scalar over a few tensors of one shape, which the update of one tensor of that shape alone reads, is no total.
    """
    shapes = _shapes(order, places, written, leaves)
    users: dict[int, set[int]] = {id(e): set() for e in order}
    for root, leaf in zip(roots, written, strict=True):
        users[id(root)].add(leaf)
    for e in reversed(order):
        for a in e.args:
            if not a.tensor and len(users[id(a)]) < 2:
                users[id(a)] |= {places[id(e)]} if e.tensor else users[id(e)]
    read: dict[int, frozenset[int]] = {}
    for e in order:
        below = [frozenset([places[id(a)]]) if a.tensor else read[id(a)] for a in e.args]
        found = frozenset(itertools.islice(frozenset().union(*below), _FEW + 1))
        if not e.tensor and len(users[id(e)]) > 1:
            found = frozenset()  # a total, or a part of one, has no owner
        elif not e.tensor and 1 < len(found) <= _FEW and len({shapes[i] for i in (*users[id(e)], *found)}) == 1:
            yield from ((user, other) for user in users[id(e)] for other in found)
            found = frozenset(users[id(e)])
        read[id(e)] = found


def _read_elsewhere(order: Sequence[Expr], owner: Mapping[int, int | None], leaves: Sequence[Leaf]) -> set[int]:
    """One parameter's numbers that an update of tensors of another shape reads."""
    places = {id(e): o for e in order if (o := owner[id(e)]) is not None and o != _SEVERAL}
    shapes = _shapes(order, places, (), leaves)
    pairs = ((e, a) for e in order if e.tensor for a in e.args if not a.tensor and id(a) in places)
    return {id(a) for e, a in pairs if shapes[places[id(a)]] != shapes[places[id(e)]]}


def _shapes(
    order: Sequence[Expr], places: Mapping[int, int], written: Sequence[int], leaves: Sequence[Leaf]
) -> dict[int, tuple[int, ...]]:
    """The shape of a parameter's tensors: of the larger ones, where some have fewer dimensions."""
    found = {i: leaves[i].shape for i in (*places.values(), *written)}
    for e in order:
        if e.op == "leaf" and e.tensor:
            shape, i = leaves[e.value].shape, places[id(e)]  # type: ignore[index]
            found[i] = max(found[i], shape, key=math.prod)
    return found


class _Totals:
    """Rebuilt expressions, with totals in them."""

    def __init__(self, owner: dict[int, int | None], elsewhere: set[int], builder: Builder, first: int) -> None:
        self._owner = owner
        self._elsewhere = elsewhere
        self._builder = builder
        self._made: dict[int, Expr] = {}
        self._single: dict[int, Expr] = {}
        self.next = first
        self.contributions: list[Contribution] = []

    def rebuilt(self, root: Expr) -> Expr:
        """`root` with totals."""
        return rebuilt(root, self._made, self._below, self._make)

    def _several(self, e: Expr) -> bool:
        return self._owner[id(e)] == _SEVERAL

    def _below(self, e: Expr) -> Sequence[Expr]:
        """The terms of a sum over several parameters (Python's starts with 0 + the first); else the arguments."""
        if e.op != "add" or not self._several(e):
            return e.args
        found: list[Expr] = []
        stack = [e]
        while stack:
            x = stack.pop()
            if x.op == "add" and (self._several(x) or any(a.op == "const" for a in x.args)):
                stack += reversed(x.args)
            else:
                found.append(x)
        return found

    def _make(self, e: Expr, below: Sequence[Expr]) -> Expr:
        if not self._several(e):
            args = tuple(
                self._alone(e, a) if e.tensor and id(a) in self._elsewhere else self._made[id(a)] for a in below
            )
            same = all(new is old for new, old in zip(args, e.args, strict=True))
            return e if same else self._builder.make(e.op, args, e.value, e.dtype, e.tensor)
        if e.op == "add":
            own = [self._made[id(a)] for a in below if self._owner[id(a)] not in (None, _SEVERAL)]
            rest = [self._made[id(a)] for a in below if self._owner[id(a)] in (None, _SEVERAL)]
            terms = [*([self._total(own)] if own else []), *rest]
            return functools.reduce(functools.partial(self._builder.op, "add"), terms)
        args = tuple(self._made[id(a)] if self._owner[id(a)] in (None, _SEVERAL) else self._alone(e, a) for a in e.args)
        return self._builder.make(e.op, args, e.value, e.dtype, e.tensor)

    def _alone(self, e: Expr, a: Expr) -> Expr:
        """One parameter's number in a combination other than a sum, or in another one's update."""
        if id(a) not in self._single:
            if len(self._single) == _FEW:
                raise Unsupported(
                    e.op, "combines numbers of several parameters; a sum of them can fuse", Code.ACROSS_PARAMETERS
                )
            self._single[id(a)] = self._total([self._made[id(a)]])
        return self._single[id(a)]

    def _total(self, parts: Sequence[Expr]) -> Expr:
        number, self.next = self.next, self.next + 1
        for part in parts:
            self.contributions.append(Contribution(number, self._builder.cast(part, torch.float64)))
        return self._builder.total(number)
