"""The NPU program's graph for torchair: 1-D tensors and packed numbers, fused nodes, writes at the end.

It has few nodes, because torchair takes most of a millisecond for each (fake tensors, patterns, texts for a log that
nothing may read): a group is one fused node, whose list of new values goes as it is to one that writes it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.fused_op import multi_tensor_contribute, multi_tensor_update, parsed
from npu_fuse_pass.ir.types import Leaf
from npu_fuse_pass.lowerings.npu.emit import dedicated, elementwise, list_operations
from npu_fuse_pass.lowerings.npu.fakes import FakeTensor, FakeTensorMode, no_dispatch
from npu_fuse_pass.lowerings.npu.graph import generated
from npu_fuse_pass.lowerings.npu.graph import names as npu_names
from npu_fuse_pass.lowerings.npu.host.numbers import PackedNumbers
from npu_fuse_pass.lowerings.npu.host.step import Leaves
from npu_fuse_pass.lowerings.npu.kernels.launch import Cluster
from npu_fuse_pass.lowerings.npu.layout.bind import Binder
from npu_fuse_pass.lowerings.npu.lowered_group import LoweredGroup
from npu_fuse_pass.lowerings.npu.plan import Span
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.memory import copy_each

_TAKEN = list_operations.LONGEST  # results taken one by one: torchair formats the whole list for each
_SCHEMA = "(Tensor[] tensors, Tensor[] numbers, Tensor[] totals, int[] positions, int members, str formula) -> Tensor[]"

_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define(f"device_update{_SCHEMA}")
_library.define(f"device_contribute{_SCHEMA}")
_library.define(f"device_lists{_SCHEMA}")
_library.define(f"device_dedicated{_SCHEMA.replace('str formula', 'str formula, str call, int[] written')}")
_library.define("device_write(Tensor(a!)[] targets, Tensor[] values) -> ()")
device_update = torch.ops.npu_fused.device_update.default
"""`multi_tensor_update` whose scalars are `numbers[p] for p in positions`, then `totals`."""
device_contribute = torch.ops.npu_fused.device_contribute.default
"""`multi_tensor_contribute` likewise, with results in the device's dtype of sums."""
device_lists = torch.ops.npu_fused.device_lists.default
"""`device_update` by operations on lists; numbers have shape (1,)."""
device_dedicated = torch.ops.npu_fused.device_dedicated.default
"""`device_update` by one operation: the formula's contributions are its operands, numbers have shape (1,). `call` and
`written` as in `dedicated.Emitter`.
"""
device_write = torch.ops.npu_fused.device_write.default
"""`copy_` of every value to its target: `_foreach_copy_` by a name that does not end in "_", since torchair takes the
first argument of such operations for one tensor.
"""


def packed(compute: Callable[..., Any]) -> Callable[..., Any]:
    """What computes a node with packed numbers, made of what is given the scalars themselves."""

    def unpacking(tensors: Any, numbers: Sequence[Any], totals: Sequence[Any], positions: list[int], *own: Any) -> Any:
        return compute(tensors, [*(numbers[p] for p in positions), *totals], *own)

    return unpacking


def _contribute(tensors: list[Tensor], scalars: list[Tensor], members: int, formula: str) -> list[Tensor]:
    dtype = elementwise.wide_dtype(parsed(formula))
    return [t.to(dtype) for t in multi_tensor_contribute(tensors, scalars, members, formula)]


def _dedicated(
    tensors: list[Tensor], scalars: list[Tensor], members: int, formula: str, call: str, written: list[int]
) -> list[Tensor]:
    rows = [
        dedicated.evaluate(parsed(formula), call, written, tensors[m::members], scalars[m::members])
        for m in range(members)
    ]
    return [row[k] for k in range(len(written)) for row in rows]


def _fake_dedicated(
    tensors: list[FakeTensor], scalars: list[Tensor], members: int, formula: str, call: str, written: list[int]
) -> list[Tensor]:
    """Fake results without the arithmetic, which would be most of a conversion's time."""
    made = parsed(formula)
    rank = {s: i for i, s in enumerate(made.tensor_slots)}
    of_slot = [(made.slots[s].dtype, tensors[rank[s] * members : (rank[s] + 1) * members]) for s in written]
    with no_dispatch():
        return [_empty(t.fake_mode, t.numel(), dtype, t.device) for dtype, each in of_slot for t in each]


def _empty(mode: FakeTensorMode, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` in the mode without the dispatcher, in a third of the time."""
    return FakeTensor(mode, torch.empty(numel, dtype=dtype, device="meta"), device)


def _fake_write(targets: list[Tensor], values: list[Tensor]) -> None:
    """Do nothing: targets keep their size and dtype."""


_update, _contributed = packed(multi_tensor_update), packed(_contribute)
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "device_update": (_update, _update),  # they have fakes of their own
    "device_lists": (_update, _update),
    "device_contribute": (_contributed, _contributed),
    "device_dedicated": (packed(_dedicated), packed(_fake_dedicated)),
    "device_write": (copy_each, _fake_write),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"npu_fused::{_name}", _fake, lib=_library)


def build(
    leaves: Sequence[Leaf],
    groups: Sequence[LoweredGroup],
    binder: Binder,
    clusters: Mapping[str, Cluster] | None = None,
) -> fx.GraphModule:
    """Build the graph of a step. Placeholders carry fake tensors in `meta["val"]`.

    Args:
        clusters: of groups with generated kernels, by the names of `generated.known`.
    """
    return _Build(leaves, groups, binder).module(clusters or {})


class _Build:
    def __init__(self, leaves: Sequence[Leaf], groups: Sequence[LoweredGroup], binder: Binder) -> None:
        self._leaves, self._groups, self._binder = leaves, groups, binder
        self._graph = fx.Graph()
        self._nodes: dict[Leaves, fx.Node] = {}
        self._gathered: dict[tuple[Leaves, ...], fx.Node] = {}
        mode = FakeTensorMode()
        mode.cache_enabled = False  # its keys, over thousands of tensors of a node, take longer than the fakes
        for key, (numel, dtype, device) in binder.tensor_inputs.items():
            name = "".join(c if c.isalnum() else "_" for c in leaves[key[0]].name)
            self._nodes[key] = self._graph.placeholder(name)
            self._nodes[key].meta["val"] = _empty(mode, numel, dtype, device)
        names = {dtype: "numbers" if k == 0 else f"numbers_{k}" for k, dtype in enumerate(binder.number_inputs)}
        packed = {dtype: self._graph.placeholder(name) for dtype, name in names.items()}
        for dtype, node in packed.items():
            node.meta["val"] = _empty(mode, binder.number_inputs[dtype], dtype, binder.numbers_on)
        self._packed = packed
        self._unpacked: dict[tuple[torch.dtype, bool], fx.Node] = {}

    def module(self, clusters: Mapping[str, Cluster]) -> fx.GraphModule:
        totals = self._totals()
        writes: list[tuple[list[fx.Node], Any]] = []
        outputs: dict[int, fx.Node] = {}
        for lowered, numbers in self._of_operations():
            made = lowered.splits[0]
            target: Any = device_lists if lowered.in_lists else device_update
            target = target if lowered.dedicated is None else device_dedicated
            for node, results in self._fused(target, lowered, numbers[0], made.written, totals):
                keys = [key for slot, span in results for key in self._binder.inputs_of(lowered, span, slot)]
                outputs |= {key[0]: _taken(node, i) for i, key in enumerate(keys) if key not in self._nodes}
                written = [i for i, key in enumerate(keys) if key in self._nodes]
                if written:
                    values = node if len(written) == len(keys) else [_taken(node, i) for i in written]
                    writes.append(([self._nodes[keys[i]] for i in written], values))
        writes += [self._node(name, cluster) for name, cluster in clusters.items()]
        for write in writes:
            self._graph.call_function(device_write, write)
        self._graph.output(tuple(outputs[i] for i in self._binder.outputs))
        return fx.GraphModule(torch.nn.Module(), self._graph, "NpuStep")

    def _of_operations(self) -> Iterator[tuple[LoweredGroup, list[PackedNumbers]]]:
        """The groups that GE operations compute, with the places of their numbers."""
        for lowered, numbers in zip(self._groups, self._binder.numbers, strict=True):
            packed = [n for n in numbers if isinstance(n, PackedNumbers)]
            if lowered.generated is None:
                yield lowered, packed

    def _node(self, name: str, cluster: Cluster) -> tuple[list[fx.Node], Any]:
        """Add the node of generated kernels. Returns the written nodes, and the node: the list of new values."""
        written, read = (
            [self._nodes[(made.group.members[m][s],)] for made, s, m in cluster.leaves(kind)] for kind in (True, False)
        )
        args = (written, read, self._packed[torch.float32], name)
        node = self._graph.call_function(generated.generated_update, args)
        node.name = cluster.name
        npu_names.mark(node, cluster.name)
        return written, node

    def _totals(self) -> dict[int, fx.Node]:
        """Sum the contributions of all members, for every total."""
        terms: dict[int, list[fx.Node]] = {}
        for lowered, numbers in self._of_operations():
            if len(lowered.splits) > 1:
                kinds = list(range(len(lowered.group.formula.contributions)))
                for node, results in self._fused(device_contribute, lowered, numbers[1], kinds, {}):
                    for i, (kind, span) in enumerate(results):
                        terms.setdefault(lowered.group.totals[span.members[0]][kind], []).append(_taken(node, i))
        if terms and len({elementwise.wide_dtype(p.group.formula) for p in self._groups}) > 1:
            raise Unsupported("total", "adds up over float64 and other parameters", Code.ACROSS_PARAMETERS)
        stacked = {n: self._graph.call_function(torch.ops.aten.stack.default, (t,)) for n, t in terms.items()}
        return {n: self._graph.call_function(torch.ops.aten.sum.default, (s,)) for n, s in stacked.items()}

    def _fused(
        self,
        target: Any,
        lowered: LoweredGroup,
        numbers: PackedNumbers,
        kinds: Sequence[int],
        totals: dict[int, fx.Node],
    ) -> Iterator[tuple[fx.Node, list[tuple[int, Span]]]]:
        """Add the fused nodes of a group, each with the kind (written slot, contribution) and span of its results."""
        made = numbers.made
        call: tuple[Any, ...] = ()
        if target is device_dedicated and lowered.dedicated is not None:
            call = (lowered.dedicated.call, list(lowered.dedicated.written))
        one_dim = target in (device_dedicated, device_lists)
        packed = self._unpack(elementwise.wide_dtype(lowered.group.formula), one_dim)
        one_by_one = target is device_contribute or self._binder.outputs
        size = _TAKEN if one_by_one else max(1, len(lowered.plan.spans))
        for begin in range(0, len(lowered.plan.spans) if kinds else 0, size):
            spans = lowered.plan.spans[begin : begin + size]
            firsts = [lowered.group.members[span.members[0]] for span in spans]
            tensors = [self._tensor(lowered, span, s) for s in made.tensor_slots for span in spans]
            positions = [p for at in numbers.positions for p in at[begin : begin + size]]
            sums = [totals[self._leaves[member[s]].index] for s in made.device_slots for member in firsts]
            if target is device_lists:
                view = functools.cache(lambda n: self._graph.call_function(torch.ops.aten.view.default, (n, [1])))
                sums = list(map(view, sums))
            args = (tensors, packed, sums, positions, len(spans), made.device.text, *call)
            node = self._graph.call_function(target, args)
            node.name = f"{lowered.group.name}_{target.name().split('_')[-1]}"
            npu_names.mark(node, lowered.group.name)
            yield node, [(kind, span) for kind in kinds for span in spans]

    def _unpack(self, dtype: torch.dtype, one_dim: bool) -> Any:
        """The numbers as 0-dim tensors, or as tensors of shape (1,)."""
        packed = self._packed.get(dtype)
        if packed is not None and (dtype, one_dim) not in self._unpacked:
            aten = torch.ops.aten
            if one_dim:
                packed = self._graph.call_function(aten.view.default, (packed, [self._binder.number_inputs[dtype], 1]))
            self._unpacked[dtype, one_dim] = self._graph.call_function(aten.unbind.int, (packed,))
        return self._unpacked.get((dtype, one_dim), [])

    def _tensor(self, lowered: LoweredGroup, span: Span, slot: int) -> fx.Node:
        """A span's tensor; for one that the step creates, another tensor of the member, or an empty one of its size."""
        keys = self._binder.inputs_of(lowered, span, slot)
        if len(keys) > 1:
            if tuple(keys) not in self._gathered:
                given = [self._nodes[key] for key in keys]
                self._gathered[tuple(keys)] = self._graph.call_function(torch.ops.aten.cat.default, (given,))
            return self._gathered[tuple(keys)]
        if keys[0] in self._nodes:
            return self._nodes[keys[0]]
        member = lowered.group.members[span.members[0]]
        for key in ((member[s],) for s in lowered.group.formula.tensor_slots):
            if key in self._nodes:
                return self._nodes[key]
        leaf = self._leaves[keys[0][0]]
        made: dict[str, Any] = {"dtype": leaf.dtype, "device": leaf.device}
        return self._graph.call_function(torch.ops.aten.empty.memory_format, ([math.prod(leaf.shape)],), made)


def _taken(node: fx.Node, i: int) -> fx.Node:
    return node.graph.call_function(operator.getitem, (node, i))
