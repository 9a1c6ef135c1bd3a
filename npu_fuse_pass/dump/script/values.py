"""Values of a graph as they stand in code: neighbours in a list as a slice of it, equal ones once."""

from __future__ import annotations

import builtins
import itertools
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.dump.script.loops import Place, element_of

_MODULES: tuple[tuple[Any, str], ...] = (
    (torch, "torch."),
    (operator, "operator."),
    (math, "math."),
    (builtins, ""),
    (torch.nn.functional, "torch.nn.functional."),
    (torch.linalg, "torch.linalg."),
    (torch.special, "torch.special."),
    (torch.Tensor, "torch.Tensor."),
)
_INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.pow: "**",
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
    operator.matmul: "@", operator.and_: "&", operator.or_: "|",
}  # fmt: skip


class Values:
    """Writes values and calls.

    Attributes:
        places: where the results of nodes are.
        lengths: of the lists that hold some.
        local: variables in the body of a loop.
        constants: what only the caller knows by name: functions, and long texts.
    """

    def __init__(
        self, places: Mapping[fx.Node, Place], lengths: Mapping[str, int], constants: Mapping[Any, str]
    ) -> None:
        self.places = dict(places)
        self.lengths = dict(lengths)
        self.local: dict[fx.Node, str] = {}
        self.constants = constants

    def place(self, node: fx.Node) -> Place | None:
        """Where the value of a node is; None if it is not known yet."""
        source, path = element_of(node)
        found = self.places.get(source)
        return Place(found.name, (*found.indices, *path)) if found else None

    def call(self, node: fx.Node, element: Callable[[fx.Node], str] | None = None) -> str:
        """What a node calls.

        Args:
            element: writes a node instead, and lists are written out; in a loop, where positions advance.
        """
        text: Callable[[Any], str] = self.text if element is None else lambda v: self._written_out(v, element)
        args = [text(a) for a in node.args]
        given = [*args, *(f"{k}={text(v)}" for k, v in node.kwargs.items())]
        if node.op == "call_method":
            return f"{given[0]}.{node.target}({', '.join(given[1:])})"
        if node.target in _INFIX and len(args) == 2:
            return f"{args[0]} {_INFIX[node.target]} {args[1]}"
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        return f"{self._function(node.target)}({', '.join(given)})"

    def text(self, value: Any) -> str:
        """A value."""
        if isinstance(value, fx.Node):
            return self.node(value)
        if isinstance(value, (list, tuple)):
            return self._list(value)
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.text, (value.start, value.stop, value.step)))})"
        return self._literal(value)

    def node(self, node: fx.Node) -> str:
        """The variable that holds a node's result."""
        source, path = element_of(node)
        if source in self.local:
            return self.local[source] + _brackets(path)
        place = self.place(node)
        assert place is not None, f"{node.name} is used before it is computed"
        return place.name + _brackets(place.indices)

    def _written_out(self, value: Any, element: Callable[[fx.Node], str]) -> str:
        if isinstance(value, fx.Node):
            return element(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._written_out(v, element) for v in value)}]"
        if isinstance(value, slice):
            parts = (self._written_out(v, element) for v in (value.start, value.stop, value.step))
            return f"slice({', '.join(parts)})"
        return self._literal(value)

    def _literal(self, value: Any) -> str:
        if isinstance(value, str) and value in self.constants:
            return self.constants[value]
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        return str(value) if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) else repr(value)

    def _function(self, target: Any) -> str:
        if target in self.constants:
            return self.constants[target]
        if isinstance(target, torch._ops.OpOverload):
            return f"torch.ops.{target}"
        name = getattr(target, "__name__", "")
        for module, text in _MODULES:
            for short in (name, name.partition("_")[2]):  # torch.linalg.vector_norm is named linalg_vector_norm
                if short and getattr(module, short, None) is target:
                    return f"{text}{short}"
        module = target.__module__ if isinstance(target, (types.FunctionType, type)) else "torch._C"
        return f"{module}.{getattr(target, '__qualname__', name)}"

    def _list(self, values: Sequence[Any]) -> str:
        parts: list[str] = []
        rest = list(values)
        while rest:
            length, text = self._run(rest)
            if length == len(values) > 1 and not text.startswith("*["):
                return text.removeprefix("*")
            parts.append(text)
            rest = rest[length:]
        return f"[{', '.join(parts)}]"

    def _run(self, values: list[Any]) -> tuple[int, str]:
        """The longest run at the beginning of a list, and its text."""
        if not isinstance(values[0], fx.Node):
            return 1, self.text(values[0])
        text = self.node(values[0])
        same = sum(1 for _ in itertools.takewhile(lambda v: v is values[0], values))
        if same > 2:
            return same, f"*[{text}] * {same}"
        count, step = _progression(map(self._place_of, values))
        first = self._place_of(values[0])
        if count < 3 or first is None:
            whole = first is not None and count == len(values) == self.lengths.get(_base(first)) and step == 1
            return (count, f"*{_base(first)}") if whole and first is not None and count > 1 else (1, text)
        begin, stop = first.indices[-1], first.indices[-1] + count * step
        if step == 1 and begin == 0 and count == self.lengths.get(_base(first)):
            return count, f"*{_base(first)}"
        by = "" if step == 1 else f":{step}"
        return count, f"*{_base(first)}[{begin}:{stop if stop >= 0 else ''}{by}]"

    def _place_of(self, value: Any) -> Place | None:
        if not isinstance(value, fx.Node) or element_of(value)[0] in self.local:
            return None
        return self.place(value)


def _base(place: Place) -> str:
    return place.name + _brackets(place.indices[:-1])


def _brackets(indices: Iterable[int]) -> str:
    return "".join(f"[{i}]" for i in indices)


def _progression(places: Iterable[Place | None]) -> tuple[int, int]:
    """How many places at the beginning are elements of one list at equal distances, and the distance."""
    count = step = 0
    first: Place | None = None
    for place in places:
        if place is None or not place.indices:
            break
        if first is None:
            first = place
        elif (place.name, place.indices[:-1]) != (first.name, first.indices[:-1]):
            break
        elif count == 1:
            step = place.indices[-1] - first.indices[-1]
        if count and (not step or place.indices[-1] != first.indices[-1] + count * step):
            break
        count += 1
    return count, step
