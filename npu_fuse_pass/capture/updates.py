"""From the writes of a captured graph to updates: grouped by shared tensors, equal ones merged.

Every expression is visited three times, whatever the number of parameters: to find the tensors that meet in it, to
find the readers of a 0-dim leaf, and to compare it with the updates found before. Equal updates become members of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from npu_fuse_pass.capture.totals import Contribution, separate
from npu_fuse_pass.capture.values import Cell
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.dimensions import EXPAND, OVER, leaves_expanded, leaves_whole, reduces
from npu_fuse_pass.ir.disjoint import Disjoint
from npu_fuse_pass.ir.expr import Builder, Expr, postorder
from npu_fuse_pass.ir.types import Leaf, Slot, Update
from npu_fuse_pass.reasons import Code


def updates_of(
    leaves: Sequence[Leaf], cells: Mapping[int, Cell], builder: Builder, first_total: int, dimensions: bool = False
) -> tuple[list[Update], int]:
    """One update for every set of written leaves that depend on each other's tensors.

    `dimensions`: tensors of one update may differ in shape, not in their number of elements, taken in index order.

    Returns:
        The updates, and the number after the last total.

    Raises:
        Unsupported: one update would need tensors of different shapes.
    """
    roots = _stored({i: cell.val.expr for i, cell in cells.items()}, leaves, builder)
    roots, contributions, totals = separate(roots, list(cells), leaves, builder, first_total)
    together = _Together(leaves, dict(zip(cells, roots, strict=True)), contributions)
    same = _Same(leaves, dimensions)
    for written, added in together.components():
        same.add([(leaf, together.writes[leaf]) for leaf in written], added)
    return same.updates, totals


def _stored(writes: Mapping[int, Expr], leaves: Sequence[Leaf], b: Builder) -> list[Expr]:
    """The roots, where new 0-dim values are read by tensors as their leaves store them (NAdam's product of momenta).

    What is counted up needs no rounding. A product is one of numbers of the leaf's dtype, as `mul_` computes it.
    """
    products = {i: e for i, e in writes.items() if e.op == "mul" and not e.tensor}
    products = {i: e for i, e in products.items() if leaves[i].dtype.is_floating_point and leaves[i].dtype.itemsize < 8}
    if not products:
        return [*writes.values()]
    order = postorder([*writes.values()])
    numbers = {id(a) for e in order if e.tensor for a in e.args if not a.tensor}
    for e in reversed(order):
        if id(e) in numbers:
            numbers.update(map(id, e.args))
    dtypes = {id(e): leaves[i].dtype for i, e in products.items() if id(e) in numbers}
    made: dict[int, Expr] = {}
    unrounded: dict[int, Expr] = {}
    for e in order:
        dtype = dtypes.get(id(e))
        if dtype is None:
            made[id(e)] = b.again(e, made)
        else:
            args = (made[id(a)] for a in e.args)
            given = (a if a.op == "leaf" else b.cast(b.cast(a, dtype), torch.float64) for a in args)
            unrounded[id(e)] = b.make(e.op, tuple(given), e.value, e.dtype, e.tensor)
            made[id(e)] = b.cast(b.cast(unrounded[id(e)], dtype), torch.float64)
    return [unrounded.get(id(e), made[id(e)]) for e in writes.values()]


_Component = tuple[list[int], list[Contribution]]


class _Together:
    """Disjoint sets of leaves: written and read ones belong together if a tensor connects them."""

    def __init__(self, leaves: Sequence[Leaf], writes: dict[int, Expr], contributions: Sequence[Contribution]) -> None:
        self.writes = writes
        self._leaves = leaves
        self._contributions = contributions
        self._sets = Disjoint()
        below = self._join_tensors([*writes.values(), *(c.expr for c in contributions)])
        self._first = [below[id(c.expr)] for c in contributions]
        for leaf, root in writes.items():
            if (other := below[id(root)]) is not None:
                self._sets.join(leaf, other)
        self._join_scalars()

    def components(self) -> list[_Component]:
        """Leaves that are written together, and their parameter's contributions; in the order of the writes."""
        found: dict[int, _Component] = {}
        for leaf in self.writes:
            found.setdefault(self._sets.find(leaf), ([], []))[0].append(leaf)
        for k, (c, first) in enumerate(zip(self._contributions, self._first, strict=True)):
            owner = -1 - k if first is None else self._sets.find(first)  # None: of small tensors, expanded
            found.setdefault(owner, ([], []))[1].append(c)
        return self._with_counters(list(found.values()))

    def _join_tensors(self, roots: Sequence[Expr]) -> dict[int, int | None]:
        """Join tensors that meet in an expression; returns one of the tensors below each expression, by id."""
        below: dict[int, int | None] = {}
        for e in postorder(roots):
            if e.op == "leaf":
                assert isinstance(e.value, int)
                below[id(e)] = e.value if self._leaves[e.value].shape else None
                continue
            if e.op == EXPAND:
                below[id(e)] = None  # a small tensor is no part of the update that reads it
                continue
            first = None
            for a in e.args:
                other = below[id(a)]
                if first is None:
                    first = other
                elif other is not None and other != first:
                    self._sets.join(other, first)
            below[id(e)] = None if e.op in OVER else first
        return below

    def _join_scalars(self) -> None:
        """Join each 0-dim leaf that only one update reads (a step counter) to that update."""
        users: dict[int, set[int]] = {}
        roots: dict[int, list[Expr]] = {}
        for leaf, root in self.writes.items():
            owner = self._sets.find(leaf)
            roots.setdefault(owner, []).append(root)
            if not self._leaves[leaf].shape:
                users.setdefault(leaf, set()).add(owner)
        for owner, several in roots.items():
            for leaf in _leaves_of(several):
                if not self._leaves[leaf].shape:
                    users.setdefault(leaf, set()).add(owner)
        changed = True
        while changed:  # an owner may be a 0-dim leaf that finds its own owner later
            changed = False
            for leaf, owners in users.items():
                own = self._sets.find(leaf)
                others = {self._sets.find(u) for u in owners} - ({own} if leaf in self.writes else set())
                if len(others) == 1 and (other := others.pop()) != own:
                    self._sets.join(own, other)
                    changed = True

    def _with_counters(self, components: list[_Component]) -> list[_Component]:
        """Assign counters that nothing reads (RMSprop's) to the parameters, in order, one set each."""

        def counts(written: list[int], added: list[Contribution]) -> bool:
            if len(written) != 1 or added or self._leaves[written[0]].shape:
                return False
            return set(_leaves_of([self.writes[written[0]]])) <= set(written)

        counters = [c for c in components if counts(*c)]
        others = [c for c in components if not counts(*c)]
        parameters = [c for c in others if c[0]]  # the rest only add to a total
        if not counters or not parameters or len(counters) % len(parameters):
            return components
        for i, (counter, _) in enumerate(counters):
            parameters[i % len(parameters)][0].extend(counter)
        return others


class _Same:
    """Updates merged where they are equal up to the names of their leaves."""

    def __init__(self, leaves: Sequence[Leaf], dimensions: bool) -> None:
        self._leaves = leaves
        self._dimensions = dimensions
        self._known: dict[object, Update] = {}
        self.updates: list[Update] = []

    def add(self, writes: Sequence[tuple[int, Expr]], contributions: Sequence[Contribution]) -> None:
        """Add the writes of one parameter and its contributions to totals."""
        roots = [*(root for _, root in writes), *(c.expr for c in contributions)]
        order = postorder(roots)
        position: dict[int, int] = {}
        numbers: dict[int, int] = {}
        key: list[object] = []
        for e in order:
            value: object = repr(e.value) if e.op == "const" else e.value  # -0.0 and NaN are what they are
            if e.op == "leaf":
                value = position.setdefault(e.value, len(position))  # type: ignore[arg-type]
            key.append((e.op, value, e.dtype, e.tensor, *[numbers[id(a)] for a in e.args]))
            numbers[id(e)] = len(numbers)
        for leaf, root in writes:
            key.append((position.setdefault(leaf, len(position)), numbers[id(root)]))
        key += [(c.total, numbers[id(c.expr)]) for c in contributions]
        key += [self._leaves[i].dtype if self._leaves[i].shape else None for i in position]
        self._check_shapes(order, position, writes)
        known = self._known.get(found := tuple(key))
        if known is None:
            known = self._known[found] = self._template(order, position, writes, contributions)
            self.updates.append(known)
        elif any(label.startswith("state") for label in known.labels):
            # Dynamo names some leaves by their index in a list only; another member may have the real name
            names = [label_of(self._leaves[i].name) for i in position]
            known.labels = [n if k.startswith("state") else k for k, n in zip(known.labels, names, strict=True)]
        known.members.append(tuple(position))

    def _check_shapes(
        self, order: Sequence[Expr], position: Mapping[int, int], writes: Sequence[tuple[int, Expr]]
    ) -> None:
        """Refuse an update of tensors whose shapes do not match."""
        few = leaves_expanded(order) | {leaf for leaf, root in writes if reduces(root)} if self._dimensions else set()
        shapes = {self._leaves[i].shape for i in position if i not in few} - {()}
        sizes = {math.prod(shape) for shape in shapes} if self._dimensions else shapes
        if len(sizes) > 1:
            reason = f"one update reads tensors of shapes {sorted(shapes)}: a sum over several parameters"
            raise Unsupported("write", reason, Code.ACROSS_PARAMETERS)
        both = few & (leaves_whole(order) | {leaf for leaf, root in writes if not reduces(root)})
        if both:
            shape = self._leaves[both.pop()].shape
            reason = f"one update reads a tensor of shape {shape} element by element, and expanded"
            raise Unsupported("write", reason, Code.ACROSS_PARAMETERS)

    def _template(
        self,
        order: Iterable[Expr],
        position: Mapping[int, int],
        writes: Sequence[tuple[int, Expr]],
        contributions: Sequence[Contribution],
    ) -> Update:
        builder = Builder()
        made: dict[int, Expr] = {}
        for e in order:
            if e.op == "leaf":
                made[id(e)] = builder.make("leaf", (), position[e.value], e.dtype, e.tensor)  # type: ignore[index]
            else:
                made[id(e)] = builder.again(e, made)
        pairs = [(position[leaf], made[id(root)]) for leaf, root in writes]
        added = [(c.total, made[id(c.expr)]) for c in contributions]
        given = [self._leaves[i] for i in position]
        slots = [Slot(bool(leaf.shape), leaf.dtype if leaf.shape else torch.float64) for leaf in given]
        return Update(pairs, added, [], [label_of(leaf.name) for leaf in given], slots)


def _leaves_of(roots: Sequence[Expr]) -> list[int]:
    return [e.value for e in postorder(roots) if e.op == "leaf" and isinstance(e.value, int)]


_KNOWN = "max_exp_avg_sq exp_avg_sq exp_avg_diff exp_avg momentum_buffer square_avg grad_avg acc_delta sum step grad lr"


def label_of(name: str) -> str:
    """A readable name from the name that Dynamo gave a leaf."""
    low = name.lower().rstrip("_")
    last = low.split("_")[-1]
    known = next((k for k in _KNOWN.split() if low.endswith(k)), None)
    if known is not None or not low:
        return known or "x"
    if last.isdigit() and "state" in low:
        return f"state{last}"
    if option := re.search(r"param_groups_+\d+_+((?!params)[a-z]\w*)$", low):
        return option[1]
    if entry := re.search(r"_keys_\w*?_state_+\d+_+([a-z]\w*)$", low):
        return entry[1]
    if "param" in low:
        return "param"
    named = [part for part in low.split("_") if not part.isdigit()]  # g_ema_3: an entry of a list
    return "_".join(named[1:] if named[:1] in (["g"], ["l"]) and len(named) > 1 else named) or last
