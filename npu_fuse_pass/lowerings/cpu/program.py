"""The CPU lowering: one generated C++ kernel per group, called through ctypes with tables of pointers.

Nothing goes through torch's dispatcher at run time. Every call reads the addresses of tensors that may have moved,
checks that what lies there is what the kernel was made for, and copies where a layout differs.
"""

from __future__ import annotations

import array
import functools
import itertools
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch, Unsupported
from npu_fuse_pass.ir.totals import rounds, total_slots
from npu_fuse_pass.ir.types import Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.cpu.input_check import NativeDicts
from npu_fuse_pass.lowerings.cpu.kernel import Kernel
from npu_fuse_pass.lowerings.cpu.spread import Spread
from npu_fuse_pass.lowerings.cpu.threads import threads
from npu_fuse_pass.lowerings.interrupts import to_the_end
from npu_fuse_pass.lowerings.program import check_written_once
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.memory import NOWHERE, check_apart


class Program:
    """All kernels of one captured step. `values` of a call are the tensors behind the leaves, by leaf index.

    Args:
        leaves: of the captured step.
        groups: over them.
        slower: called when a step turns out to be slower than it could be, with the reason.

    Attributes:
        another: makes a program of the same kernels, for other tensors.
    """

    def __init__(
        self, leaves: Sequence[Leaf], groups: Sequence[Group], slower: Callable[[str], None] | None = None
    ) -> None:
        for group in groups:
            _check(group, leaves)
        self.another = functools.partial(Program, leaves, groups, slower)
        self._leaves = leaves
        contributed = {number for g in groups for totals in g.totals for number in totals}  # a total may have no reader
        read = {leaf.index for leaf in leaves if leaf.kind == "total"}
        self._n_totals = 1 + max(contributed | read, default=-1)
        self._snapshots = sorted(_written_scalars(groups) & _scalars_read_elsewhere(groups))
        constants = {i: leaf.value for i, leaf in enumerate(leaves) if leaf.kind == "constant"}
        self._totals_at = len(constants)
        self._snapshots_at = self._totals_at + self._n_totals
        zeros = [0.0] * (self._n_totals + len(self._snapshots) + 1)  # one more: an array of none has no address
        self._table = array.array("d", [*constants.values(), *zeros])
        places = {i: position for position, i in enumerate(constants)}
        places |= {i: self._totals_at + leaf.index for i, leaf in enumerate(leaves) if leaf.kind == "total"}
        places |= {i: self._snapshots_at + k for k, i in enumerate(self._snapshots)}
        base = self._table.buffer_info()[0]
        in_table = {i: base + 8 * position for i, position in places.items()}
        self._memory_key = b"none yet"
        self._starts, self._ends = array.array("q", [0]), array.array("q", [1])  # what has no memory lies there
        self._rounds = rounds(groups, leaves)
        totals = total_slots(groups, leaves)
        in_pieces = any(leaf.across for leaf in leaves)
        given = zip(groups, totals, strict=True)
        self.kernels = [Kernel(g, leaves, in_table, t, in_pieces) for g, t in given]
        self.spread = Spread(self.kernels, leaves, self._rounds, self._add_totals) if in_pieces else None
        self._slower = slower
        self._summed = False
        self.begun = self.written = False
        written = {m[s] for g in groups for s in g.formula.written for m in g.members}
        beside = {i: m for g in reversed(groups) for m in reversed(g.members) for i in m}
        self._makes_all = all(leaves[i].kind in ("output", "temporary") for i in written)
        self._outputs = [
            (i, leaves[i], beside[i]) for i in sorted(written) if leaves[i].kind in ("output", "temporary")
        ]
        for kernel in self.kernels:
            kernel.inputs.wait()

    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None:
        """Run the step; fills in the values of "output" and "temporary" leaves.

        Args:
            values: one tensor per leaf; None for the gradient of a parameter that is left out.
            complete: check dtypes too (the caller has not).
            kinds: equal at two calls if every tensor had the same dtype, sizes and strides at both; None: not known.

        Raises:
            Mismatch: nothing was changed; the caller runs the original instead.
            Declined: another process does not run this step fused; nothing was changed.
        """
        for i, leaf, member in self._outputs:
            values[i] = _new(leaf, member, values)
        for k, i in enumerate(self._snapshots):
            self._table[self._snapshots_at + k] = float(values[i])  # type: ignore[arg-type]
        try:
            for kernel in self.kernels:
                kernel.bind(values, complete, kinds)
            self._check_memory(values)
            self._compute(values)
        finally:
            self.release()
        missing = [why for kernel in self.kernels if (why := kernel.inputs.missing or kernel.slower)]
        if missing and self._slower is not None:
            self._slower(missing[0])
            self._slower = None  # said once

    def checks(self, params: Set[int]) -> bool:
        """True if `same` can replace collecting a step's tensors.

        Args:
            params: ids of the parameters; every other tensor but their gradients is the same object at later steps.
        """
        alone = self.spread is None and not self._outputs and not self._snapshots
        return alone and all(kernel.checks(params) for kernel in self.kernels)

    def same(self, watched: NativeDicts | None = None) -> bool:
        """True if the parameters of the last call and their present gradients are as they were.

        The caller has checked that they are still the optimizer's parameters, and calls `again` or `release` next.

        Args:
            watched: dicts that have to hold what they held, too.
        """
        first, *others = self.kernels
        return first.same(watched) and all(kernel.same() for kernel in others)

    def watched(self, dicts: Sequence[dict[Any, Any]]) -> NativeDicts:
        """What `same` compares dicts with that hold what they have to hold."""
        return NativeDicts(dicts)

    def again(self) -> None:
        """Run the step on what `same` has found.

        Raises:
            Mismatch: nothing was changed; the caller runs the original instead.
        """
        try:
            self._check_memory([])
            self._compute([])
        finally:
            self.release()

    def release(self) -> None:
        """Release the tensors of a step."""
        for kernel in self.kernels:
            kernel.release()

    def _compute(self, values: LeafValues) -> None:
        """All kernels, or none: what a signal's handler raises between two of them (KeyboardInterrupt) is held."""
        number = threads()
        bound = False
        self._summed = False
        if self.spread is not None:
            self.begun = True  # as far as other processes know
            self.spread.begin()

        def step() -> None:
            nonlocal bound
            if not bound:
                for kernel in self.kernels:
                    kernel.write(values)
                if self.spread is not None:
                    self.spread.open(number)
            bound = True
            self._run(number)

        to_the_end(step, refused=lambda e: not bound and isinstance(e, Exception))

    def _run(self, threads: int) -> None:
        """What of the step is not done yet."""
        if self.spread is not None:
            self.spread.finish(threads)
        else:
            self._run_alone(threads)
        for kernel in self.kernels:
            kernel.finish()
        self.written = True

    def _run_alone(self, threads: int) -> None:
        if not self._summed:
            for _ in range(self._rounds):
                for kernel in self.kernels:
                    # what is needed again writes nothing
                    if kernel.contribute is not None and (self._rounds > 1 or not kernel.done[0]):
                        kernel.call(kernel.contribute, threads)
                self._add_totals()
            self._summed = True
        self.begun = True
        for kernel in self.kernels:
            if not kernel.done[1]:
                kernel.call(kernel.update, threads)

    def cost(self, kernel: Kernel) -> tuple[int, int]:
        """Bytes for each element and kernel calls of a step."""
        again = max(0, self._rounds - 1) if kernel.contribute is not None else 0
        source = kernel.source
        return source.bytes_per_element + again * source.contribute_bytes, len(source.functions) + again

    def _check_memory(self, values: LeafValues) -> None:
        """Refuse memory that is written and used a second time: kernels process tensors side by side.

        Raises:
            Mismatch: two tensors share memory and at least one of them is written, or one has none.
        """
        if not self._makes_all:
            self._check_written(values)
        for kernel in self.kernels:
            kernel.moved = False
        if any(kernel.reads_overlap(self._starts, self._ends) for kernel in self.kernels):
            nowhere = array.array("q", [0]), array.array("q", [1])
            if any(kernel.reads_overlap(*nowhere) for kernel in self.kernels):
                raise Mismatch(NOWHERE, Code.NO_MEMORY)
            raise Mismatch(
                "a tensor that the step reads overlaps one that it writes: they share memory", Code.SHARED_MEMORY
            )

    def _check_written(self, values: LeafValues) -> None:
        """Refuse memory that is written twice, and note where it lies."""
        if any(kernel.copies for kernel in self.kernels):  # the tables do not hold where the originals lie
            tensors = [pair for kernel in self.kernels for pair in kernel.tensors(values)]
            check_apart([t for t, written in tensors if written], [t for t, written in tensors if not written])
        moved = any(kernel.moved for kernel in self.kernels)
        if moved and (key := b"".join(kernel.pointers_written() for kernel in self.kernels)) != self._memory_key:
            intervals = sorted(interval for kernel in self.kernels for interval in kernel.written_memory())
            if intervals and not intervals[0][0]:
                raise Mismatch(NOWHERE, Code.NO_MEMORY)
            if any(end > start for (_, end), (start, _) in itertools.pairwise(intervals)):
                raise Mismatch("two tensors that the step writes overlap: they share memory", Code.SHARED_MEMORY)
            intervals.insert(0, (0, 1))  # what has no memory is found beside what overlaps
            self._starts = array.array("q", [start for start, _ in intervals])
            self._ends = array.array("q", [end for _, end in intervals])
            self._memory_key = key

    def _add_totals(self) -> None:
        """Add up contributions exactly (fsum), so that no order of members changes a bit."""
        parts: list[list[float]] = [[] for _ in range(self._n_totals)]
        for kernel in self.kernels:
            for number, value in kernel.contributed():
                parts[number].append(value)
        for number, part in enumerate(parts):
            try:
                self._table[self._totals_at + number] = math.fsum(part)
            except (OverflowError, ValueError):  # infinities of both signs, or a sum beyond float64
                self._table[self._totals_at + number] = sum(part)


def _new(leaf: Leaf, member: Sequence[int], values: LeafValues) -> Tensor:
    """A tensor for an output, laid out like the first input of its member, or as it is without fusion."""
    if leaf.strides is not None:
        return torch.empty_strided(leaf.shape, leaf.strides, dtype=leaf.dtype, device="cpu")
    known = [t for i in member if i < len(values) and (t := values[i]) is not None]
    like = next((t for t in known if t.shape == leaf.shape), None)
    if like is not None:
        return torch.empty_like(like, dtype=leaf.dtype, requires_grad=False)
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")


def _written_scalars(groups: Sequence[Group]) -> set[int]:
    return {m[s] for g in groups for s in g.formula.written if not g.formula.slots[s].tensor for m in g.members}


def _scalars_read_elsewhere(groups: Sequence[Group]) -> set[int]:
    """0-dim leaves in slots that are not written there: readers that must see the value before the step."""
    return {m[s] for g in groups for s in g.formula.scalar_slots if s not in g.formula.written for m in g.members}


def _check(group: Group, leaves: Sequence[Leaf]) -> None:
    """What a kernel takes for granted."""
    for slot in group.formula.tensor_slots:
        for m in group.members:
            if leaves[m[slot]].device.type != "cpu":
                raise Unsupported(
                    group.name, f"a tensor on {leaves[m[slot]].device}; this lowering is for the CPU", Code.OTHER_DEVICE
                )
    check_written_once(group)
