"""The step before fusing as a graph over the leaves of the fused one; rules are functions that it calls."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.capture.originals import number_type
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.fx_nodes.names import Operation
from npu_fuse_pass.ir.types import Expanded, Update


class CapturedStep:
    """The graph that Dynamo captured, with the rules of rule optimizers in it.

    Args:
        contents: of the compile.
        arguments: names of the leaves that are given to the step.

    Attributes:
        graph: takes these leaves in order, returns the results of the captured graph.
        functions: names of the functions that it calls as modules, by their graphs' source.
        globals: callables of these functions by the names that fx gives, `math_sqrt` for example.
    """

    def __init__(self, contents: Contents, arguments: Mapping[int, str]) -> None:
        self.graph = fx.Graph()
        self.functions: dict[str, str] = {}
        self.globals: dict[str, Any] = {}
        self._names: dict[fx.GraphModule, str] = {}
        self._leaves = {i: self.graph.placeholder(name) for i, name in arguments.items()}
        if contents.original is None:
            self._add_rules(contents.captured.updates, self._leaves)
            self.graph.output([])
        else:
            self._add_graph(contents, contents.original.graph)

    def _add_graph(self, contents: Contents, original: fx.Graph) -> None:
        given = {
            (leaf.index if leaf.kind == "input" else leaf.name): self._leaves[i]
            for i, leaf in enumerate(contents.grouped.leaves)
            if leaf.kind in ("input", "attribute") and leaf.optimizer is None
        }
        positions = {node: k for k, node in enumerate(original.find_nodes(op="placeholder"))}
        nodes: dict[fx.Node, fx.Node] = {}
        for node in original.nodes:
            expanded = contents.captured.expanded.get(node.name)
            if expanded is not None:
                self._add_expanded(node, expanded, nodes)
            elif node.op in ("placeholder", "get_attr"):
                leaf = given.get(positions.get(node, node.target))
                if leaf is not None:  # else nothing reads it
                    nodes[node] = self._number(node, leaf)
            elif not _idle(node):
                nodes[node] = self.graph.node_copy(node, nodes.__getitem__)

    def _number(self, node: fx.Node, leaf: fx.Node) -> fx.Node:
        """An argument, converted where the captured graph takes a Python number."""
        number = number_type(recorded(node))
        return leaf if number is None else self.graph.call_function(number, (leaf,))

    def _add_expanded(self, node: fx.Node, made: Expanded, nodes: Mapping[fx.Node, fx.Node]) -> None:
        """Add an optimizer's step inside a graph: `rule_update(params, grads, found_inf, optimizer)`."""
        arguments: Any = node.args
        own = {leaf: self._leaves[i] for leaf, i in made.kept.items()}
        own |= {leaf: nodes[arguments[which][position]] for leaf, (which, position) in made.given.items()}
        skip = None if arguments[2] is None else self.graph.call_function(operator.ne, (nodes[arguments[2]], 0))
        self._add_rules(made.updates, own, skip)

    def _add_rules(self, updates: Sequence[Update], nodes: Mapping[int, fx.Node], skip: fx.Node | None = None) -> None:
        """Add an optimizer's step, parameter by parameter; nothing is written where `skip` is true."""
        members = [(u, m, self._known(u, [nodes.get(i) for i in m])) for u in updates if u.traced for m in u.members]
        parts: dict[str, list[fx.Node]] = {}
        for update, _, known in members:
            assert update.traced is not None
            for (number, _), gm in zip(update.contributions, update.traced.contributions, strict=True):
                parts.setdefault(f"total {number}", []).append(
                    self._call(update, gm, f"{update.traced.rule}_adds", known)
                )
        sums = {total: self.graph.call_function(torch.stack, (p,)) for total, p in parts.items()}
        totals: dict[int | str, fx.Node | None] = {
            total: self.graph.call_method("sum", (node,)) for total, node in sums.items()
        }
        for update, member, known in members:
            assert update.traced is not None
            made = self._call(update, update.traced.update, update.traced.rule, known | totals)
            returned: Any = update.traced.update.graph.output_node().args[0]
            for k, (position, _) in enumerate(update.writes):
                target = nodes[member[position]]
                value = self.graph.call_function(operator.getitem, (made, k)) if k < len(returned) else known["step"]
                kept = value if skip is None else self.graph.call_function(torch.where, (skip, target, value))
                self.graph.call_method("copy_", (target, kept))

    def _known(self, update: Update, leaves: list[fx.Node | None]) -> dict[int | str, fx.Node | None]:
        """Arguments of a rule by what `Traced.arguments` calls them: `step` is the count after this step."""
        at = update.labels.index("step")
        counted = at in [position for position, _ in update.writes]
        count = self.graph.call_function(operator.add, (leaves[at], 1)) if counted else leaves[at]
        return {**dict(enumerate(leaves)), "step": count}

    def _call(self, update: Update, gm: fx.GraphModule, rule: str, known: Mapping[int | str, Any]) -> fx.Node:
        assert update.traced is not None
        arguments = update.traced.arguments[: len(gm.graph.find_nodes(op="placeholder"))]
        if gm not in self._names:
            labels = [update.labels[a] if isinstance(a, int) else a for a in arguments]
            self._names[gm] = self._function(gm, rule, list(map(_identifier, labels)))
        return self.graph.call_module(self._names[gm], tuple(known[a] for a in arguments))

    def _function(self, gm: fx.GraphModule, rule: str, arguments: list[str]) -> str:
        """The name of the function for a traced graph; equal graphs share one."""
        function = fx.Graph()
        given = gm.graph.find_nodes(op="placeholder")
        nodes = {node: function.placeholder(name) for node, name in zip(given, arguments, strict=True)}
        for node in gm.graph.nodes:
            if node.op == "get_attr":  # a number that the trace holds as a 0-dim tensor
                value = operator.attrgetter(node.target)(gm)
                nodes[node] = function.call_function(torch.scalar_tensor, (value.item(),), {"dtype": value.dtype})
            elif node not in nodes:
                nodes[node] = function.node_copy(node, nodes.__getitem__)
        code = function.python_code("self")
        self.globals |= code.globals
        return self.functions.setdefault(code.src, f"{_identifier(rule)}_{len(self.functions)}")


def _idle(node: fx.Node) -> bool:
    """True if nothing reads a node's result, and it has no side effects."""
    schema = getattr(node.target, "_schema", None)
    return not node.users and isinstance(node.target, Operation) and schema is not None and not schema.is_mutable


def _identifier(label: str) -> str:
    """A label as a name in Python: betas[0] is betas_0."""
    name = re.sub(r"\W+", "_", label).strip("_")
    return f"_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name
