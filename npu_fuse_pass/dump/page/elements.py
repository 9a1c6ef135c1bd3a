"""A captured graph tensor by tensor: the entries of list operations, and the parameters that they belong to.

Only names and arguments are read, nothing is computed: this shows readers the origin of a fused node.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from npu_fuse_pass.fx_nodes.effects import entries, recorded
from npu_fuse_pass.fx_nodes.names import operation_name

SEVERAL = -1
"""The owner of what is computed from more than one parameter."""

_ALIASES = {"detach", "alias", "_get_data_attr", "lift_fresh"}
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16", "_to_copy"}
_OVERWRITES = {"copy_", "fill_", "zero_"}
_NO_OPERATION = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}


@dataclasses.dataclass(eq=False)
class Element:
    """A leaf (`node` is None), or a node's operation on one tensor.

    Attributes:
        name: the operation without `_foreach_`, or the leaf's name.
        index: of the entry, in a list operation.
        note: the operation's numbers and options.
        tensor: it has elements; else a number or a 0-dim tensor.
        owner: the parameter that it belongs to, SEVERAL, or None for numbers that belong to no parameter.
    """

    name: str
    node: fx.Node | None
    index: int | None
    args: list[Element]
    note: str
    tensor: bool
    owner: int | None


class _Cell:
    """A tensor whose value in-place operations replace."""

    __slots__ = ("element",)

    def __init__(self, element: Element) -> None:
        self.element = element


class Flow:
    """The elements of a graph.

    Attributes:
        elements: those of operations, in the graph's order.
        last: the element in each leaf after the step, by the name of its placeholder or attribute.
        given: the elements that a node was called on, by the node's name.
        returned: the graph's results.
    """

    def __init__(self, gm: fx.GraphModule, owners: Mapping[str, int | None], tensors: Container[str]) -> None:
        """
        Args:
            gm: the graph; tensors that it holds may be gone.
            owners: the parameter that a leaf belongs to, by name.
            tensors: names of leaves that have elements.
        """
        self._tensors = tensors
        self.elements: list[Element] = []
        self.given: dict[str, list[Element]] = {}
        self.returned: list[Element] = []
        self._owners = owners
        self._leaves: dict[str, _Cell] = {}
        env: dict[fx.Node, Any] = {}
        for node in gm.graph.nodes:
            if node.op == "output":
                self.returned = [cell.element for cell in _cells(fx.node.map_arg(node.args[0], env.get))]
            elif node.op in ("placeholder", "get_attr"):
                env[node] = self._leaf(node)
            elif operation_name(node) not in _NO_OPERATION:
                env[node] = self._call(node, *fx.node.map_arg((node.args, node.kwargs), env.get))
        self.last = {name: cell.element for name, cell in self._leaves.items()}

    def _leaf(self, node: fx.Node) -> _Cell:
        name = node.name if node.op == "placeholder" else str(node.target)
        if name not in self._leaves:
            leaf = Element(name, None, None, [], "", name in self._tensors, self._owners.get(name))
            self._leaves[name] = _Cell(leaf)
        return self._leaves[name]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = operation_name(node)
        if node.target is operator.getitem and not isinstance(args[0], _Cell):
            return args[0][args[1]]
        meta = recorded(node)
        self.given[node.name] = [cell.element for cell in _cells((args, kwargs))]
        if name in _ALIASES or (name in _CASTS and _same_kind(node.args[0], meta)):
            return args[0]
        if name.startswith("_foreach_"):
            plain = name.removeprefix("_foreach_")
            count = max((len(a) for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))), default=0)
            return [self._one(node, plain, i, _entry(args, i), _entry(kwargs, i), _at(meta, i)) for i in range(count)]
        if name in _LISTS_IN_PLACE:
            return self._in_lists(node, name, args)
        if isinstance(meta, (list, tuple)):
            return [self._one(node, name, i, args, kwargs, m) for i, m in enumerate(meta)]
        return self._one(node, name, None, args, kwargs, meta)

    def _one(self, node: fx.Node, name: str, index: int | None, args: Any, kwargs: Any, meta: Any) -> _Cell:
        """The cell of a node's result for one tensor; of an in-place operation, the tensor's own cell."""
        in_place = name.endswith("_") and not name.endswith("__")
        target = kwargs.get("out") if "out" in kwargs else args[0] if in_place and args else None
        read = args[1:] if name in _OVERWRITES else args
        below = [cell.element for cell in _cells((read, tuple(v for k, v in kwargs.items() if k != "out")))]
        tensor = meta.ndim > 0 if isinstance(meta, Tensor) else any(e.tensor for e in below)
        plain = name.removesuffix("_") if in_place else name
        made = Element(plain, node, index, below, _note(args, kwargs), tensor, _owner(below, tensor))
        if made.owner is None and isinstance(target, _Cell):
            made.owner = target.element.owner  # zero_ reads nothing
        self.elements.append(made)
        if not isinstance(target, _Cell):
            return _Cell(made)
        target.element = made
        return target

    def _in_lists(self, node: fx.Node, name: str, args: Any) -> None:
        """Record an operation that writes every tensor of its lists."""
        lists, others = [a for a in args if isinstance(a, (list, tuple))], [a for a in args if isinstance(a, _Cell)]
        entries = zip(*lists, strict=True)
        before = [cell.element for cell in others]
        for i, cells in enumerate(entries):
            below = [*(cell.element for cell in cells), *before]
            made = Element(name.strip("_"), node, i, below, "", True, _owner(below, True))
            self.elements.append(made)
            cells[0].element = made
        if name.startswith("_amp") and others:  # found_inf is written, too
            below = [*self.elements[-len(lists[0]) :], others[0].element]
            others[0].element = Element("found_inf", node, None, below, "", False, _owner(below, False))
            self.elements.append(others[0].element)


_LISTS_IN_PLACE = {"_amp_foreach_non_finite_check_and_unscale_", "rule_update"}


def _owner(below: Sequence[Element], tensor: bool) -> int | None:
    """The common owner of the inputs; a tensor keeps its owner when a total scales it."""
    owners = {e.owner for e in below} - {None}
    own = owners - {SEVERAL}
    if len(own) == 1 and (tensor or SEVERAL not in owners):
        return own.pop()
    return SEVERAL if owners else None


def _cells(value: Any) -> list[_Cell]:
    return [x for x in entries(value) if isinstance(x, _Cell)]


def _entry(given: Any, i: int) -> Any:
    """The arguments of a list operation for its entry `i`."""
    if isinstance(given, dict):
        return {k: _at(v, i) for k, v in given.items()}
    return [_at(v, i) for v in given]


def _at(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, (list, tuple)) else value


def _same_kind(given: Any, meta: Any) -> bool:
    before = recorded(given)
    both = isinstance(before, Tensor) and isinstance(meta, Tensor)
    return both and (before.dtype, before.device) == (meta.dtype, meta.device)


def _note(args: Any, kwargs: Any) -> str:
    """Numbers and options of a call as short text."""
    words = [text for a in args if (text := _text(a))]
    words += [f"{k}={text}" for k, v in kwargs.items() if k != "out" and (text := _text(v))]
    return " ".join(words)


def _text(value: Any) -> str:
    if value is None or isinstance(value, dict) or callable(value) or _cells(value):
        return ""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return re.sub(r"^torch\.", "", str(value))
