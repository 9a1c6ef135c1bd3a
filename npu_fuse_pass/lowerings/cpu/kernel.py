"""One CPU kernel at run time: tables of pointers, read anew at every call, and the checks that make them safe."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.types import Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.cpu import build as cpu_build
from npu_fuse_pass.lowerings.cpu.codegen import generate
from npu_fuse_pass.lowerings.cpu.input_check import KernelInputs, NativeDicts
from npu_fuse_pass.lowerings.cpu.over import sizes_of, tasks_of
from npu_fuse_pass.lowerings.cpu.tables import Args, Column, Moving, Tables
from npu_fuse_pass.profiling import named
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.memory import NOWHERE, in_order, materialised, memory_order
from npu_fuse_pass.tensors.same import SameTensors

_TAGGED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
_TAGS = {dtype: tag for tag, dtype in enumerate(_TAGGED)}
_BYTES = [dtype.itemsize for dtype in _TAGGED]  # by tag


_REORDERED = (
    "reductions over some of the dimensions take elements in the order of their indices: tensors that lie in memory "
    "in another one are copied at every step (use contiguous tensors)"
)


class Kernel:
    """One group: its functions, its tables, and the tensors of the current call.

    Attributes:
        contribute, update: its functions; nothing of the kind where it is called in pieces.
        pieces: functions, for each of these two; none where it is called as a whole.
        reduced: what each piece reduces: where in `scratch`, and how.
        scratch: its numbers between pieces, [member][number].
        done: whether each of them is through with this step; they set it themselves.
        slower: why a call cost more than it had to, if it did.
        moved: what it writes may lie elsewhere than when this was last set to False.
    """

    moved = True
    slower = ""

    def __init__(
        self,
        group: Group,
        leaves: Sequence[Leaf],
        in_table: dict[int, int],
        totals: Collection[int] | None,
        in_pieces: bool = False,
    ) -> None:
        """Load the kernel, compiled now or earlier.

        Args:
            in_table: leaves -> addresses of what the program holds for them: constants, totals, and copies of 0-dim
                tensors that one group writes and another reads, for the readers.
            totals, in_pieces: as `generate` takes them.
        """
        source = generate(group.name, group.formula, totals, in_pieces)
        self.group = group
        self.source = source
        formula, members = group.formula, group.members
        self._n = len(members)
        self._numels, self._ordered = sizes_of(leaves, group)
        counts = [max(leaves[i].whole for i in m) for m in members]
        wholes = [whole or numel for whole, numel in zip(counts, self._numels, strict=True)]
        self._tables = Tables(formula, self._numels, source.scratch, source.partial, wholes, tasks_of(leaves, group))
        self.done = self._tables.done
        self.scratch = torch.frombuffer(self._tables.scratch, dtype=torch.float64)
        tensors, scalars = self._tables.tensors, self._tables.scalars
        self._columns = [Column(tensors, rank, slot, group, leaves) for rank, slot in enumerate(formula.tensor_slots)]
        self._scalar_columns = [Column(scalars, k, slot, group, leaves) for k, slot in enumerate(formula.scalar_slots)]
        moving = [c for c in self._scalar_columns if not c.fixed]
        counters = [c for c in moving if in_table.keys().isdisjoint(c.indices)]
        self._one_by_one = [c for c in moving if c not in counters]
        # 0-dim tensors that are only read, where they lie
        read = [c for c in self._scalar_columns if not c.written and not in_table.keys() >= set(c.indices)]
        self._scalars_read, self._scalars_written = read, [c for c in self._scalar_columns if c.written]
        self._same = SameTensors()
        self._moving = Moving([*(c for c in self._columns if not c.fixed), *counters])
        self.inputs = KernelInputs(self._moving.written)
        self._kinds: object = None
        # whose elements are counted, in their order: what a tensor that is rounded stochastically replaces
        rounded = (e.args[1] for e in postorder(formula.roots) if e.op == "stochastic")
        self._counted = {like.value for like in rounded if isinstance(like.value, int)}
        self._in_table = in_table
        self._keep: list[Tensor] = []
        self._copy_back: list[tuple[Tensor, Tensor]] = []
        self._bound = False
        self._load(in_pieces)  # last: the library of the input check is compiled meanwhile

    def _load(self, in_pieces: bool) -> None:
        source = self.source
        library = cpu_build.load(source.text, [*source.functions, "find_overlap"])
        functions = [getattr(library, name) for name in source.functions]
        for f in functions:
            f.argtypes, f.restype = [ctypes.POINTER(Args)], None
        self.update = functions[-1]
        self.contribute = functions[0] if self.group.formula.contributions and not in_pieces else None
        by_name = dict(zip(source.functions, functions, strict=True))
        none: tuple[tuple[Any, ...], ...] = ((), ())
        self.pieces = [*none, *([by_name[name] for name in names] for names in source.pieces)][-2:]
        self.reduced = [*none, *source.reduced][-2:]
        self._find_overlap = library.find_overlap
        self._find_overlap.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64] * 2
        self._find_overlap.restype = ctypes.c_int64
        self._ones = array.array("q", [1]) * self._n

    # One call --------------------------------------------------------------------------------------------------------

    def bind(self, values: LeafValues, complete: bool, kinds: object) -> None:
        """Fill the tables with this call's addresses."""
        varying = self._moving.of(values)
        if self._bound and self._all_active:
            addresses = self.inputs.same(varying)
            if addresses is not None or kinds == self._kinds is not None or self._same.match(varying):
                self._bind_same(values, varying, addresses)
                return
        self._kinds = None
        self.moved = True
        plain = self._mark_active(values)
        for column in self._scalar_columns:
            if not self._bound or not column.fixed:
                self._bind_scalars(column, values)
        for column in self._columns:
            if self._bound and column.fixed:
                continue
            tensors = column.of(values)
            if not plain or not self._fits(column, tensors, complete):
                self._bind_by_member(values, complete)
                return
            column.table[column.part] = array.array("q", [t.data_ptr() for t in tensors])
        self._bound = True
        if plain:
            self._kinds = kinds
            if kinds is None:
                self._same.learn(varying)

    def _bind_same(self, values: LeafValues, varying: list[Tensor], addresses: array.array[int] | None) -> None:
        """Every tensor is of the kind that it was at the last call: only addresses are new."""
        for column in self._one_by_one:
            self._bind_scalars(column, values)
        if addresses is None:
            addresses = array.array("q", list(map(Tensor.data_ptr, varying)))
        self.inputs.learn(varying)
        self._enter(addresses)

    def _enter(self, addresses: array.array[int]) -> None:
        for column, here in self._moving.by_column(addresses):
            if here != column.table[column.part]:
                column.table[column.part] = here
                self.moved |= column.written

    def checks(self, ids: Set[int]) -> bool:
        """True if `same` finds all that changes between steps: these objects and their gradients."""
        return self._bound and self._all_active and not self._one_by_one and self.inputs.holds(ids)

    def same(self, watched: NativeDicts | None = None) -> bool:
        """Bind the tensors of the last call and their present gradients, if they are as they were; see `checks`."""
        ready = self._bound and self._all_active  # not if the last call, which may have been refused, left members out
        addresses = self.inputs.same(dicts=watched) if ready else None
        if addresses is not None:
            self._enter(addresses)
        return addresses is not None

    def _mark_active(self, values: LeafValues) -> bool:
        """Set which members take part; True if all do."""
        missing = any(v is None for column in self._columns if not column.fixed for v in column.of(values))
        if not missing and self._all_active:
            return True
        for m, member in enumerate(self.group.members):
            self._tables.active[m] = all(values[i] is not None for i in member if i not in self._in_table)
        self._all_active = not missing
        return not missing

    _all_active = True

    def _fits(self, column: Column, tensors: Sequence[Tensor], complete: bool) -> bool:
        """True if all have the dtype and size that the kernel was made for, and their values are in order in memory."""
        if complete and {t.dtype for t in tensors} != {column.dtype}:
            found = next(t for t in tensors if t.dtype != column.dtype)
            raise Mismatch(f"a tensor is {found.dtype}; the kernel was compiled for {column.dtype}")
        if [t.numel() for t in tensors] != column.numels:
            raise Mismatch("a tensor has another size than when the step was compiled")
        return all([t.is_contiguous() and materialised(t) for t in tensors])  # noqa: C419 - a list is faster here

    def _bind_scalars(self, column: Column, values: LeafValues) -> None:
        begin = column.part.start
        for m, i in enumerate(column.indices):
            value = values[i] if i < len(values) else None
            if i in self._in_table and not column.written:
                address, tag = self._in_table[i], 0
            elif value is None:
                continue
            else:
                if value.device.type != "cpu" or value.dtype not in _TAGS:
                    raise Mismatch(f"a 0-dim {value.dtype} tensor on {value.device}")
                if not materialised(value):
                    raise Mismatch("a 0-dim tensor whose memory does not hold its value (a negated or zero tensor)")
                address, tag = value.data_ptr(), _TAGS[value.dtype]
                if not address:
                    raise Mismatch(NOWHERE, Code.NO_MEMORY)
            column.table[begin + m] = address
            if self._tables.tags[begin + m] != tag:
                self._tables.tags[begin + m] = tag
                self._same, self._kinds = SameTensors(), None  # what was learned goes with the tags of before
                self.inputs.forget()

    def _bind_by_member(self, values: LeafValues, complete: bool) -> None:
        """The general way: some member is left out, or its tensors are not all contiguous."""
        for m, member in enumerate(self.group.members):
            if not self._tables.active[m]:
                continue
            tensors = [values[member[c.slot]] for c in self._columns]
            leading = [values[member[slot]] for slot in self._counted] or tensors
            strides = memory_order([t for t in leading if t is not None])
            for column, t in zip(self._columns, tensors, strict=True):
                assert t is not None
                if complete and t.dtype != column.dtype:
                    raise Mismatch(f"a tensor is {t.dtype}; the kernel was compiled for {column.dtype}")
                if t.numel() != column.numels[m] or t.layout is not torch.strided:
                    raise Mismatch("a tensor has another size or layout than when the step was compiled")
                if self._ordered:
                    strides = torch.empty(t.shape, device="meta").stride()
                if not in_order(t, strides):
                    self.slower = _REORDERED if self._ordered else ""
                    dense = torch.empty_strided(t.shape, strides, dtype=t.dtype, device="cpu").copy_(t.detach())
                    if column.written:
                        self._copy_back.append((t, dense))
                    self._keep.append(dense)
                    t = dense
                column.table[column.part.start + m] = t.data_ptr()
        self._bound = False

    @property
    def copies(self) -> bool:
        """True if this call works on copies of tensors whose elements lie in another order."""
        return bool(self._keep)

    def tensors(self, values: LeafValues) -> list[tuple[Tensor, bool]]:
        """Every tensor that takes part, and whether it is written."""
        members = [m for m, active in zip(self.group.members, self._tables.active, strict=True) if active]
        columns = (*self._columns, *self._scalars_read, *self._scalars_written)
        indices = {m[c.slot]: c.written for c in columns for m in members}
        kept = {i: written for i, written in indices.items() if written or i not in self._in_table}
        return [(t, written) for i, written in kept.items() if i < len(values) and (t := values[i]) is not None]

    def written_memory(self) -> list[tuple[int, int]]:
        """Where this call writes tensors: (start, end) in bytes."""
        found = []
        for column in self._columns:
            if column.written:
                rows = zip(column.table[column.part], column.numels, self._tables.active, strict=True)
                size = column.dtype.itemsize
                found += [(start, start + numel * size) for start, numel, active in rows if active and numel]
        for column in self._scalars_written:
            rows = zip(column.table[column.part], self._tables.tags[column.part], self._tables.active, strict=True)
            found += [(start, start + _BYTES[tag]) for start, tag, active in rows if active]
        return found

    def pointers_written(self) -> bytes:
        """Changes when what this call writes is elsewhere than at the last one."""
        rows = [c.table[c.part].tobytes() for c in (*self._columns, *self._scalar_columns) if c.written]
        return b"".join([*rows, self._tables.active.tobytes()])

    def reads_overlap(self, starts: array.array[int], ends: array.array[int]) -> bool:
        """True if a tensor that is only read shares memory with one that is written."""
        written = (starts.buffer_info()[0], ends.buffer_info()[0], len(starts))

        def found(column: Column, sizes: array.array[int]) -> bool:
            begin = column.table.buffer_info()[0] + 8 * column.part.start
            return int(self._find_overlap(begin, sizes.buffer_info()[0], self._n, *written)) >= 0

        for column in self._columns:
            if not column.written:
                sizes = column.bytes_of(self._tables.active, self._all_active)
                if found(column, sizes):
                    return True
        # where a 0-dim tensor begins is enough
        ones = self._ones if self._all_active else array.array("q", self._tables.active)
        return any(found(c, ones) for c in self._scalars_read)

    def call(self, function: Callable[..., None], threads: int) -> None:
        self._tables.share(threads)
        with named(function.__name__):
            function(self._tables.pointer)

    def contributed(self) -> list[tuple[int, float]]:
        """(total, value) of every member that takes part."""
        found = []
        for k in range(len(self.group.formula.contributions)):
            for m, totals in enumerate(self.group.totals):
                if self._tables.active[m]:
                    found.append((totals[k], self._tables.contributions[k * self._n + m]))
        return found

    def write(self, values: LeafValues) -> None:
        """Tell autograd what changes: ahead of the kernel, while all that knows the tensors is still in a cache."""
        self.done[0] = self.done[1] = 0
        if self.inputs.write():
            return
        for column in (*self._columns, *self._scalar_columns):
            if column.written and not column.fixed:
                tensors = column.of(values)
                if not self._all_active:
                    tensors = [t for t, active in zip(tensors, self._tables.active, strict=True) if active]
                torch.autograd.graph.increment_version(tensors)

    def finish(self) -> None:
        """Write back what was copied."""
        for target, dense in self._copy_back:
            with torch.no_grad():
                target.detach().copy_(dense)

    def release(self) -> None:
        """Release the call's tensors."""
        self._keep, self._copy_back = [], []
        self.inputs.release()
