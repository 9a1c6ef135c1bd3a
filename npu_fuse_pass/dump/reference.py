"""The original step as a graph that can be written down: the captured one, or a rule for parameter after parameter."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ir import Captured, Update
from .code import INDENT, Code, wrapped
from .inputs import Inputs, identifier
from .loops import Place


class RuleStep:
    """A step that consists of rules.

    Attributes:
        graph: calls them.
        places: of its inputs.
        functions: their names.
        definitions: lines that define them.
    """

    def __init__(self, captured: Captured, inputs: Inputs) -> None:
        self.graph = fx.Graph()
        self.functions: dict[Any, str] = {}
        self.definitions: list[str] = []
        self._made: dict[tuple[str, ...], Callable[..., Any]] = {}
        self._nodes = {i: self.graph.placeholder(f"leaf_{i}") for i in inputs.places}
        self.places = {node: inputs.places[i] for i, node in self._nodes.items()}
        updates = [u for u in captured.updates if u.traced is not None]
        called = [self._functions_of(u) for u in updates]
        totals = self._totals([(u, parts) for u, (_, parts) in zip(updates, called, strict=True)])
        for update, (function, _) in zip(updates, called, strict=True):
            for member in update.members:
                self._step(update, member, function, totals)

    def _step(
        self, update: Update, member: tuple[int, ...], function: Callable[..., Any], totals: dict[str, fx.Node]
    ) -> None:
        assert update.traced is not None
        count = self._count(update, member)
        made = self.graph.call_function(function, tuple(self._arguments(update, member, count, totals)))
        returned = len(update.traced.update.graph.output_node().args[0])  # type: ignore[arg-type]
        for k, (position, _) in enumerate(update.writes):
            value = self.graph.call_function(operator.getitem, (made, k)) if k < returned else count
            assert value is not None
            self.graph.call_method("copy_", (self._nodes[member[position]], value))

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
