"""Replace what a graph computes by the fused graph, in the same graph object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.fx_nodes.effects import called, recorded
from npu_fuse_pass.ir.types import Captured


def splice(graph: fx.Graph, fused: fx.GraphModule, captured: Captured) -> None:
    """Replace what `graph` computes by `fused`; its arguments and what it returns stay as they are.

    Args:
        graph: the captured graph; every placeholder has its fake tensor as metadata.
        fused: what `rewrite` made of it.
        captured: from which `fused` was made.
    """
    old = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    output = graph.output_node()
    arguments = _arguments(graph, captured)
    env: dict[fx.Node, fx.Node] = dict(zip(fused.graph.find_nodes(op="placeholder"), arguments.values(), strict=True))
    made = []
    with graph.inserting_before(output):
        for node in fused.graph.nodes:
            if node.op not in ("placeholder", "output"):
                env[node] = graph.node_copy(node, env.__getitem__)
                made.append(env[node])
    made_outputs: Any = fused.graph.output_node().args[0]
    results = iter([env[n] for n in made_outputs])
    output.args = (_returned(output.args[0], captured, arguments, results),)
    for node in reversed(old):
        if not node.users:
            graph.erase_node(node)
    mode = next((m for n in graph.find_nodes(op="placeholder") if (m := getattr(recorded(n), "fake_mode", None))), None)
    if mode is not None:
        _record(made, mode)
    graph.lint()


def _arguments(graph: fx.Graph, captured: Captured) -> dict[int, fx.Node]:
    """Leaf -> the node behind it, of the leaves that the fused graph takes."""
    placeholders = graph.find_nodes(op="placeholder")
    attributes = {n.target: n for n in graph.nodes if n.op == "get_attr"}
    found: dict[int, fx.Node] = {}
    for i, leaf in enumerate(captured.leaves):
        if leaf.kind in ("input", "attribute"):
            found[i] = placeholders[leaf.index] if leaf.kind == "input" else attributes[leaf.name]
    return found


def _returned(before: Any, captured: Captured, arguments: dict[int, fx.Node], results: Iterator[fx.Node]) -> Any:
    """What the graph returns: new tensors, arguments and literals, in the places where they were."""
    new = sorted((leaf.index, i) for i, leaf in enumerate(captured.leaves) if leaf.kind == "output")
    nodes = arguments | {i: node for (_, i), node in zip(new, results, strict=True)}
    given = list(before) if isinstance(before, (list, tuple)) else [before]
    for place, output in enumerate(captured.returned):
        if output.leaf is not None:
            given[place] = nodes[output.leaf]
    return type(before)(given) if isinstance(before, (list, tuple)) else given[0]


def _record(nodes: list[fx.Node], mode: Any) -> None:
    """Give every new node the fake tensors that compilers look for."""
    for node in nodes:
        if node.target is torch.ops.aten.copy_.default:
            node.meta["val"] = recorded(node.args[0])  # executing it would write into the argument's fake tensor
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), recorded)
        with mode:
            node.meta["val"] = called(node.target, args, kwargs)
