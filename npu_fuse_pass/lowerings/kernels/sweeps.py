"""In which passes over memory a kernel does its work, and what each pass reads and writes.

A stage is one call of a kernel: the contributions to totals, then the update. Pass k of a stage computes the reductions
that need k earlier ones; the pass after all of them writes. What does not wait for a reduction may be written by an
earlier pass: later ones then read the new value where they would have computed it from old ones, and that moves fewer
bytes where it makes something else superfluous. LAMB's first pass, for its norms, computes both moments from the
gradient; as it writes them, the second pass needs no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from npu_fuse_pass.ir.dimensions import leaves_expanded, reduces, small
from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula

Writes = tuple[tuple[int, Expr], ...]
Moment = tuple[int, int]  # a stage and a pass of it
CONTRIBUTE, UPDATE = 0, 1
END: Moment = (UPDATE, 1 << 30)  # after all reductions


@dataclasses.dataclass(frozen=True)
class Pass:
    """One sweep over all elements.

    Attributes:
        sums: the reductions that it computes.
        writes: tensor slots and their new values.
        values: every expression that it needs for these, arguments first; scalars are read where they were put.
        places: the tensor slots from which values are read, by the expressions' ids.
    """

    sums: tuple[Expr, ...]
    writes: Writes
    values: tuple[Expr, ...]
    places: Mapping[int, int]

    @property
    def moved(self) -> list[int]:
        """The slots that it reads, and those that it writes."""
        return [*set(self.places.values()), *(slot for slot, _ in self.writes)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One call of a kernel.

    Attributes:
        writes: slots and their new values, tensors' and scalars', over all passes.
        contributions: what is added to totals.
        order: all its expressions, arguments first; no value that an earlier stage wrote, nor what is below that.
        phase: how many reductions after each other an expression needs, by its id.
        passes: over memory; the one after the last reduction is missing where it has no tensor to write.
    """

    writes: Writes
    contributions: tuple[Expr, ...]
    order: list[Expr]
    phase: Mapping[int, int]
    passes: list[Pass]

    @property
    def last(self) -> int:
        """The phase after all reductions."""
        return max(self.phase.values(), default=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a kernel: the contributions, if there are any, and the update."""

    formula: Formula
    stages: list[Stage]

    @property
    def bytes(self) -> list[int]:
        """What each stage reads and writes for each element."""
        few = small(self.formula.writes, self.formula.roots)  # hardly any bytes
        sizes = [0 if i in few else slot.dtype.itemsize for i, slot in enumerate(self.formula.slots)]
        return [sum(sizes[slot] for p in stage.passes for slot in p.moved) for stage in self.stages]


def plan(formula: Formula, totals: Collection[int] | None = (), late: bool = False) -> Plan:
    """The stages that move the fewest bytes, as far as that was found; of equal ones, that with the later writes.

    Args:
        totals: the scalar slots that hold totals; None: contributions are computed several times and must not write.
        late: nothing is written before the last pass.
    """
    search = _Search(formula, totals)
    return search.late() if late else search.found()


class _Search:
    """Looks for the moments at which tensors are written."""

    def __init__(self, formula: Formula, totals: Collection[int] | None) -> None:
        self._formula = formula
        self._order = postorder(formula.roots)
        self._expanded = leaves_expanded(self._order)
        self._moments = {
            slot: [*self._early(slot, e, totals), END] for slot, e in formula.writes if formula.slots[slot].tensor
        }

    def late(self) -> Plan:
        """All writes last."""
        return self._planned(dict.fromkeys(self._moments, END))[0]

    def found(self) -> Plan:
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
        """The passes with reductions that can write a value; none for one that memory would round."""
        if e.dtype != self._formula.slots[slot].dtype:
            return
        if reduces(e):
            return
        below = self._below([e])
        waits = totals is None or any(x.op == "leaf" and not x.tensor and x.value in totals for x in below)
        stages = [(UPDATE, [root for _, root in self._formula.writes])]
        if not waits:
            stages.insert(0, (CONTRIBUTE, list(self._formula.contributions)))
        for stage, roots in stages:
            last = max(_phases(self._below(roots)).values(), default=0)
            yield from ((stage, k) for k in range(_phases(below)[id(e)], last))

    def _next(self, slot: int, moment: Moment) -> Moment:
        moments = self._moments[slot]
        return moments[moments.index(moment) + 1]

    def _valid(self, when: dict[int, Moment]) -> tuple[dict[int, Moment], Plan]:
        """The earliest moments from `when` on at which no pass misses a value that was overwritten."""
        made, missed = self._planned(when)
        while missed:
            when = {slot: self._next(slot, moment) if slot in missed else moment for slot, moment in when.items()}
            made, missed = self._planned(when)
        return when, made

    def _planned(self, when: Mapping[int, Moment]) -> tuple[Plan, set[int]]:
        """The stages with writes at these moments; the slots whose old values are read after they were overwritten."""
        formula, known, written, missed = self._formula, dict[int, int](), set[int](), set[int]()
        made = []
        for number in (CONTRIBUTE, UPDATE) if formula.contributions else (UPDATE,):
            writes = tuple(w for w in formula.writes if when.get(w[0], END)[0] == number)
            contributions = formula.contributions if number == CONTRIBUTE else ()
            below = self._below([*(e for _, e in writes), *contributions], known)
            order = [e for e in below if id(e) not in known]
            stage = Stage(writes, contributions, order, _phases(order), [])
            for k in range(stage.last + 1):
                moments = [(number, k), END] if k == stage.last else [(number, k)]
                now = tuple(w for w in writes if w[0] in when and when[w[0]] in moments)
                sums = tuple(e for e in order if e.op in REDUCTIONS and stage.phase[id(e)] == k + 1)
                if not now and not sums:
                    continue
                roots = [*(e for _, e in now), *(e.args[0] for e in sums)]
                values = self._below(roots, known, scalars=False)
                leaves = (e for e in values if e.op == "leaf" and e.tensor and _slot(e) not in self._expanded)
                old = {id(e): _slot(e) for e in leaves if id(e) not in known}
                new = {id(e): known[id(e)] for e in values if id(e) in known}
                stage.passes.append(Pass(sums, now, tuple(values), {**old, **new}))
                missed |= written & set(old.values())
                written |= {slot for slot, _ in now}
                known |= {id(e): slot for slot, e in now if e.tensor}
            made.append(stage)
        return Plan(formula, made), missed

    def _below(self, roots: Sequence[Expr], known: Collection[int] = (), scalars: bool = True) -> list[Expr]:
        """What `roots` are made of, arguments first: not what known values are, and what scalars are only if asked."""
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


def kept_scalars(stage: Stage, formula: Formula) -> list[Expr]:
    """The scalars of a stage that leave the section (the scalars of one phase) in which they are computed.

    Those are read by a pass or by a later section, made by a reduction, written as a tensor, or contributed.
    """
    found: dict[int, Expr] = {}
    for e in stage.order:
        for a in e.args:
            if not a.tensor and (e.tensor or e.op in REDUCTIONS or stage.phase[id(e)] != stage.phase[id(a)]):
                found.setdefault(id(a), a)
        if e.op in REDUCTIONS:
            found.setdefault(id(e), e)
    for slot, e in stage.writes:
        if not e.tensor and (formula.slots[slot].tensor or stage.phase[id(e)] != stage.last):
            found.setdefault(id(e), e)
    for e in stage.contributions:
        found.setdefault(id(e), e)
    return list(found.values())


def _slot(leaf: Expr) -> int:
    assert isinstance(leaf.value, int)
    return leaf.value
