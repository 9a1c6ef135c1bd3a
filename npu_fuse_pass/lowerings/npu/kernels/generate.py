"""The kernels of a group from its formula: one launch for every pass over memory.

A pass runs over chunks of all members at once, as many at a time as there are vector cores. Where it computes norms or
sums, it leaves one partial result per chunk. In a later pass each core combines those of its members, in the chunks'
order, and computes what follows from them alone; its chunks are neighbours there, so that it comes to few members.
Totals are added up in the order of chunks where they are read, before a core's first chunk. So no bit depends on the
number of cores. Only where a member adds something else to a total than a sum over its elements, a launch with a row
for each member comes between.

0-dim states that follow from tensors (NovoGrad's second moments) lie on the device. Passes read them; what they become
is written by a last launch with a row for each member: no core writes what another one still reads.

Memory is reached by absolute addresses, divided by the size of an element, against bases that are zero: no tensor is
special, and one that moved is one other number in the table of chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import DTYPE_NAMES, HALF, REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.kernels.sweeps import Function, Sweep, schedule
from npu_fuse_pass.lowerings.npu.emit.split import Split
from npu_fuse_pass.lowerings.npu.kernels.final_ir import SIZES
from npu_fuse_pass.lowerings.npu.kernels.mlir import CHUNK, ONE, Body, Value
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS, Operations, supported
from npu_fuse_pass.reasons import Code

STORED = {"f32": "f32", "f16": "f16", "bf16": "bf16", "bool": "i8"}
STATES_IN = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of 0-dim states that kernels read and write."""
MEMBER, LENGTH = 0, 1
ADDRESSES = 2
"""Columns of the table of chunks: the member, the elements, then one address for each tensor slot."""
FIRST, COUNT = 0, 1
STATES = 2
"""Columns of the spans of members: its first chunk and how many it has (none if it does not take part), then one
address for each 0-dim state."""
INTEGERS = ("rows", "chunks", "terms", "first_term")
"""Numbers that every kernel gets: rows of its table, chunks, terms of each total, and where those of the group begin.
Behind them stand the totals: those that it reads ("total0", ...) and those that it adds to ("adds0", ...)."""
_ATTRIBUTES = (
    '{SyncBlockLockArgIdx = 0 : i64, WorkspaceArgIdx = 1 : i64, global_kernel = "local", parallel_mode = "simd"}'
)
_EACH_ROW = "scf.for %row = %grid3 to %rows step %grid0 : i32"
_OTHERWISE = "nothing has to be done: GE operations or the original compute the group"
_REDUCE = {
    "sum": ("arith.addf", "add", 0.0),
    "amax": ("arith.maximumf", "maximum", float("-inf")),
    "amin": ("arith.minimumf", "minimum", float("inf")),
}


@dataclasses.dataclass(frozen=True)
class Pointer:
    """An argument of a kernel that is memory.

    Attributes:
        kind: "read" or "write" (tensor slot `slot`, base 0), "old" or "new" (slot of a 0-dim state, base 0), or a
            vector of the group: "partial" (sums of passes, one row of chunks for each), "terms" (what is added up to
            totals, a row per total), "numbers" (from the host, a row per member), "spans" (of members) or "table" (of
            chunks, or of the members that take part).
        dtype: MLIR's name of the element type.
        written: the kernel writes there. What it reads and writes is two arguments.
    """

    kind: str
    dtype: str
    written: bool = False
    slot: int = -1

    @property
    def name(self) -> str:
        if self.slot >= 0:
            return f"%{self.kind}{self.slot}"
        return f"%{self.kind}_{'out' if self.written else 'in'}"

    @property
    def bytes_per_element(self) -> int:
        """What a kernel moves through it for each element of a tensor."""
        return SIZES[self.dtype] if self.kind in ("read", "write") else 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch of a group.

    Attributes:
        name: of the function.
        round: of the contributions to totals, which come before every group's update; None: it is of the update.
        over: "chunks" or "members", the rows of its table.
        pointers: its arguments, in order.
        integers: the numbers after these.
        text: MLIR.
    """

    name: str
    round: int | None
    over: str
    pointers: tuple[Pointer, ...]
    integers: tuple[str, ...]
    text: str

    @property
    def bytes_per_element(self) -> int:
        """What it must read and write of tensors; tables and numbers come on top, once for each chunk."""
        return sum(p.bytes_per_element for p in self.pointers)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """All launches of a group, in order.

    Attributes:
        block: the elements of a chunk.
        numbers: columns of the numbers from the host.
        slots: the tensor slots of the formula, in the order of the table's addresses.
        sums: how many partial results of each chunk are kept.
        states: the slots of 0-dim states, in the order of their addresses in the spans of members.
    """

    launches: tuple[Kernel, ...]
    block: int
    numbers: int
    slots: tuple[int, ...]
    sums: int
    states: tuple[int, ...] = ()

    @property
    def bytes_per_element(self) -> int:
        return sum(k.bytes_per_element for k in self.launches)

    @property
    def terms_of_members(self) -> bool:
        """Whether what is added to a total is one number for each member; else one for each chunk."""
        return any(k.over == "members" and k.round is not None for k in self.launches)


def check(formula: Formula) -> None:
    """Whether the vector unit can compute a device formula.

    Raises:
        Unsupported: float64 tensors, or the first operation that has no vector operation; says why.
    """
    if any(slot.tensor and slot.dtype == torch.float64 for slot in formula.slots):
        raise Unsupported("float64", "the vector unit has no float64; GE operations compute it", Code.DTYPE, _OTHERWISE)
    for e in postorder(formula.roots):
        if e.op not in ("leaf", "cast", "zero", *REDUCTIONS) and not supported(e.op):
            raise Unsupported(e.op, REASONS[e.op], Code.OPERATION, _OTHERWISE)


def generate(
    name: str, made: Split, block: int, shared: Collection[int] = (), rounds: Sequence[int] | None = None
) -> Kernels:
    """The kernels of one group.

    Args:
        name: of the group; functions are named after it.
        made: the formula, split between host and device by `split_whole`.
        block: the elements of a buffer in the vector cores' memory.
        shared: numbers that all members have in common; what follows from them and from totals is computed once.
        rounds: for each contribution to a total the round in which it is right, from 0 on, where one depends on others.

    Raises:
        Unsupported: see `check`; or a total depends on another total of no earlier round.
    """
    formula = made.device
    check(formula)
    states = made.state_slots
    totals = [s for s in formula.scalar_slots[len(made.values) :] if s not in states]
    rounds = rounds or [0] * len(formula.contributions)
    below = postorder([e for e, number in zip(formula.contributions, rounds, strict=True) if not number])
    if any(e.op == "leaf" and not e.tensor and e.value in totals for e in below):
        raise Unsupported(name, "a total depends on another total", Code.ACROSS_PARAMETERS, _OTHERWISE)
    launches: list[Kernel] = []
    kept = 0
    for number, function in _functions(formula, totals, rounds):
        adds = [k for k, r in enumerate(rounds) if r == number]
        called = name if number is None else f"{name}_contribute{number or ''}"
        group = _Group(called, made, totals, block, shared, function, adds)
        launches += group.kernels(number)
        kept = max(kept, len(group.kept))
    return Kernels(tuple(launches), block, len(made.values), tuple(formula.tensor_slots), kept, states)


def _functions(formula: Formula, totals: Sequence[int], rounds: Sequence[int]) -> Iterator[tuple[int | None, Function]]:
    """The contributions of each round, and the update; only what is added in one round alone may write early."""
    if not any(rounds):
        *contribute, update = schedule(formula, totals).functions
        yield from ((0, function) for function in contribute)
    else:
        for number in sorted(set(rounds)):
            added = [e for e, r in zip(formula.contributions, rounds, strict=True) if r == number]
            yield number, schedule(dataclasses.replace(formula, writes=(), contributions=tuple(added))).functions[0]
        (update,) = schedule(dataclasses.replace(formula, contributions=())).functions
    yield None, update


class _Group:
    """The kernels of one function.

    Attributes:
        kept: sums whose partial results are kept for each chunk, by their ids: their row.
        terms: contributions that are sums over elements: each chunk adds its own; by the sums' ids, which totals. Empty
            where one of the group's is something else.
        adds: the numbers of the function's contributions among the group's.
    """

    def __init__(
        self,
        name: str,
        made: Split,
        totals: Sequence[int],
        block: int,
        shared: Collection[int],
        function: Function,
        adds: Sequence[int],
    ) -> None:
        self.name, self.made, self.block, self.function, self.adds = name, made, block, function, adds
        self.formula = made.device
        first = len(self.formula.tensor_slots)
        self.totals = {s: k for k, s in enumerate(totals)}
        self.states = {s: STATES + k for k, s in enumerate(made.state_slots)}  # slot -> column of the spans
        self.number = {first + k: k for k in range(len(made.values))}  # scalar slot -> column of the numbers
        self.shared = {first + k for k in shared}
        by_members = any(_added(e) is None for e in self.formula.contributions)
        added = [] if by_members else [_added(e) for e in function.contributions]
        self.terms: dict[int, list[int]] = {}
        for k, e in zip(adds, added, strict=False):
            self.terms.setdefault(id(e), []).append(k)
        # of a sum that only chunks add to a total, what is below it
        ends = [e for a in added if a is not None for e in a.args] if self.terms else function.contributions
        read = {id(e) for e in postorder([*(e for _, e in function.writes), *ends]) if e.op in REDUCTIONS}
        sums = (e for work in function.sweeps for e in work.sums)
        self.kept = {id(e): k for k, e in enumerate(e for e in sums if id(e) in read)}

    def stored(self, slot: int) -> str:
        """MLIR's name of the elements of a slot in memory."""
        return STORED[DTYPE_NAMES[self.formula.slots[slot].dtype]]

    def kernels(self, number: int | None) -> list[Kernel]:
        """Passes; then what members add to totals, where that is not what chunks add, or what their states become."""
        several, found = len(self.function.sweeps) > 1, []
        for k, work in enumerate(self.function.sweeps):
            found.append(_Sweep(self, f"{self.name}_pass{k}" if several else self.name, work).kernel(number))
        if self.function.contributions and not self.terms:
            found.append(_Combine(self, f"{self.name}_combine").kernel(number))
        if any(s in self.states for s, _ in self.function.writes):
            found.append(_Advance(self, f"{self.name}_states").kernel(number))
        return found


def _added(e: Expr) -> Expr | None:
    """The sum over elements that a contribution is; None: it is something else.

    The square of the root of a sum of squares (torch's norm of norms) is that sum, but for eager's two roundings.
    """
    e = _uncast(e)
    factor = _squared(e)
    if factor is None:
        return e if e.op == "sum" else None
    root = _uncast(factor)
    found = _uncast(root.args[0]) if root.op == "sqrt" else root
    of_squares = root.op == "sqrt" and found.op == "sum" and _squared(_uncast(found.args[0])) is not None
    return found if of_squares else None


def _squared(e: Expr) -> Expr | None:
    return e.args[0] if e.op == "mul" and e.args[0] is e.args[1] else None


def _scalars(roots: Sequence[Expr]) -> list[Expr]:
    """Scalars and those that they are computed from, down to sums over elements; arguments first."""
    return postorder(roots, until=REDUCTIONS)


def _uncast(e: Expr) -> Expr:
    """Below casts that are none on a device: to float32 or float64."""
    while e.op == "cast" and e.dtype in (torch.float32, torch.float64):
        e = e.args[0]
    return e


class _Emitter:
    """What passes and combinations share: scalars where they are needed, operations, the function around them."""

    def __init__(self, group: _Group, name: str) -> None:
        self.group, self.name = group, name
        self.body = Body(group.block)
        self.apply = Operations(self.body)
        self.values: dict[int, Value] = {}
        self.pointers: dict[str, Pointer] = {}
        self._integers = dict.fromkeys(INTEGERS)
        self._member, self._span = "", ("", "")

    def integer(self, name: str) -> str:
        """A number among the arguments."""
        self._integers[name] = None
        return self.body.as_index(f"%{name}", "i32")

    def pointer(self, kind: str, dtype: str, written: bool = False, slot: int = -1) -> str:
        """An argument; asked for when it is used."""
        made = Pointer(kind, dtype, written, slot)
        self.pointers[made.name] = made
        return made.name

    def finished(self, over: str, number: int | None) -> Kernel:
        """The function; its loop over rows is closed."""
        order = ("read", "write", "old", "new", "partial", "terms", "numbers", "spans", "table")
        given = sorted(self.pointers.values(), key=lambda p: (order.index(p.kind), p.written, p.slot))
        arguments = ["%sync: memref<?xi8>", "%work: memref<?xi8>"]
        for p in given:
            arguments.append(f"{p.name}: memref<?x{p.dtype}> {{tt.tensor_kind = {int(p.written)} : i32}}")
        arguments += [f"%{name}: i32" for name in self._integers]
        arguments += [f"%grid{k}: i32" for k in range(6)]  # blocks in x, y, z, then this block's x, y, z
        head = f"  func.func @{self.name}({', '.join(arguments)}) attributes {_ATTRIBUTES} {{"
        text = "\n".join(["module {", head, self.body.text, "    return", "  }", "}", ""])
        return Kernel(self.name, number, over, tuple(given), tuple(self._integers), text)

    def columns(self, source: str, row: str, width: int, wanted: Sequence[int]) -> list[str]:
        """Cells of a row of a table."""
        body, table = self.body, self.pointer(source, "i64")
        at = body.product(row, body.index(width))
        cells = [body.element(table, body.sum_of(at, body.index(k)), "i64") for k in wanted]
        return [body.as_index(cell, "i64") for cell in cells]

    def span(self) -> tuple[str, str]:
        """The member's first chunk, and how many it has."""
        first, count = self.columns("spans", self._member, self._of_member, (FIRST, COUNT))
        return first, count

    def state(self, slot: int) -> str:
        """Where the member's state lies."""
        return self.columns("spans", self._member, self._of_member, (self.group.states[slot],))[0]

    @property
    def _of_member(self) -> int:
        return STATES + len(self.group.states)

    def before(self, needed: Sequence[Expr]) -> None:
        """What is the same for all rows: totals, and what follows from them and from shared numbers."""
        shared: set[int] = set()
        following: dict[int, Expr] = {}  # of these, what follows from totals
        for e in (e for e in _scalars(needed) if e.op not in REDUCTIONS):
            total = e.op == "leaf" and e.value in self.group.totals
            if total or (e.value in self.group.shared if e.op == "leaf" else all(id(a) in shared for a in e.args)):
                shared.add(id(e))
                if total or any(id(a) in following for a in e.args):
                    following[id(e)] = e
        self._member = self.body.index(0)
        for e in following.values():
            self.values[id(e)] = self._outside(self.scalar(e))
        self.values = {k: v for k, v in self.values.items() if k in following}

    def term(self, number: int, at: str) -> str:
        """Where a member's or a chunk's part of a total lies."""
        row = self.body.product(self.integer("terms"), self.integer(f"adds{number}"))
        return self.body.sum_of(row, self.integer("first_term"), at)

    def _outside(self, value: Value) -> Value:
        return self.body.taken(self._plain(value))

    def scalar(self, e: Expr) -> Value:
        """A scalar expression: a number, or one element."""
        if id(e) not in self.values:
            self.values[id(e)] = self._scalar(e)
        return self.values[id(e)]

    def _scalar(self, e: Expr) -> Value:
        body = self.body
        if e.op in REDUCTIONS:
            first, count = self._span
            row = body.product(self.integer("chunks"), body.index(self.group.kept[id(e)]))
            return self.folded(self.pointer("partial", "f32"), body.sum_of(row, first), count, e.op)
        if e.op == "leaf":
            assert isinstance(e.value, int)
            if e.value in self.group.totals:
                return self._total(self.group.totals[e.value])
            if e.value in self.group.states:
                dtype = self.group.stored(e.value)
                one = body.one(self.pointer("old", dtype, slot=e.value), self.state(e.value), dtype)
                return self.apply.cast(one, "f32")
            at = body.product(self._member, body.index(len(self.group.made.values)))
            return body.number(self.pointer("numbers", "f32"), body.sum_of(at, body.index(self.group.number[e.value])))
        if e.op == "zero":
            return body.constant(0.0)
        given = [self.scalar(a) for a in e.args]
        if e.op == "cast":
            if e.dtype not in HALF or e.args[0].dtype == e.dtype:
                return self._truth(given[0]) if e.dtype == torch.bool else self._plain(given[0])
            one = body.spread(self._plain(given[0]), ONE)
            return self.apply.cast(self.apply.cast(one, DTYPE_NAMES[e.dtype]), "f32")
        masks = [a.dtype == torch.bool for a in e.args]
        given = [self._truth(x) if mask else self._plain(x) for x, mask in zip(given, masks, strict=True)]
        return self.apply(e.op, *given)

    def _plain(self, value: Value) -> Value:
        return self.apply("where", value, 1.0, 0.0) if value.dtype == "i1" else value

    def _truth(self, value: Value) -> Value:
        return value if value.dtype == "i1" else self.apply("ne", self.apply.cast(value, "f32"), 0.0)

    def _total(self, number: int) -> Value:
        """The sum of all terms, in their order; the same in every core."""
        body = self.body
        count = self.integer("terms")
        begin = body.product(count, self.integer(f"total{number}"))
        found = self.folded(self.pointer("terms", "f32"), begin, count, "sum")
        return body.taken(found)

    def folded(self, source: str, begin: str, count: str, op: str) -> Value:
        """One value of `count` elements in device memory, a buffer's length after another."""
        body = self.body
        reduction, step, start = _REDUCE[op]

        def add(at: str, running: Value) -> Value:
            part = body.load(source, body.sum_of(begin, at), "f32")
            return self.apply(step, running, body.reduce(reduction, part, start))

        return body.fold(body.spread(body.constant(start), ONE), count, body.block, add)


class _Combine(_Emitter):
    """One row per member: what it adds to totals."""

    def kernel(self, number: int | None) -> Kernel:
        body, terms = self.body, self.group.function.contributions
        self.before(terms)
        with body.loop(_EACH_ROW):
            (self._member,) = self.columns("table", body.as_index("%row", "i32"), 1, (MEMBER,))
            self._span = self.span()
            for k, e in zip(self.group.adds, terms, strict=True):
                one = body.spread(self._plain(self.scalar(e)), ONE)
                body.store(one, self.pointer("terms", "f32", written=True), self.term(k, self._member))
        return self.finished("members", number)


class _Advance(_Emitter):
    """One row per member: what its 0-dim states become, after every pass that reads what they were."""

    def kernel(self, number: int | None) -> Kernel:
        body = self.body
        writes = [(s, e) for s, e in self.group.function.writes if s in self.group.states]
        self.before([e for _, e in writes])
        with body.loop(_EACH_ROW):
            (self._member,) = self.columns("table", body.as_index("%row", "i32"), 1, (MEMBER,))
            if any(x.op in REDUCTIONS for x in _scalars([e for _, e in writes])):
                self._span = self.span()
            found = [(s, body.spread(self._plain(self.scalar(e)), ONE)) for s, e in writes]
            for s, value in found:  # all are read before one is written
                dtype = self.group.stored(s)
                target = self.pointer("new", dtype, written=True, slot=s)
                body.store(self.apply.cast(value, dtype), target, self.state(s))
        return self.finished("members", number)


class _Sweep(_Emitter):
    """One row per chunk."""

    def __init__(self, group: _Group, name: str, work: Sweep) -> None:
        super().__init__(group, name)
        self._work = work
        self._slots = group.formula.tensor_slots
        self._width = ADDRESSES + len(self._slots)

    def kernel(self, number: int | None) -> Kernel:
        body = self.body
        scalars = [e for e in self._work.values if not e.tensor]
        self.before(scalars)
        combined = [e for e in scalars if any(self._of_members(x) for x in _scalars([e]))]
        if combined:
            self._members(combined)
        else:
            with body.loop(_EACH_ROW):
                self._chunk()
        return self.finished("chunks", number)

    def _of_members(self, e: Expr) -> bool:
        """Whether a core reads it once for each member that it comes to."""
        return e.op in REDUCTIONS or (e.op == "leaf" and e.value in self.group.states)

    def _members(self, combined: Sequence[Expr]) -> None:
        """A core's part of the rows, one member after another: what its sums and states give, then its chunks."""
        body = self.body
        rows, cores, core = (body.as_index(name, "i32") for name in ("%rows", "%grid0", "%grid3"))
        begin, end = (
            body.name(f"arith.divsi {body.product(rows, k)}, {cores} : index")
            for k in (core, body.sum_of(core, body.index(1)))
        )
        before_end = body.name(f"arith.subi {end}, {body.index(1)} : index")
        first, last = (self.columns("table", row, self._width, (MEMBER,))[0] for row in (begin, before_end))
        behind = body.sum_of(last, body.index(1))
        one = body.name("arith.constant 1 : i32")
        with body.loop(f"scf.for %each = {first} to {behind} step {body.index(1)}"):
            self._member = "%each"
            self._span = start, count = self.span()
            for e in combined:
                self.values[id(e)] = self._outside(self.scalar(e))
            low = body.name(f"arith.maxsi {begin}, {start} : index")
            high = body.name(f"arith.minsi {end}, {body.sum_of(start, count)} : index")
            low, high = (body.name(f"arith.index_cast {k} : index to i32") for k in (low, high))
            with body.loop(f"scf.for %row = {low} to {high} step {one} : i32"):
                self._chunk()

    def _chunk(self) -> None:
        body, work = self.body, self._work
        used = sorted(set(work.moved))
        wanted = [MEMBER, LENGTH, *(ADDRESSES + self._slots.index(s) for s in used)]
        self._row = body.as_index("%row", "i32")
        self._member, length, *at = self.columns("table", self._row, self._width, wanted)
        self._address = dict(zip(used, at, strict=True))
        positive = body.name(f"arith.maxsi {length}, {body.index(0)} : index")
        body.add(f"%n = arith.minsi {positive}, {body.index(body.block)} : index")
        for e in work.values:
            if e.tensor:
                self._tensor(e)
        for slot, e in work.writes:
            self._write(slot, e)
        for e in work.sums:
            self._sum(e)

    def _tensor(self, e: Expr) -> None:
        slot = self._work.places.get(id(e))
        if slot is not None:
            dtype = self.group.stored(slot)
            source = self.pointer("read", dtype, slot=slot)
            self.values[id(e)] = self.body.load(source, self._address[slot], dtype)
        elif e.op == "cast":
            self.values[id(e)] = self._cast(self._operand(e.args[0]), e.dtype)
        else:
            made = self.apply(e.op, *map(self._operand, e.args))
            self.values[id(e)] = self._cast(made, e.dtype) if e.dtype in HALF else made

    def _operand(self, e: Expr) -> Value:
        """An argument of a tensor operation: float32 or a mask, of the chunk's length or a number."""
        asked = not e.tensor and e.op == "ne" and e.args[1].op == "zero"  # a truth from the host, which is a number
        value = self.values[id(e)] if e.tensor else self.scalar(e.args[0] if asked else e)
        if e.dtype != torch.bool:
            return self.apply.cast(value, "f32")
        if not e.tensor:
            value = self.body.spread(self._outside(value), CHUNK)
        return self._truth(value)

    def _cast(self, value: Value, dtype: torch.dtype) -> Value:
        if dtype == torch.bool:
            return self._truth(value)
        return self.apply.cast(self._plain(value), "f32" if dtype == torch.float64 else DTYPE_NAMES[dtype])

    def _write(self, slot: int, e: Expr) -> None:
        """Rounded once, where the slot is narrower than what was computed."""
        dtype = self.group.stored(slot)
        value = self.values[id(e)] if e.tensor else self.body.spread(self._outside(self.scalar(e)), CHUNK)
        value = self.apply.cast(self._plain(value), dtype)
        self.body.store(value, self.pointer("write", dtype, written=True, slot=slot), self._address[slot])

    def _sum(self, e: Expr) -> None:
        """A chunk's part of a sum: kept for those who combine them, added to totals."""
        body = self.body
        reduction, _, start = _REDUCE[e.op]
        found = body.reduce(reduction, self._plain(self._operand(e.args[0])), start)
        if id(e) in self.group.kept:
            row = body.product(self.integer("rows"), body.index(self.group.kept[id(e)]))
            body.store(found, self.pointer("partial", "f32", written=True), body.sum_of(row, self._row))
        for k in self.group.terms.get(id(e), ()):
            body.store(found, self.pointer("terms", "f32", written=True), self.term(k, self._row))
