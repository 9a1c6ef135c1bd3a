"""The kernels of a group from its formula: one launch for every pass over memory, and one between two passes.

A pass runs over chunks of all members at once, as many at a time as there are vector cores. Where it computes norms or
sums, it leaves one partial result per chunk; the launch after it combines those of each member in the chunks' order and
computes what follows from them alone. What members contribute to a total is added up in the members' order where
the total is read. So no bit depends on the number of cores.

Memory is reached by absolute addresses, divided by the size of an element, against bases that are zero: no tensor is
special, and one that moved is one other number in the table of chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import DTYPE_NAMES, HALF, REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.kernels.sweeps import CONTRIBUTE, Function, Sweep, schedule
from npu_fuse_pass.lowerings.npu.emit.split import Split
from npu_fuse_pass.lowerings.npu.kernels.final_ir import SIZES
from npu_fuse_pass.lowerings.npu.kernels.mlir import CHUNK, ONE, Body, Value
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS, Operations, supported
from npu_fuse_pass.reasons import Code

STORED = {"f32": "f32", "f16": "f16", "bf16": "bf16", "bool": "i8"}
MEMBER, LENGTH = 0, 1
ADDRESSES = 2
"""Columns of the table of chunks: the member, the elements, then one address for each tensor slot."""
FIRST, COUNT = 1, 2
"""Columns of the table of members, behind the member: its first chunk and how many it has."""
INTEGERS = ("rows", "chunks", "members", "terms", "first_term")
"""Numbers that every kernel gets: rows of its table, chunks, members of the group, terms of each total, and where those
of the group begin. Behind them stand the totals: those that it reads ("total0", ...) and those that it adds to
("adds0", ...)."""
_ATTRIBUTES = (
    '{SyncBlockLockArgIdx = 0 : i64, WorkspaceArgIdx = 1 : i64, global_kernel = "local", parallel_mode = "simd"}'
)
_OTHERWISE = "nothing has to be done: GE operations compute the group"
_REDUCE = {
    "sum": ("arith.addf", "add", 0.0),
    "amax": ("arith.maximumf", "maximum", float("-inf")),
    "amin": ("arith.minimumf", "minimum", float("inf")),
}


@dataclasses.dataclass(frozen=True)
class Pointer:
    """An argument of a kernel that is memory.

    Attributes:
        kind: "read" or "write" (tensor slot `slot`, base 0), or a vector of the group: "partial" (a pass's sums, one
            row of chunks for each), "scratch" (what follows from sums, a row per member), "terms" (what members add to
            totals, a row per total), "numbers" (from the host, a row per member) or "table".
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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch of a group.

    Attributes:
        name: of the function.
        contributes: it belongs to the contributions to totals, which come before every group's update.
        over: "chunks" or "members", the rows of its table.
        pointers: its arguments, in order.
        integers: the numbers after these.
        sums: how many partial results it leaves for each chunk.
        text: MLIR.
    """

    name: str
    contributes: bool
    over: str
    pointers: tuple[Pointer, ...]
    integers: tuple[str, ...]
    sums: int
    text: str

    @property
    def bytes_per_element(self) -> int:
        """What it must read and write of tensors; tables and numbers come on top, once for each chunk."""
        return sum(SIZES[p.dtype] for p in self.pointers if p.slot >= 0)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """All launches of a group, in order.

    Attributes:
        block: the elements of a chunk.
        numbers: columns of the numbers from the host.
        scratch: columns of the numbers that follow from sums.
        slots: the tensor slots of the formula, in the order of the table's addresses.
    """

    launches: tuple[Kernel, ...]
    block: int
    numbers: int
    scratch: int
    slots: tuple[int, ...]

    @property
    def bytes_per_element(self) -> int:
        return sum(k.bytes_per_element for k in self.launches)

    @property
    def sums(self) -> int:
        return max(k.sums for k in self.launches)


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


def generate(name: str, made: Split, block: int, shared: Collection[int] = ()) -> Kernels:
    """The kernels of one group.

    Args:
        name: of the group; functions are named after it.
        made: the formula, split between host and device by `split_whole`.
        block: the elements of a buffer in the vector cores' memory.
        shared: numbers that all members have in common; what follows from them and from totals is computed once.

    Raises:
        Unsupported: see `check`; or a total depends on another total.
    """
    formula = made.device
    check(formula)
    totals = formula.scalar_slots[len(made.values) :]
    below = postorder(formula.contributions)
    if any(e.op == "leaf" and not e.tensor and e.value in totals for e in below):
        raise Unsupported(name, "a total depends on another total", Code.ACROSS_PARAMETERS, _OTHERWISE)
    scheduled = schedule(formula, totals)
    slots = tuple(formula.tensor_slots)
    launches: list[Kernel] = []
    columns = 0
    for function in scheduled.functions:
        contributes = bool(formula.contributions) and function is scheduled.functions[CONTRIBUTE]
        group = _Group(f"{name}_contribute" if contributes else name, made, totals, block, shared, function, columns)
        launches += group.kernels(contributes)
        columns += len(group.columns)
    return Kernels(tuple(launches), block, len(made.values), columns, slots)


class _Group:
    """The kernels of one function."""

    def __init__(
        self,
        name: str,
        made: Split,
        totals: Sequence[int],
        block: int,
        shared: Collection[int],
        function: Function,
        columns: int,
    ) -> None:
        self.name, self.made, self.block, self.function = name, made, block, function
        self.formula = made.device
        first = len(self.formula.tensor_slots)
        self.totals = {s: k for k, s in enumerate(totals)}
        self.number = {first + k: k for k in range(len(made.values))}  # scalar slot -> column of the numbers
        self.shared = {first + k for k in shared}
        needed = [e for e in function.order if not e.tensor and function.phase[id(e)] and self._leaves_section(e)]
        self.columns = {id(e): columns + k for k, e in enumerate(needed)}
        self.stored = needed

    def _leaves_section(self, e: Expr) -> bool:
        """Whether a scalar is read by a pass or by a later section."""
        phase = self.function.phase
        used = any(
            id(e) in map(id, x.args) and (x.tensor or x.op in REDUCTIONS or phase[id(x)] > phase[id(e)])
            for x in self.function.order
        )
        return used or any(e is root and self.formula.slots[s].tensor for s, root in self.function.writes)

    def kernels(self, contributes: bool) -> list[Kernel]:
        """Passes, and between them what combines their sums."""
        function, found = self.function, []
        for k in range(function.last + 1):
            sums = function.sweeps[k - 1].sums if k else ()
            ready = [e for e in self.stored if function.phase[id(e)] == k]
            terms = function.contributions if k == function.last else ()
            if ready or terms:
                found.append(_Combine(self, f"{self.name}_combine{k}", k, sums, ready, terms).kernel(contributes))
            if k < len(function.sweeps):
                suffix = "" if len(function.sweeps) == 1 else f"_pass{k}"
                found.append(_Sweep(self, self.name + suffix, k, function.sweeps[k]).kernel(contributes))
        return found


class _Emitter:
    """What passes and combinations share: scalars where they are needed, operations, the function around them."""

    def __init__(self, group: _Group, name: str, phase: int) -> None:
        self.group, self.name, self.phase = group, name, phase
        self.body = Body(group.block)
        self.apply = Operations(self.body)
        self.values: dict[int, Value] = {}
        self.pointers: dict[str, Pointer] = {}
        self._integers = dict.fromkeys(INTEGERS)
        self._member = ""

    def integer(self, name: str) -> str:
        """A number among the arguments."""
        self._integers[name] = None
        return self.body.as_index(f"%{name}", "i32")

    def pointer(self, kind: str, dtype: str, written: bool = False, slot: int = -1) -> str:
        """An argument; asked for when it is used."""
        made = Pointer(kind, dtype, written, slot)
        self.pointers[made.name] = made
        return made.name

    def finished(self, over: str, contributes: bool, sums: int) -> Kernel:
        """The function; its loop over rows is closed."""
        order = ("read", "write", "partial", "scratch", "terms", "numbers", "table")
        given = sorted(self.pointers.values(), key=lambda p: (order.index(p.kind), p.written, p.slot))
        arguments = ["%sync: memref<?xi8>", "%work: memref<?xi8>"]
        for p in given:
            arguments.append(f"{p.name}: memref<?x{p.dtype}> {{tt.tensor_kind = {int(p.written)} : i32}}")
        arguments += [f"%{name}: i32" for name in self._integers]
        arguments += [f"%grid{k}: i32" for k in range(6)]  # blocks in x, y, z, then this block's x, y, z
        head = f"  func.func @{self.name}({', '.join(arguments)}) attributes {_ATTRIBUTES} {{"
        text = "\n".join(["module {", head, self.body.text, "    return", "  }", "}", ""])
        return Kernel(self.name, contributes, over, tuple(given), tuple(self._integers), sums, text)

    def columns(self, width: int, wanted: Sequence[int]) -> list[str]:
        """Cells of the loop's row of the table."""
        body = self.body
        row = body.as_index("%row", "i32")
        self.row, at = row, body.product(row, body.index(width))
        table = self.pointer("table", "i64")
        cells = [body.element(table, body.sum_of(at, body.index(k)), "i64") for k in wanted]
        return [body.as_index(cell, "i64") for cell in cells]

    def before(self, needed: Sequence[Expr]) -> None:
        """What is the same for all rows: totals, and what follows from them and from shared numbers."""
        order = self._below(needed)
        fixed: dict[int, bool] = {}
        for e in order:
            if e.op == "leaf":
                fixed[id(e)] = e.value in self.group.totals or e.value in self.group.shared
            else:
                fixed[id(e)] = id(e) not in self.group.columns and all(fixed.get(id(a), False) for a in e.args)
        totals = {id(e): e.value in self.group.totals for e in order if e.op == "leaf"}
        for e in order:
            totals[id(e)] = totals.get(id(e), False) or any(totals.get(id(a), False) for a in e.args)
        self._member = self.body.index(0)
        for e in order:
            if fixed[id(e)] and totals[id(e)]:
                self.values[id(e)] = self._outside(self.scalar(e))
        self.values = {k: v for k, v in self.values.items() if fixed[k] and totals[k]}

    def _outside(self, value: Value) -> Value:
        if value.dtype == "i1":
            value = self.apply("where", value, 1.0, 0.0)
        return self.body.taken(value)

    def _below(self, needed: Sequence[Expr]) -> list[Expr]:
        """Scalars that are computed here, arguments first; not those that another kernel stored."""
        found = []
        stop = self._given()
        seen: set[int] = set()

        def visit(e: Expr) -> None:
            if id(e) in seen or id(e) in stop or e.tensor:
                return
            seen.add(id(e))
            if e.op not in REDUCTIONS:
                for a in e.args:
                    visit(a)
                found.append(e)

        for e in needed:
            visit(e)
        return found

    def _given(self) -> set[int]:
        """Scalars that are stored before this kernel runs."""
        phase = self.group.function.phase
        return {id(e) for e in self.group.stored if phase[id(e)] < self.phase}

    def scalar(self, e: Expr) -> Value:
        """A scalar expression: a number, or one element."""
        if id(e) not in self.values:
            self.values[id(e)] = self._scalar(e)
        return self.values[id(e)]

    def _scalar(self, e: Expr) -> Value:
        body = self.body
        if id(e) in self._given():
            return body.number(self.pointer("scratch", "f32"), self.scratch(e))
        if e.op == "leaf":
            assert isinstance(e.value, int)
            if e.value in self.group.totals:
                return self._total(self.group.totals[e.value])
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

    def scratch(self, e: Expr) -> str:
        """Where a member's number lies that follows from sums."""
        column = self.body.product(self.integer("members"), self.body.index(self.group.columns[id(e)]))
        return self.body.sum_of(column, self._member)

    def _plain(self, value: Value) -> Value:
        return self.apply("where", value, 1.0, 0.0) if value.dtype == "i1" else value

    def _truth(self, value: Value) -> Value:
        return value if value.dtype == "i1" else self.apply("ne", value, 0.0)

    def _total(self, number: int) -> Value:
        """The sum of all members' terms, in their order; the same in every core."""
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

        return body.fold(body.spread(body.constant(start), ONE), count, min(body.block, SEGMENT), add)


SEGMENT = 1024
"""Partial results or terms that are read at once."""


class _Combine(_Emitter):
    """One row per member: its sums, what follows from them, and what it contributes."""

    def __init__(
        self, group: _Group, name: str, phase: int, sums: Sequence[Expr], ready: Sequence[Expr], terms: Sequence[Expr]
    ) -> None:
        super().__init__(group, name, phase)
        self._sums, self._ready, self._terms = sums, ready, terms

    def kernel(self, contributes: bool) -> Kernel:
        body = self.body
        needed = [*self._ready, *self._terms]
        self.before([a for e in self._below(needed) for a in (e, *e.args)])
        with body.loop("scf.for %row = %grid3 to %rows step %grid0 : i32"):
            self._member, first, count = self.columns(3, (MEMBER, FIRST, COUNT))
            chunks = self.integer("chunks")
            for j, e in enumerate(self._sums):
                begin = body.sum_of(body.product(chunks, body.index(j)), first)
                self.values[id(e)] = self.folded(self.pointer("partial", "f32"), begin, count, e.op)
            for e in self._ready:
                self._store(self.scalar(e), "scratch", self.scratch(e))
            if self._terms:
                own = body.sum_of(self.integer("first_term"), self._member)
                for number, e in enumerate(self._terms):
                    row = body.product(self.integer("terms"), self.integer(f"adds{number}"))
                    self._store(self.scalar(e), "terms", body.sum_of(row, own))
        return self.finished("members", contributes, 0)

    def _store(self, value: Value, kind: str, at: str) -> None:
        one = self.body.spread(self._plain(value), ONE)
        self.body.store(one, self.pointer(kind, "f32", written=True), at)


class _Sweep(_Emitter):
    """One row per chunk."""

    def __init__(self, group: _Group, name: str, phase: int, work: Sweep) -> None:
        super().__init__(group, name, phase + 1)
        self._work = work

    def kernel(self, contributes: bool) -> Kernel:
        body, work, slots = self.body, self._work, self.group.formula.tensor_slots
        scalars = [e for e in work.values if not e.tensor]
        self.before(scalars)
        with body.loop("scf.for %row = %grid3 to %rows step %grid0 : i32"):
            used = sorted(set(work.moved))
            cells = self.columns(ADDRESSES + len(slots), [MEMBER, LENGTH, *(ADDRESSES + slots.index(s) for s in used)])
            self._member, length, *at = cells
            self._address = dict(zip(used, at, strict=True))
            positive = body.name(f"arith.maxsi {length}, {body.index(0)} : index")
            body.add(f"%n = arith.minsi {positive}, {body.index(body.block)} : index")
            for e in work.values:
                if e.tensor:
                    self._tensor(e)
            for slot, e in work.writes:
                self._write(slot, e)
            for j, e in enumerate(work.sums):
                self._partial(j, e)
        return self.finished("chunks", contributes, len(work.sums))

    def _tensor(self, e: Expr) -> None:
        slot = self._work.places.get(id(e))
        if slot is not None:
            dtype = STORED[DTYPE_NAMES[self.group.formula.slots[slot].dtype]]
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
        return value if value.dtype == "i1" else self.apply("ne", self.apply.cast(value, "f32"), 0.0)

    def _cast(self, value: Value, dtype: torch.dtype) -> Value:
        if dtype == torch.bool:
            return value if value.dtype == "i1" else self.apply("ne", value, 0.0)
        value = self.apply("where", value, 1.0, 0.0) if value.dtype == "i1" else value
        return self.apply.cast(value, "f32" if dtype == torch.float64 else DTYPE_NAMES[dtype])

    def _write(self, slot: int, e: Expr) -> None:
        """Rounded once, where the slot is narrower than what was computed."""
        dtype = STORED[DTYPE_NAMES[self.group.formula.slots[slot].dtype]]
        value = self.values[id(e)] if e.tensor else self.body.spread(self._outside(self.scalar(e)), CHUNK)
        if value.dtype == "i1":
            value = self.apply("where", value, 1.0, 0.0)
        value = self.apply.cast(value, dtype)
        self.body.store(value, self.pointer("write", dtype, written=True, slot=slot), self._address[slot])

    def _partial(self, j: int, e: Expr) -> None:
        body = self.body
        reduction, _, start = _REDUCE[e.op]
        value = self._operand(e.args[0])
        value = self.apply("where", value, 1.0, 0.0) if value.dtype == "i1" else value
        found = body.reduce(reduction, value, start)
        at = body.sum_of(body.product(self.integer("rows"), body.index(j)), self.row)
        body.store(found, self.pointer("partial", "f32", written=True), at)
