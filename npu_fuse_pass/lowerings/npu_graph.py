"""The graph that the NPU program gives to torchair: 1-D tensors and packed numbers, fused nodes, `copy_` at the end."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir import Leaf
from ..ops import multi_tensor_contribute, multi_tensor_update, parsed
from . import npu_emit

if TYPE_CHECKING:
    from .npu import Part
    from .npu_bind import Binder, Numbers

_MEMBERS = 32  # per fused node: torchair formats a node's whole list for every element that is taken from it
_SCHEMA = "(Tensor[] tensors, Tensor[] numbers, Tensor[] totals, int[] positions, int members, str formula) -> Tensor[]"

_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define(f"device_update{_SCHEMA}")
_library.define(f"device_contribute{_SCHEMA}")
device_update = torch.ops.npu_fused.device_update.default
"""`multi_tensor_update` whose scalars are `numbers[p] for p in positions`, then `totals`."""
device_contribute = torch.ops.npu_fused.device_contribute.default
"""`multi_tensor_contribute` likewise, with results of the dtype that the device adds up in."""


def _update(
    tensors: list[Tensor], numbers: list[Tensor], totals: list[Tensor], positions: list[int], members: int, formula: str
) -> list[Tensor]:
    scalars = [*(numbers[p] for p in positions), *totals]
    return multi_tensor_update(tensors, scalars, members, formula)  # type: ignore[no-any-return]


def _contribute(
    tensors: list[Tensor], numbers: list[Tensor], totals: list[Tensor], positions: list[int], members: int, formula: str
) -> list[Tensor]:
    scalars = [*(numbers[p] for p in positions), *totals]
    dtype = npu_emit.wide_dtype(parsed(formula))
    return [t.to(dtype) for t in multi_tensor_contribute(tensors, scalars, members, formula)]


for _name, _kernel in {"device_update": _update, "device_contribute": _contribute}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"npu_fused::{_name}", _kernel, lib=_library)


def build(leaves: Sequence[Leaf], parts: Sequence[Part], binder: Binder) -> fx.GraphModule:
    """The graph of a step. Placeholders carry fake tensors in `meta["val"]`."""
    return _Build(leaves, parts, binder).module()


class _Build:
    def __init__(self, leaves: Sequence[Leaf], parts: Sequence[Part], binder: Binder) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._leaves, self._parts, self._binder = leaves, parts, binder
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        with FakeTensorMode():
            for i, (numel, dtype, device) in binder.tensor_inputs.items():
                name = "".join(c if c.isalnum() else "_" for c in leaves[i].name)
                self._nodes[i] = self._graph.placeholder(name)
                self._nodes[i].meta["val"] = torch.empty(numel, dtype=dtype, device=device)
            packed = {dtype: self._graph.placeholder("numbers") for dtype in binder.number_inputs}
            for dtype, node in packed.items():
                node.meta["val"] = torch.empty(binder.number_inputs[dtype], dtype=dtype)
        unbind = torch.ops.aten.unbind.int
        self._numbers = {dtype: self._graph.call_function(unbind, (node,)) for dtype, node in packed.items()}

    def module(self) -> fx.GraphModule:
        totals = self._totals()
        copies: list[tuple[fx.Node, fx.Node]] = []
        outputs: dict[int, fx.Node] = {}
        for part, numbers in zip(self._parts, self._binder.numbers, strict=True):
            made = part.splits[0]
            slots = [made.tensor_slots[s] for s in made.device.written]
            for (slot, m), value in self._fused(device_update, part, numbers[0], slots, totals):
                leaf = part.group.members[m][slot]
                if leaf in self._nodes:
                    copies.append((self._nodes[leaf], value))
                else:
                    outputs[leaf] = value
        for target, value in copies:
            self._graph.call_function(torch.ops.aten.copy_.default, (target, value))
        self._graph.output(tuple(outputs[i] for i in self._binder.outputs))
        return fx.GraphModule(torch.nn.Module(), self._graph, "NpuStep")

    def _totals(self) -> dict[int, fx.Node]:
        """For every total: the sum of what all members contribute."""
        terms: dict[int, list[fx.Node]] = {}
        for part, numbers in zip(self._parts, self._binder.numbers, strict=True):
            if len(part.splits) > 1:
                kinds = list(range(len(part.group.formula.contributions)))
                for (kind, m), value in self._fused(device_contribute, part, numbers[1], kinds, {}):
                    terms.setdefault(part.group.totals[m][kind], []).append(value)
        if terms and len({npu_emit.wide_dtype(p.group.formula) for p in self._parts}) > 1:
            raise Unsupported("total", "adds up over float64 and other parameters")
        stacked = {n: self._graph.call_function(torch.ops.aten.stack.default, (t,)) for n, t in terms.items()}
        return {n: self._graph.call_function(torch.ops.aten.sum.default, (s,)) for n, s in stacked.items()}

    def _fused(
        self, target: Any, part: Part, numbers: Numbers, kinds: Sequence[int], totals: dict[int, fx.Node]
    ) -> list[tuple[tuple[int, int], fx.Node]]:
        """Fused nodes of a group; every result with its kind (a written slot, a contribution) and member."""
        made = numbers.made
        packed: Any = self._numbers.get(npu_emit.wide_dtype(part.group.formula), [])
        found: list[tuple[tuple[int, int], fx.Node]] = []
        for begin in range(0, len(part.on_device) if kinds else 0, _MEMBERS):
            chunk = part.on_device[begin : begin + _MEMBERS]
            members = [part.group.members[m] for m in chunk]
            tensors = [self._tensor(part, member, s) for s in made.tensor_slots for member in members]
            positions = [at[m] for at in numbers.positions for m in chunk]
            sums = [totals[self._leaves[member[s]].index] for s in made.device_slots for member in members]
            args = (tensors, packed, sums, positions, len(members), made.device.text)
            node = self._graph.call_function(target, args)
            node.name = f"{part.group.name}_{target.name().split('_')[-1]}"
            for i, (kind, m) in enumerate((kind, m) for kind in kinds for m in chunk):
                found.append(((kind, m), self._graph.call_function(operator.getitem, (node, i))))
        return found

    def _tensor(self, part: Part, member: tuple[int, ...], slot: int) -> fx.Node:
        """A member's tensor; for one that the step creates, another of the member, which has its size."""
        if member[slot] in self._nodes:
            return self._nodes[member[slot]]
        return next(self._nodes[member[s]] for s in part.group.formula.tensor_slots if member[s] in self._nodes)
