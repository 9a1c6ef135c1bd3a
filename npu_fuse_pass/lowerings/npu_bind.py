"""What goes into the NPU program's graph at every step, and what comes out: tensors as flat views, numbers packed.

A member without a gradient takes part with scratch tensors in place of its own, so that one graph serves every
pattern of missing gradients and nothing of that member changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Mismatch
from ..ir import Leaf
from . import npu_emit
from .memory import check_apart, in_order, memory_order
from .npu_split import Split, slots_of

if TYPE_CHECKING:
    from .npu import Part

Values = list[Tensor | None]
Key = tuple[int, torch.dtype, torch.device]


class Numbers:
    """The host values of one split, for the members on the device, and where they lie in the packed vector."""

    def __init__(self, part: Part, made: Split, leaves: Sequence[Leaf], offset: int) -> None:
        members = part.group.members
        self.made = made
        self._columns = {s: _Column([m[s] for m in members], leaves) for e in made.host.roots for s in slots_of(e)}
        self._rows: list[Tensor] = []
        self.positions: list[dict[int, int]] = []  # per value: member -> index
        self.count = 0
        for e in made.values:
            keys: dict[tuple[int, ...], int] = {}
            rows: list[int] = []
            self.positions.append({})
            for m in part.on_device:
                key = tuple(members[m][s] for s in slots_of(e))
                if key not in keys:
                    keys[key] = offset + self.count + len(rows)
                    rows.append(m)
                self.positions[-1][m] = keys[key]
            self._rows.append(torch.tensor(rows, dtype=torch.int64))
            self.count += len(rows)
        self.flags = part.on_device if made.device.contributions else []
        if self.flags:
            self.positions.append({m: offset + self.count + k for k, m in enumerate(self.flags)})
        self.count += len(self.flags)

    def evaluate(self, values: Values, active: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """The packed pieces, and the new values of what the host writes (0-dim or one per member)."""
        found, advanced = self.made.host_values({s: c.of(values) for s, c in self._columns.items()})
        pieces = [
            (v.expand(len(rows)) if v.ndim == 0 else v[rows]).double()
            for v, rows in zip(found, self._rows, strict=True)
        ]
        return [*pieces, torch.tensor([float(active[m]) for m in self.flags], dtype=torch.float64)], advanced


class _Column:
    """A scalar slot over all members: one 0-dim tensor where they share it, else one value per member."""

    def __init__(self, indices: list[int], leaves: Sequence[Leaf]) -> None:
        self._indices = indices[:1] if len(set(indices)) == 1 else indices
        numbers = [leaves[i].value if leaves[i].kind == "constant" else None for i in self._indices]
        self._numbers = [None if n is None else torch.tensor(n, dtype=torch.float64) for n in numbers]

    def of(self, values: Values) -> Tensor:
        given = [values[i] if n is None else n for i, n in zip(self._indices, self._numbers, strict=True)]
        column = torch.stack([t.detach() for t in given if t is not None]).double().cpu()
        return column[0] if len(self._indices) == 1 else column


class Binder:
    """The inputs of the graph in order: every tensor leaf, then one packed vector per dtype of numbers."""

    def __init__(self, leaves: Sequence[Leaf], parts: Sequence[Part]) -> None:
        self._leaves = leaves
        self._parts = parts
        self.tensor_inputs: dict[int, Key] = {}
        self.number_inputs: dict[torch.dtype, int] = {}
        self.numbers: list[list[Numbers]] = []
        self.outputs: list[int] = []
        for part in parts:
            self._add_tensors(part)
            dtype = npu_emit.wide_dtype(part.group.formula)
            self.numbers.append([])
            for made in part.splits:
                offset = self.number_inputs.get(dtype, 0)
                numbers = Numbers(part, made, leaves, offset)
                self.numbers[-1].append(numbers)
                if numbers.count:
                    self.number_inputs[dtype] = offset + numbers.count
        written = {m[s] for part in parts for m in part.group.members for s in part.group.formula.written}
        self._written = written & self.tensor_inputs.keys()
        self.written = [place for place, i in enumerate(self.tensor_inputs) if i in written]
        """Which inputs the graph writes to."""
        self._scratch: dict[Key, Tensor] = {}
        self._apart: dict[int, int] = {}  # where the tensors lay when they were last found to share no memory

    def _add_tensors(self, part: Part) -> None:
        for m in part.on_device:
            for s in part.group.formula.tensor_slots:
                i = part.group.members[m][s]
                leaf = self._leaves[i]
                if leaf.kind == "output":
                    self.outputs.append(i)
                else:
                    self.tensor_inputs[i] = (math.prod(leaf.shape), part.group.formula.slots[s].dtype, leaf.device)

    def bind(self, values: Values, complete: bool) -> Step:
        """This step's inputs of the graph.

        Raises:
            Mismatch: a tensor is not what the graph was made for; nothing was changed.
        """
        step = Step()
        flat: dict[int, Tensor] = {}
        packed: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in self.number_inputs}
        for part, all_numbers in zip(self._parts, self.numbers, strict=True):
            active = [self._takes_part(member, values) for member in part.group.members]
            for m in part.on_device:
                self._bind_member(part, m, active[m], values, flat, step, complete)
            for numbers in all_numbers:
                pieces, advanced = numbers.evaluate(values, active)
                if numbers.count:
                    packed[npu_emit.wide_dtype(part.group.formula)] += pieces
                step.advanced += [
                    (part, s, new, active) for (s, _), new in zip(numbers.made.advanced, advanced, strict=True)
                ]
            step.active.append(active)
        self._check_memory(step)
        step.inputs = [flat[i] for i in self.tensor_inputs] + [torch.cat(p).to(dtype) for dtype, p in packed.items()]
        return step

    def _check_memory(self, step: Step) -> None:
        """Refuse memory that is written and used a second time: GE reads everything as it is before the step.

        Raises:
            Mismatch: two tensors share memory and at least one of them is written.
        """
        addresses = {i: t.data_ptr() for i, t in step.used.items()}
        if step.copies or addresses != self._apart:  # copies do not show where the originals lie, and how far they go
            written = [t for i, t in step.used.items() if i in self._written]
            check_apart(written, [t for i, t in step.used.items() if i not in self._written])
            self._apart = {} if step.copies else addresses

    def _takes_part(self, member: tuple[int, ...], values: Values) -> bool:
        return all(values[i] is not None for i in member if self._leaves[i].kind in ("input", "attribute"))

    def _bind_member(
        self, part: Part, m: int, active: bool, values: Values, flat: dict[int, Tensor], step: Step, complete: bool
    ) -> None:
        member, formula = part.group.members[m], part.group.formula
        inputs = [s for s in formula.tensor_slots if member[s] in self.tensor_inputs]
        strides = memory_order([t for s in inputs if (t := values[member[s]]) is not None])
        for s in formula.tensor_slots:  # a tensor may belong to two groups
            if step.orders.setdefault(member[s], (active, strides)) != (active, strides):
                raise Mismatch("two updates of one tensor disagree on its memory order, or one of them is left out")
        for s in inputs:
            key, t = self.tensor_inputs[member[s]], values[member[s]]
            if not active or t is None:
                if key not in self._scratch:
                    self._scratch[key] = torch.zeros(key[0], dtype=key[1], device=key[2])
                flat[member[s]] = self._scratch[key]
                continue
            if t.numel() != key[0] or t.layout is not torch.strided or t.device != key[2]:
                raise Mismatch("a tensor has another size, layout or device than when the step was compiled")
            if complete and t.dtype != key[1]:
                raise Mismatch(f"a tensor is {t.dtype}; the graph was compiled for {key[1]}")
            dense = step.used[member[s]] = t.detach()
            if not in_order(dense, strides):
                step.copies += 1
                dense = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(dense)
                if s in formula.written:
                    step.copy_back.append((t, dense))
            flat[member[s]] = dense.as_strided((key[0],), (1,))

    def finish(self, step: Step, values: Values, results: Sequence[Tensor]) -> None:
        """Write what the host writes, give new tensors their shape, and tell autograd what changed."""
        for target, dense in step.copy_back:
            target.detach().copy_(dense)
        for i, result in zip(self.outputs, results, strict=True):
            values[i] = result.as_strided(self._leaves[i].shape, step.orders[i][1])
        for part, slot, value, active in step.advanced:
            self._write(part, slot, value, active, values)
        for part, active in zip(self._parts, step.active, strict=True):
            members = [m for m, a in zip(part.group.members, active, strict=True) if a]
            for i in (m[s] for s in part.group.formula.written for m in members):
                if self._leaves[i].kind == "output" and values[i] is None:
                    values[i] = torch.empty(self._leaves[i].shape, dtype=self._leaves[i].dtype)
            changed = [m[s] for s in part.group.formula.written for m in members if m[s] in self.tensor_inputs]
            torch.autograd.graph.increment_version([t for i in changed if (t := values[i]) is not None])

    def _write(self, part: Part, slot: int, value: Tensor, active: Sequence[bool], values: Values) -> None:
        """New values of a 0-dim state of all active members."""
        targets, sources = [], []
        for member, new, a in zip(part.group.members, value.expand(len(active)).unbind(), active, strict=True):
            if self._leaves[member[slot]].kind == "output":
                values[member[slot]] = new.to(self._leaves[member[slot]].dtype).clone()
            elif a and (target := values[member[slot]]) is not None:
                targets.append(target)
                sources.append(new)
        if targets:
            torch._foreach_copy_(targets, sources)


class Step:
    """One call: the graph's inputs, and what is left to do after it ran."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.used: dict[int, Tensor] = {}  # the tensors behind the inputs, of members that take part
        self.copies = 0
        self.orders: dict[int, tuple[bool, tuple[int, ...]]] = {}  # per tensor: takes part, strides it is read in
        self.active: list[list[bool]] = []
        self.copy_back: list[tuple[Tensor, Tensor]] = []
        self.advanced: list[tuple[Part, int, Tensor, list[bool]]] = []
