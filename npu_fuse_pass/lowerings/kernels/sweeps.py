"""The schedule of a kernel: in which sweeps over memory it works, and what each sweep reads and writes.

A kernel has up to two functions: the contributions to totals, then the update. Sweep k of a function computes the
reductions that need k earlier ones; the sweep after all of them writes. What does not depend on a reduction may be
written by an earlier sweep: later ones then read the new value instead of computing it from old ones, which moves fewer
bytes where it makes another read superfluous. LAMB's first sweep, for its norms, computes both moments from the
gradient; because it writes them, the second sweep needs no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from npu_fuse_pass.ir.dimensions import leaves_expanded, reduces, small
from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula

Writes = tuple[tuple[int, Expr], ...]
Moment = tuple[int, int]  # a function and a sweep of it
CONTRIBUTE, UPDATE = 0, 1
END: Moment = (UPDATE, 1 << 30)  # after all reductions


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over all elements.

    Attributes:
        sums: the reductions that it computes.
        writes: tensor slots and their new values.
        values: every expression that these need, arguments first; scalars are read from where they were stored.
        places: the tensor slots from which values are read, by the expressions' ids.
    """

    sums: tuple[Expr, ...]
    writes: Writes
    values: tuple[Expr, ...]
    places: Mapping[int, int]

    @property
    def moved(self) -> list[int]:
        """The slots that it reads, then those that it writes."""
        return [*set(self.places.values()), *(slot for slot, _ in self.writes)]


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of a kernel.

    Attributes:
        writes: slots and their new values, tensors' and scalars', over all sweeps.
        contributions: what is added to totals.
        order: all its expressions, arguments first; without what an earlier function wrote, and what is below that.
        phase: the longest chain of reductions below an expression, by its id.
        sweeps: in order; the one after the last reduction is missing if it would write no tensor.
    """

    writes: Writes
    contributions: tuple[Expr, ...]
    order: list[Expr]
    phase: Mapping[int, int]
    sweeps: list[Sweep]

    @property
    def last(self) -> int:
        """The phase after all reductions."""
        return max(self.phase.values(), default=0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The functions of a kernel: the contributions, if there are any, and the update."""

    formula: Formula
    functions: list[Function]

    @property
    def bytes(self) -> list[int]:
        """Bytes that each function reads and writes for each element."""
        few = small(self.formula.writes, self.formula.roots)  # hardly any bytes
        sizes = [0 if i in few else slot.dtype.itemsize for i, slot in enumerate(self.formula.slots)]
        return [sum(sizes[slot] for p in function.sweeps for slot in p.moved) for function in self.functions]


def schedule(formula: Formula, totals: Collection[int] | None = (), late: bool = False) -> Schedule:
    """Search for the schedule that moves the fewest bytes; of equal ones, the one with the later writes.

    Args:
        totals: the scalar slots that hold totals; None: contributions are computed several times and must not write.
        late: write nothing before the last sweep.
    """
    search = _Search(formula, totals)
    return search.late() if late else search.found()


class _Search:
    """The search for the moments at which tensors are written."""

    def __init__(self, formula: Formula, totals: Collection[int] | None) -> None:
        self._formula = formula
        self._order = postorder(formula.roots)
        self._expanded = leaves_expanded(self._order)
        self._moments = {
            slot: [*self._early(slot, e, totals), END] for slot, e in formula.writes if formula.slots[slot].tensor
        }

    def late(self) -> Schedule:
        """All writes last."""
        return self._scheduled(dict.fromkeys(self._moments, END))[0]

    def found(self) -> Schedule:
        """Every write as early as possible, then each of them later where that costs nothing; or all of them last."""
        last = self.late()
        when, best = self._valid({slot: moments[0] for slot, moments in self._moments.items()})
        waiting = sorted(self._moments)
        while waiting:
            slot = waiting.pop(0)
            if when[slot] != END:
                later, candidate = self._valid({**when, slot: self._next(slot, when[slot])})
                if sum(candidate.bytes) <= sum(best.bytes):
                    when, best, waiting = later, candidate, sorted(self._moments)
        return min(last, best, key=lambda p: sum(p.bytes))

    def _early(self, slot: int, e: Expr, totals: Collection[int] | None) -> Iterable[Moment]:
        """The sweeps with reductions that can write a value; none for one that memory would round."""
        if e.dtype != self._formula.slots[slot].dtype:
            return
        if reduces(e):
            return
        below = self._below([e])
        waits = totals is None or any(x.op == "leaf" and not x.tensor and x.value in totals for x in below)
        functions = [(UPDATE, [root for _, root in self._formula.writes])]
        if not waits:
            functions.insert(0, (CONTRIBUTE, list(self._formula.contributions)))
        for function, roots in functions:
            last = max(_phases(self._below(roots)).values(), default=0)
            yield from ((function, k) for k in range(_phases(below)[id(e)], last))

    def _next(self, slot: int, moment: Moment) -> Moment:
        moments = self._moments[slot]
        return moments[moments.index(moment) + 1]

    def _valid(self, when: dict[int, Moment]) -> tuple[dict[int, Moment], Schedule]:
        """The earliest moments from `when` on at which no sweep misses a value that was overwritten."""
        made, missed = self._scheduled(when)
        while missed:
            when = {slot: self._next(slot, moment) if slot in missed else moment for slot, moment in when.items()}
            made, missed = self._scheduled(when)
        return when, made

    def _scheduled(self, when: Mapping[int, Moment]) -> tuple[Schedule, set[int]]:
        """The schedule with writes at these moments, and the slots that are read after they were overwritten."""
        formula, known, written, missed = self._formula, dict[int, int](), set[int](), set[int]()
        made = []
        for number in (CONTRIBUTE, UPDATE) if formula.contributions else (UPDATE,):
            writes = tuple(w for w in formula.writes if when.get(w[0], END)[0] == number)
            contributions = formula.contributions if number == CONTRIBUTE else ()
            below = self._below([*(e for _, e in writes), *contributions], known)
            order = [e for e in below if id(e) not in known]
            function = Function(writes, contributions, order, _phases(order), [])
            for k in range(function.last + 1):
                moments = [(number, k), END] if k == function.last else [(number, k)]
                now = tuple(w for w in writes if w[0] in when and when[w[0]] in moments)
                sums = tuple(e for e in order if e.op in REDUCTIONS and function.phase[id(e)] == k + 1)
                if not now and not sums:
                    continue
                roots = [*(e for _, e in now), *(e.args[0] for e in sums)]
                values = self._below(roots, known, scalars=False)
                leaves = (e for e in values if e.op == "leaf" and e.tensor and _slot(e) not in self._expanded)
                old = {id(e): _slot(e) for e in leaves if id(e) not in known}
                new = {id(e): known[id(e)] for e in values if id(e) in known}
                function.sweeps.append(Sweep(sums, now, tuple(values), {**old, **new}))
                missed |= written & set(old.values())
                written |= {slot for slot, _ in now}
                known |= {id(e): slot for slot, e in now if e.tensor}
            made.append(function)
        return Schedule(formula, made), missed

    def _below(self, roots: Sequence[Expr], known: Collection[int] = (), scalars: bool = True) -> list[Expr]:
        """What `roots` are computed from, arguments first: known values are not followed, scalars only if `scalars`."""
        needed = set(map(id, roots))
        for e in reversed(self._order):
            if id(e) in needed and id(e) not in known and (scalars or e.tensor):
                needed.update(map(id, e.args))
        return [e for e in self._order if id(e) in needed]


def _phases(order: Sequence[Expr]) -> dict[int, int]:
    found: dict[int, int] = {}
    for e in order:
        below = max((found.get(id(a), 0) for a in e.args), default=0)
        found[id(e)] = below + 1 if e.op in REDUCTIONS else below
    return found


def kept_scalars(function: Function, formula: Formula) -> list[Expr]:
    """The scalars of a function that leave the section (the scalars of one phase) in which they are computed.

    Those are read by a sweep or by a later section, made by a reduction, written as a tensor, or contributed.
    """
    found: dict[int, Expr] = {}
    for e in function.order:
        for a in e.args:
            if not a.tensor and (e.tensor or e.op in REDUCTIONS or function.phase[id(e)] != function.phase[id(a)]):
                found.setdefault(id(a), a)
        if e.op in REDUCTIONS:
            found.setdefault(id(e), e)
    for slot, e in function.writes:
        if not e.tensor and (formula.slots[slot].tensor or function.phase[id(e)] != function.last):
            found.setdefault(id(e), e)
    for e in function.contributions:
        found.setdefault(id(e), e)
    return list(found.values())


def _slot(leaf: Expr) -> int:
    assert isinstance(leaf.value, int)
    return leaf.value
