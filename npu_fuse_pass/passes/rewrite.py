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
    leaves, groups = step.leaves, step.groups
    graph = fx.Graph()
    nodes = _leaf_nodes(graph, leaves)
    outputs: dict[int, fx.Node] = {}
    for segment in step.segments:
        _add_totals(graph, leaves, segment.groups, nodes)
        _group_nodes(graph, leaves, segment.groups, nodes, outputs)
        for call in segment.calls:
            _call_node(graph, call, nodes)
    _add_totals(graph, leaves, groups, nodes)
    writes = _group_nodes(graph, leaves, groups, nodes, outputs)
    for target, value in [*((nodes[leaf], nodes[result]) for leaf, result in step.stores), *writes]:
        graph.call_function(torch.ops.aten.copy_.default, (target, value))
    graph.output(tuple(outputs[i] for i in sorted(outputs)))
    return fx.GraphModule(torch.nn.Module(), graph, "FusedStep")


def argument_name(leaf: Leaf) -> str:
    """The name of a leaf as an argument of the fused graph."""
    return leaf.name.replace("[", "_").replace("]", "").replace(".", "_")


def _group_nodes(
    graph: fx.Graph,
    leaves: Sequence[Leaf],
    groups: Sequence[Group],
    nodes: dict[int, fx.Node],
    outputs: dict[int, fx.Node],
) -> list[tuple[fx.Node, fx.Node]]:
    """Nodes of groups: new values of leaves, to be copied; outputs and temporaries go to where they are looked up."""
    copies: list[tuple[fx.Node, fx.Node]] = []
    for group in groups:
        node = _group_node(graph, multi_tensor_update, group, nodes, group.name, leaves)
        for k, slot in enumerate(group.formula.written):
            for m, member in enumerate(group.members):
                value = graph.call_function(operator.getitem, (node, k * len(group.members) + m))
                leaf = leaves[member[slot]]
                if not leaf.shape and leaf.dtype != torch.float64:  # scalars are computed in float64
                    value = graph.call_function(torch.ops.prims.convert_element_type.default, (value, leaf.dtype))
                if leaf.kind == "output":
                    outputs[leaf.index] = value
                elif leaf.kind == "temporary":
                    nodes[member[slot]] = value
                else:
                    copies.append((nodes[member[slot]], value))
    return copies


def _call_node(graph: fx.Graph, call: Call, nodes: dict[int, fx.Node]) -> None:
    """An original operation, as it was."""

    def node_of(value: Any) -> Any:
        if not isinstance(value, LeafRef):
            return value
        node = nodes[value.index]
        return node if value.number is None else graph.call_function(value.number, (node,))

    for source, holder in call.copies:
        nodes[holder] = graph.call_function(torch.ops.aten.clone.default, (nodes[source],))
    args: Any = fx.node.map_aggregate(call.args, node_of)
    kwargs: Any = fx.node.map_aggregate(call.kwargs, node_of)
    if isinstance(call.target, str):
        node = graph.call_method(call.target, args, kwargs)
    else:
        node = graph.call_function(call.target, args, kwargs)
    if call.number:
        node = _number(graph, node)
    for i, index in enumerate(call.results):
        nodes[index] = graph.call_function(operator.getitem, (node, i)) if call.several else node
    for holder, result in call.written:
        nodes[result] = nodes[holder]


def _leaf_nodes(graph: fx.Graph, leaves: Sequence[Leaf]) -> dict[int, fx.Node]:
    nodes: dict[int, fx.Node] = {}
    for index, leaf in enumerate(leaves):
        if leaf.kind in ("input", "attribute"):
            nodes[index] = graph.placeholder(argument_name(leaf))
    for index, leaf in enumerate(leaves):
        if leaf.kind == "constant":
            nodes[index] = _number(graph, leaf.value)
    return nodes


def _number(graph: fx.Graph, value: float | fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.scalar_tensor.default, (value,), {"dtype": torch.float64})


def _empty(graph: fx.Graph, leaf: Leaf) -> fx.Node:
    made: dict[str, Any] = {"dtype": leaf.dtype, "device": leaf.device}
    return graph.call_function(torch.ops.aten.empty.memory_format, (list(leaf.shape),), made)


def _group_node(
    graph: fx.Graph,
    target: Callable[..., Any],
    group: Group,
    nodes: dict[int, fx.Node],
    name: str,
    leaves: Sequence[Leaf],
) -> fx.Node:
    formula = group.formula

    def source(member: tuple[int, ...], slot: int) -> fx.Node:
        if member[slot] in nodes:
            return nodes[member[slot]]
        # a tensor that this group creates: another one of the member gives its shape, else an empty one
        leaf = leaves[member[slot]]
        others = (i for i in (member[s] for s in formula.tensor_slots) if leaves[i].kind not in _MADE)
        given = next((nodes[i] for i in others if leaves[i].shape == leaf.shape), None)
        return _empty(graph, leaf) if given is None else given

    tensors = [source(m, s) for s in formula.tensor_slots for m in group.members]
    never_read = _number(graph, 0.0)  # stands for 0-dim tensors that the step creates
    scalars = [nodes.get(m[s], never_read) for s in formula.scalar_slots for m in group.members]
    node = graph.call_function(target, (tensors, scalars, len(group.members), formula.text))
    node.name = name
    return node


def _add_totals(graph: fx.Graph, leaves: Sequence[Leaf], groups: Sequence[Group], nodes: dict[int, fx.Node]) -> None:
    """Add to `nodes` the totals to which these groups contribute: sums of what their members contribute."""
    sums: dict[int, fx.Node] = {}
    totals = {i: leaf.index for i, leaf in enumerate(leaves) if leaf.kind == "total"}
    for _ in range(rounds(groups, leaves)):
        # in the first round the slots of totals hold zeros; what depends on another total is right in a later one
        known = {i: sums[number] if number in sums else _number(graph, 0.0) for i, number in totals.items()} | nodes
        parts: dict[int, list[fx.Node]] = {}
        for group in (g for g in groups if g.formula.contributions):
            node = _group_node(graph, multi_tensor_contribute, group, known, f"{group.name}_contribute", leaves)
            for k in range(len(group.formula.contributions)):
                for m, numbers in enumerate(group.totals):
                    value = graph.call_function(operator.getitem, (node, k * len(group.members) + m))
                    parts.setdefault(numbers[k], []).append(value)
        for number, values in parts.items():
            stacked = graph.call_function(torch.ops.aten.stack.default, (values,))
            sums[number] = graph.call_function(torch.ops.aten.sum.default, (stacked,))
    nodes |= {i: sums[number] for i, number in totals.items() if number in sums}
