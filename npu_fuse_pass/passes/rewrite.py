"""Stage 4: the graph with one multi-tensor node per group: functional nodes, then `copy_` for every write.

The result is an ordinary FX graph module: it prints, runs (through the nodes' reference kernels) and converts through
torchair. It holds no tensors: what the original read as an attribute is an argument here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.ir.fused_op import multi_tensor_contribute, multi_tensor_update
from npu_fuse_pass.ir.totals import rounds
from npu_fuse_pass.ir.types import Call, Group, Grouped, Leaf, LeafRef

# leaves that the step creates
_MADE = ("output", "temporary")


def rewrite(step: Grouped) -> fx.GraphModule:
    """Build the fused graph; its arguments are the leaves of kind "input" and "attribute", in order."""
    return _Rewriting(step.leaves).module(step)


def argument_name(leaf: Leaf) -> str:
    """The name of a leaf as an argument of the fused graph."""
    return leaf.name.replace("[", "_").replace("]", "").replace(".", "_")


class _Rewriting:
    """The fused graph under construction, with the nodes that hold leaves' values, and what it returns."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._graph = fx.Graph()
        self._call = self._graph.call_function
        self._outputs: dict[int, fx.Node] = {}
        given = {i: leaf for i, leaf in enumerate(leaves) if leaf.kind in ("input", "attribute")}
        self._nodes = {i: self._graph.placeholder(argument_name(leaf)) for i, leaf in given.items()}
        self._nodes |= {i: self._number(leaf.value) for i, leaf in enumerate(leaves) if leaf.kind == "constant"}

    def module(self, step: Grouped) -> fx.GraphModule:
        for segment in step.segments:
            self._add_totals(segment.groups)
            self._add_groups(segment.groups)
            for call in segment.calls:
                self._add_call(call)
        self._add_totals(step.groups)
        writes = self._add_groups(step.groups)
        for target, value in [*((self._nodes[leaf], self._nodes[result]) for leaf, result in step.stores), *writes]:
            self._call(torch.ops.aten.copy_.default, (target, value))
        self._graph.output(tuple(self._outputs[i] for i in sorted(self._outputs)))
        return fx.GraphModule(torch.nn.Module(), self._graph, "FusedStep")

    def _add_groups(self, groups: Sequence[Group]) -> list[tuple[fx.Node, fx.Node]]:
        """Add groups. Returns leaves and their new values, to be copied; others go to where they are looked up."""
        copies: list[tuple[fx.Node, fx.Node]] = []
        for group in groups:
            node = self._fused(multi_tensor_update, group, self._nodes, group.name)
            for k, slot in enumerate(group.formula.written):
                for m, member in enumerate(group.members):
                    value = self._call(operator.getitem, (node, k * len(group.members) + m))
                    leaf = self._leaves[member[slot]]
                    if not leaf.shape and leaf.dtype != torch.float64:  # scalars are computed in float64
                        value = self._call(torch.ops.prims.convert_element_type.default, (value, leaf.dtype))
                    if leaf.kind == "output":
                        self._outputs[leaf.index] = value
                    elif leaf.kind == "temporary":
                        self._nodes[member[slot]] = value
                    else:
                        copies.append((self._nodes[member[slot]], value))
        return copies

    def _add_call(self, call: Call) -> None:
        """Add an original operation, as it was."""

        def node_of(value: Any) -> Any:
            if not isinstance(value, LeafRef):
                return value
            node = self._nodes[value.index]
            return node if value.number is None else self._call(value.number, (node,))

        for source, holder in call.copies:
            self._nodes[holder] = self._call(torch.ops.aten.clone.default, (self._nodes[source],))
        args: Any = fx.node.map_aggregate(call.args, node_of)
        kwargs: Any = fx.node.map_aggregate(call.kwargs, node_of)
        if isinstance(call.target, str):
            node = self._graph.call_method(call.target, args, kwargs)
        else:
            node = self._call(call.target, args, kwargs)
        if call.number:
            node = self._number(node)
        for i, index in enumerate(call.results):
            self._nodes[index] = self._call(operator.getitem, (node, i)) if call.several else node
        for holder, result in call.written:
            self._nodes[result] = self._nodes[holder]

    def _number(self, value: float | fx.Node) -> fx.Node:
        return self._call(torch.ops.aten.scalar_tensor.default, (value,), {"dtype": torch.float64})

    def _empty(self, leaf: Leaf) -> fx.Node:
        made: dict[str, Any] = {"dtype": leaf.dtype, "device": leaf.device}
        return self._call(torch.ops.aten.empty.memory_format, (list(leaf.shape),), made)

    def _fused(self, target: Callable[..., Any], group: Group, nodes: dict[int, fx.Node], name: str) -> fx.Node:
        """A group's node; `nodes` hold what it reads."""
        formula, leaves = group.formula, self._leaves

        def source(member: tuple[int, ...], slot: int) -> fx.Node:
            if member[slot] in nodes:
                return nodes[member[slot]]
            # a tensor that this group creates: another one of the member gives its shape, else an empty one
            leaf = leaves[member[slot]]
            others = (i for i in (member[s] for s in formula.tensor_slots) if leaves[i].kind not in _MADE)
            given = next((nodes[i] for i in others if leaves[i].shape == leaf.shape), None)
            return self._empty(leaf) if given is None else given

        tensors = [source(m, s) for s in formula.tensor_slots for m in group.members]
        never_read = self._number(0.0)  # stands for 0-dim tensors that the step creates
        scalars = [nodes.get(m[s], never_read) for s in formula.scalar_slots for m in group.members]
        node = self._call(target, (tensors, scalars, len(group.members), formula.text))
        node.name = name
        return node

    def _add_totals(self, groups: Sequence[Group]) -> None:
        """Add the totals to which these groups contribute: sums of what their members contribute."""
        sums: dict[int, fx.Node] = {}
        totals = {i: leaf.index for i, leaf in enumerate(self._leaves) if leaf.kind == "total"}
        for _ in range(rounds(groups, self._leaves)):
            # in the first round the slots of totals hold zeros; what depends on another total is right in a later one
            known = {i: sums[number] if number in sums else self._number(0.0) for i, number in totals.items()}
            parts: dict[int, list[fx.Node]] = {}
            for group in (g for g in groups if g.formula.contributions):
                node = self._fused(multi_tensor_contribute, group, known | self._nodes, f"{group.name}_contribute")
                for k in range(len(group.formula.contributions)):
                    for m, numbers in enumerate(group.totals):
                        value = self._call(operator.getitem, (node, k * len(group.members) + m))
                        parts.setdefault(numbers[k], []).append(value)
            for number, values in parts.items():
                stacked = self._call(torch.ops.aten.stack.default, (values,))
                sums[number] = self._call(torch.ops.aten.sum.default, (stacked,))
        self._nodes |= {i: sums[number] for i, number in totals.items() if number in sums}
