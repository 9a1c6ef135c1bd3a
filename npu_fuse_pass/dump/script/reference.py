"""The original step as a graph that can be written down: the captured one, with the rules of rule optimizers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.script.code import INDENT, Code, wrapped
from npu_fuse_pass.dump.script.inputs import Inputs, identifier, original_places
from npu_fuse_pass.dump.script.loops import Place
from npu_fuse_pass.ir.types import Expanded, Update


@dataclasses.dataclass
class Reference:
    """A graph, where its inputs are, and the functions that it calls: their names, and lines that define them."""

    graph: fx.Graph
    places: dict[fx.Node, Place]
    functions: dict[Any, str]
    definitions: list[str]


def reference(contents: Contents, inputs: Inputs) -> Reference:
    """What a step computed before anything was fused."""
    original = None if contents.original is None else contents.original.graph
    if original is not None and not contents.captured.expanded:
        return Reference(original, original_places(contents, original, inputs), {}, [])
    graph = fx.Graph()
    nodes = {i: graph.placeholder(f"leaf_{i}") for i in inputs.places}
    places = {node: inputs.places[i] for i, node in nodes.items()}
    rules = _Rules(graph)
    if original is None:
        rules.add(contents.captured.updates, nodes)
    else:
        by_place = {place: places_node for places_node, place in places.items()}
        known = {n: by_place[place] for n, place in original_places(contents, original, inputs).items()}
        for node in original.nodes:
            if node.name in contents.captured.expanded:
                _expand(rules, node, contents.captured.expanded[node.name], nodes, known)
            elif node not in known:
                known[node] = graph.node_copy(node, known.__getitem__)
    return Reference(graph, places, rules.functions, rules.definitions)


def _expand(
    rules: _Rules, node: fx.Node, made: Expanded, nodes: Mapping[int, fx.Node], known: Mapping[fx.Node, fx.Node]
) -> None:
    """An optimizer's step inside a graph: `rule_update(params, grads, found_inf, optimizer)`."""
    arguments: Any = node.args
    own = {leaf: nodes[i] for leaf, i in made.kept.items()}
    own |= {leaf: known[arguments[which][position]] for leaf, (which, position) in made.given.items()}
    rules.add(made.updates, own, None if arguments[2] is None else known[arguments[2]])


class _Rules:
    """Calls rules in a graph, for parameter after parameter."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.functions: dict[Any, str] = {}
        self.definitions: list[str] = []
        self._made: dict[tuple[str, ...], Callable[..., Any]] = {}
        self._nodes: Mapping[int, fx.Node] = {}

    def add(self, updates: Sequence[Update], nodes: Mapping[int, fx.Node], found_inf: fx.Node | None = None) -> None:
        """A step.

        Args:
            updates: of an optimizer.
            nodes: by leaf.
            found_inf: where this is not zero nothing is written.
        """
        self._nodes = nodes
        traced = [u for u in updates if u.traced is not None]
        called = [self._functions_of(u) for u in traced]
        totals = self._totals([(u, parts) for u, (_, parts) in zip(traced, called, strict=True)])
        skip = None if found_inf is None else self.graph.call_function(operator.ne, (found_inf, 0))
        for update, (function, _) in zip(traced, called, strict=True):
            for member in update.members:
                self._step(update, member, function, totals, skip)

    def _step(
        self,
        update: Update,
        member: tuple[int, ...],
        function: Callable[..., Any],
        totals: dict[str, fx.Node],
        skip: fx.Node | None,
    ) -> None:
        assert update.traced is not None
        count = self._count(update, member)
        made = self.graph.call_function(function, tuple(self._arguments(update, member, count, totals)))
        returned = len(update.traced.update.graph.output_node().args[0])  # type: ignore[arg-type]
        for k, (position, _) in enumerate(update.writes):
            target = self._nodes[member[position]]
            value = self.graph.call_function(operator.getitem, (made, k)) if k < returned else count
            assert value is not None
            if skip is not None:
                value = self.graph.call_function(torch.where, (skip, target, value))
            self.graph.call_method("copy_", (target, value))

    def _totals(self, updates: list[tuple[Update, list[Callable[..., Any]]]]) -> dict[str, fx.Node]:
        """What the parameters add up to."""
        parts: dict[int, list[fx.Node]] = {}
        for update, functions in updates:
            for (number, _), function in zip(update.contributions, functions, strict=True):
                for member in update.members:
                    arguments = self._arguments(update, member, self._count(update, member), {})
                    parts.setdefault(number, []).append(self.graph.call_function(function, tuple(arguments)))
        stacked = {n: self.graph.call_function(torch.stack, (p,)) for n, p in parts.items()}
        return {f"total {n}": self.graph.call_method("sum", (node,)) for n, node in stacked.items()}

    def _count(self, update: Update, member: tuple[int, ...]) -> fx.Node | None:
        """The step counter after this step."""
        assert update.traced is not None
        at = update.labels.index("step")
        if at not in [position for position, _ in update.writes]:
            return self._nodes.get(member[at])
        return self.graph.call_function(operator.add, (self._nodes[member[at]], 1))

    def _arguments(
        self, update: Update, member: tuple[int, ...], count: fx.Node | None, totals: dict[str, fx.Node]
    ) -> list[fx.Node | None]:
        assert update.traced is not None
        known: dict[str, fx.Node | None] = {"step": count}
        known |= totals
        arguments = update.traced.arguments[: None if totals else -len(update.contributions) or None]
        return [self._nodes.get(member[a]) if isinstance(a, int) else known[a] for a in arguments]

    def _functions_of(self, update: Update) -> tuple[Callable[..., Any], list[Callable[..., Any]]]:
        """The rule as a function, and one for each total."""
        assert update.traced is not None
        name = identifier(update.traced.rule)
        parts = [self._function(update, gm, f"{name}_adds") for gm in update.traced.contributions]
        return self._function(update, update.traced.update, name), parts

    def _function(self, update: Update, gm: fx.GraphModule, rule: str) -> Callable[..., Any]:
        """Equal ones once."""
        assert update.traced is not None
        nodes = gm.graph.find_nodes(op="placeholder")
        labels = [update.labels[a] if isinstance(a, int) else a for a in update.traced.arguments]
        names = list(map(identifier, labels[: len(nodes)]))
        places = {node: Place(n) for node, n in zip(nodes, names, strict=True)}
        places |= {node: Place(_number(gm, node)) for node in gm.graph.find_nodes(op="get_attr")}
        code = Code(gm.graph, places, {})
        body = (rule, *names, *code.lines(), f"{INDENT}return {code.returned()}")
        if body not in self._made:
            name = f"{rule}_{len(self._made)}"
            self._made[body] = _named(name)
            self.functions[self._made[body]] = name
            self.definitions += [*wrapped(f"def {name}({', '.join(names)}):"), *body[len(names) + 1 :], "", ""]
        return self._made[body]


def _named(name: str) -> Callable[..., Any]:
    """Stands for a function in a graph that is only written down."""

    def function(*args: Any) -> Any:
        raise NotImplementedError

    function.__name__ = name
    return function


def _number(gm: fx.GraphModule, node: fx.Node) -> str:
    """A 0-dim tensor that a trace holds."""
    value = operator.attrgetter(str(node.target))(gm)
    return f"torch.tensor({value.item()!r}, dtype={value.dtype})"
