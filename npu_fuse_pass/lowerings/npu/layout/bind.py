"""Inputs and outputs of the NPU program's graph at every step: tensors as flat views, numbers packed.

A member without a gradient takes part with scratch tensors in place of its own, so that one graph serves every
pattern of missing gradients and nothing of that member changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch
from npu_fuse_pass.ir.types import Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.host.numbers import NumberTable, PackedNumbers
from npu_fuse_pass.lowerings.npu.host.scalars import picked
from npu_fuse_pass.lowerings.npu.host.step import HostStep, Key, Leaves
from npu_fuse_pass.lowerings.npu.layout.binding_cache import BindingCache
from npu_fuse_pass.lowerings.npu.lowered_group import LoweredGroup
from npu_fuse_pass.lowerings.npu.plan import Span
from npu_fuse_pass.tensors.memory import aligned, check_apart, in_order, memory_order


class Binder:
    """The inputs of the graph in order: its tensors, then one packed vector per dtype of numbers.

    Attributes:
        tensor_inputs: for each, the leaves behind it; size, dtype and device.
        number_inputs: count of numbers by dtype.
        numbers_on: their device: the host, from where GE fetches them, or the device of states that the host advances,
            so that a step needs one transfer.
        numbers: per group and split: their places in the vector.
        outputs: the leaves that the graph creates.
        written: which inputs the graph writes to.
    """

    def __init__(self, leaves: Sequence[Leaf], groups: Sequence[LoweredGroup]) -> None:
        self._leaves = leaves
        self._groups = groups
        self.tensor_inputs: dict[Leaves, Key] = {}
        self.number_inputs: dict[torch.dtype, int] = {}
        self.numbers: list[list[PackedNumbers | NumberTable]] = []
        self.outputs: list[int] = []
        for lowered in groups:
            self._add_tensors(lowered)
            dtype = elementwise.wide_dtype(lowered.group.formula)
            self.numbers.append([])
            for made in lowered.splits:
                offset = self.number_inputs.get(dtype, 0)
                numbers: PackedNumbers | NumberTable = PackedNumbers(lowered.group, made, lowered.plan.spans, offset)
                if lowered.generated is not None:
                    numbers = NumberTable(lowered.group, made, offset)
                self.numbers[-1].append(numbers)
                if numbers.count:
                    self.number_inputs[dtype] = offset + numbers.count
        written = {m[s] for lowered in groups for m in lowered.group.members for s in lowered.group.formula.written}
        self._written = {key for key in self.tensor_inputs if written & set(key)}
        self.written = [place for place, key in enumerate(self.tensor_inputs) if key in self._written]
        self._bound = {i for key in self.tensor_inputs for i in key}
        self.numbers_on = numbers_on(leaves, groups, {device for _, _, device in self.tensor_inputs.values()})
        self._scratch: dict[Key, Tensor] = {}
        scalars = {
            m[s] for lowered in groups for m in lowered.group.members for s in lowered.group.formula.scalar_slots
        }
        scalars -= self._bound
        in_memory = (i for i in sorted(scalars) if leaves[i].kind not in ("constant", "total"))
        self._numbers = {i: i in written for i in in_memory}
        self._cache = BindingCache(self.tensor_inputs, self._written, self._numbers)
        self._changes = [self._changes_of(lowered, lowered.group.members) for lowered in groups]

    def inputs_of(self, lowered: LoweredGroup, span: Span, slot: int) -> list[Leaves]:
        """The graph's inputs for a slot of a span: one, or where they are gathered, one of each member."""
        leaves = [lowered.group.members[m][slot] for m in span.members]
        return [(i,) for i in leaves] if slot in span.gathered else [tuple(leaves)]

    def _add_tensors(self, lowered: LoweredGroup) -> None:
        for span in lowered.plan.spans:
            for s in lowered.group.formula.tensor_slots:
                for key in self.inputs_of(lowered, span, s):
                    if self._leaves[key[0]].kind == "output" and lowered.generated is None:
                        self.outputs += key
                    else:
                        size = sum(math.prod(self._leaves[i].shape) for i in key)
                        dtype, device = lowered.group.formula.slots[s].dtype, self._leaves[key[0]].device
                        self.tensor_inputs[key] = (size, dtype, device)
        for i in (m[s] for m in lowered.group.members for s in lowered.states):
            self.tensor_inputs[(i,)] = (1, self._leaves[i].dtype, self._leaves[i].device)

    def bind(self, step: HostStep, values: LeafValues) -> None:
        """Add the inputs of the graph to a step.

        Raises:
            Mismatch: a tensor is not what the graph was made for; nothing was changed.
        """
        if not self._cache.bind(step, values):
            self._bind_one_by_one(step, values)
            self._cache.learn(step, values)
        packed: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in self.number_inputs}
        groups = zip(self._groups, self.numbers, step.numbers, step.active, strict=True)
        for lowered, places, found, active in groups:
            for numbers, given in zip(places, found, strict=True):
                if numbers.count:
                    packed[elementwise.wide_dtype(lowered.group.formula)] += numbers.pieces(given, active)
        vectors = [torch.cat(p).to(dtype) for dtype, p in packed.items()]
        on_host = self.numbers_on.type == "cpu"
        step.inputs += vectors if on_host else [step.send(v, self.numbers_on) for v in vectors]

    def _bind_one_by_one(self, step: HostStep, values: LeafValues) -> None:
        """Bind the general way, checking every tensor.

        GE reads everything as it is before the step: memory that is written must not be used a second time.
        """
        for lowered, active in zip(self._groups, step.active, strict=True):
            for span in lowered.plan.spans:
                self._bind_span(lowered, span, values, step, active)
            for m, takes_part in enumerate(active):
                for i in (lowered.group.members[m][s] for s in lowered.states):
                    self._bind_state(i, values[i], step, takes_part)
        found = [(t, key in self._written) for key, t in step.used.items()]
        found += [(t, written) for i, written in self._numbers.items() if (t := values[i]) is not None]
        check_apart([t for t, written in found if written], [t for t, written in found if not written])
        step.inputs = [step.flat[key] for key in self.tensor_inputs]

    def _bind_span(
        self, lowered: LoweredGroup, span: Span, values: LeafValues, step: HostStep, active: Sequence[bool]
    ) -> None:
        """Bind the inputs of a span. `Replanner` has checked that ungathered tensors are adjacent."""
        slots = lowered.group.formula.tensor_slots
        if len(span.members) == 1:
            self._bind_member(lowered, span.members[0], slots, values, step, active)
            return
        for m in span.members if span.gathered else ():
            self._bind_member(lowered, m, span.gathered, values, step, active)
        for s in (s for s in slots if s not in span.gathered):
            (key,) = self.inputs_of(lowered, span, s)
            first = values[key[0]]
            if active[span.members[0]] and first is not None:
                step.used[key] = step.flat[key] = first.detach().as_strided(self.tensor_inputs[key][:1], (1,))
            else:
                step.flat[key] = self._placeholder(self.tensor_inputs[key])

    def _bind_member(
        self,
        lowered: LoweredGroup,
        m: int,
        slots: Sequence[int],
        values: LeafValues,
        step: HostStep,
        active: Sequence[bool],
    ) -> None:
        """Bind the inputs for single tensors of a member."""
        member, formula = lowered.group.members[m], lowered.group.formula
        inputs = [s for s in formula.tensor_slots if self._leaves[member[s]].kind != "output"]
        given = [t for s in inputs if (t := values[member[s]]) is not None]
        strides = memory_order(given or [torch.empty(self._leaves[member[s]].shape, device="meta") for s in slots])
        for s in formula.tensor_slots:  # a tensor may belong to two groups
            if step.orders.setdefault(member[s], (active[m], strides)) != (active[m], strides):
                raise Mismatch("two updates of one tensor disagree on its memory order, or one of them is left out")
        for s in (s for s in slots if s not in inputs and lowered.generated is not None):
            self._bind_new(member[s], strides, step, active[m])
        for s in (s for s in slots if s in inputs):
            leaves, t = (member[s],), values[member[s]]
            key = self.tensor_inputs[leaves]
            if not active[m] or t is None:
                step.flat[leaves] = self._placeholder(key)
                continue
            if t.numel() != key[0] or t.layout is not torch.strided or t.device != key[2]:
                raise Mismatch("a tensor has another size, layout or device than when the step was compiled")
            if step.complete and t.dtype != key[1]:
                raise Mismatch(f"a tensor is {t.dtype}; the graph was compiled for {key[1]}")
            dense = step.used[leaves] = t.detach()
            if not (in_order(dense, strides) and aligned(dense)):
                step.copies += 1
                dense = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(dense)
                if s in formula.written:
                    step.copy_back.append((t, dense))
            step.flat[leaves] = dense.as_strided((key[0],), (1,))

    def _bind_state(self, i: int, t: Tensor | None, step: HostStep, active: bool) -> None:
        """Bind a 0-dim state that a generated kernel reads and writes."""
        if self._leaves[i].kind == "output":
            step.orders[i] = (active, ())
            self._bind_new(i, (), step, active)
        elif not active or t is None:
            step.flat[(i,)] = self._placeholder(self.tensor_inputs[(i,)])
        else:
            size, dtype, device = self.tensor_inputs[(i,)]
            if (t.numel(), t.dtype, t.device, t.layout) != (size, dtype, device, torch.strided):
                raise Mismatch("a 0-dim state has another dtype or device than when the step was compiled")
            if not aligned(t):
                raise Mismatch("the address of a 0-dim state is no multiple of its element's size")
            step.used[(i,)] = t.detach()
            step.flat[(i,)] = t.detach().as_strided((1,), (1,))

    def _bind_new(self, i: int, strides: tuple[int, ...], step: HostStep, active: bool) -> None:
        """Bind a tensor that the step makes, which a generated kernel writes as any other."""
        key, leaf = self.tensor_inputs[(i,)], self._leaves[i]
        step.copies += 1  # another one at every step
        if active:
            step.made[i] = torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=leaf.device)
            step.used[(i,)] = step.made[i]
        step.flat[(i,)] = step.made[i].as_strided((key[0],), (1,)) if active else self._placeholder(key)

    def _placeholder(self, key: Key) -> Tensor:
        if key not in self._scratch:
            self._scratch[key] = torch.zeros(key[0], dtype=key[1], device=key[2])
        return self._scratch[key]

    def finish(self, step: HostStep, values: LeafValues, results: Sequence[Tensor]) -> None:
        """Shape new tensors, and count writes for autograd."""
        for target, dense in step.copy_back:
            target.detach().copy_(dense)
        for i, result in zip(self.outputs, results, strict=True):
            values[i] = result.as_strided(self._leaves[i].shape, step.orders[i][1])
        for i, new in step.made.items():
            values[i] = new
        for lowered, active, changes in zip(self._groups, step.active, self._changes, strict=True):
            if not all(active):
                changes = self._changes_of(
                    lowered, [m for m, a in zip(lowered.group.members, active, strict=True) if a]
                )
            for i in (i for i in changes.made if values[i] is None):
                leaf = self._leaves[i]
                values[i] = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            torch.autograd.graph.increment_version([t for t in changes.bound(values) if t is not None])

    def _changes_of(self, lowered: LoweredGroup, members: Sequence[tuple[int, ...]]) -> _Changes:
        written = [m[s] for s in lowered.group.formula.written for m in members]
        made = [i for i in written if self._leaves[i].kind == "output"]
        return _Changes(made, picked([i for i in written if i in self._bound]))


def numbers_on(
    leaves: Sequence[Leaf], groups: Sequence[LoweredGroup], devices: Collection[torch.device]
) -> torch.device:
    """The device on which the numbers of a step enter. `devices`: of the graph's other inputs."""
    advanced = {
        m[s] for lowered in groups for m in lowered.group.members for made in lowered.splits for s, _ in made.advanced
    }
    found = {leaves[i].device for i in advanced if leaves[i].device.type != "cpu"}
    return found.pop() if found and found == set(devices) and len(found) == 1 else torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Writes of an update of some members: the leaves that the step makes, and the graph's inputs."""

    made: list[int]
    bound: Callable[[LeafValues], Sequence[Tensor | None]]
