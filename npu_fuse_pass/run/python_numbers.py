"""Python's arithmetic of the numbers that a graph is given, checked before a step.

Kernels compute with them in float64, where nothing raises: a square root of a negative number is no number, a quotient
by 0 infinite, and large integers are rounded. So what a graph computes of such numbers alone is computed by Python
first. Where parameters compute alike with equal numbers, as with their counts, that is done once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.errors import Mismatch
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.reasons import Code

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_EXACT = 2**53
_MOST = 8  # times as many operations as the graph has
_NEVER_RAISE = (operator.add, operator.sub, operator.mul, operator.neg, torch.sym_float)  # where they give floats

_Chosen = Callable[[Sequence[Any]], tuple[Any, ...]]


class _Place(int):
    """The place of a number among those that are given, and then computed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"number {int(self)}"


_Operations = list[tuple[Callable[..., Any], tuple[Any, ...]]]
"""What is called in turn, and on what: places and constants."""


class PythonNumbers:
    """What a graph computes of Python numbers alone."""

    __slots__ = ("_alike", "_in_tensors")

    def __init__(self, gm: fx.GraphModule) -> None:
        self._alike: dict[str, tuple[_Operations, list[_Chosen]]] = {}
        self._in_tensors: set[int] = set()
        places = _places(gm.graph)
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        known = set(places)
        computed = [n for n in gm.graph.nodes if _is_computed(n, known)]
        used = {a for n in computed for a in n.all_input_nodes}
        parts = [_below(n, places) for n in computed if n not in used]
        if sum(map(len, parts)) > _MOST * len(order):  # each starts with the one before, as in a running total
            parts = [set().union(*parts)]
        for part in parts:
            self._add(sorted(part, key=order.__getitem__), places)

    def _add(self, nodes: Sequence[fx.Node], places: dict[fx.Node, int]) -> None:
        computed = [n for n in nodes if n not in places]
        if all(n.target in _NEVER_RAISE and isinstance(recorded(n), (float, torch.SymFloat)) for n in computed):
            return
        given = [n for n in nodes if n in places]
        chosen = [places[n] for n in (*given, given[0])]  # two at least: a tuple
        at = {n: _Place(i) for i, n in enumerate(given)}
        at |= {n: _Place(i) for i, n in enumerate(computed, len(chosen))}
        operations = [(n.target, tuple(at[a] if isinstance(a, fx.Node) else a for a in n.args)) for n in computed]
        _, members = self._alike.setdefault(repr(operations), (operations, []))  # type: ignore[arg-type]
        members.append(operator.itemgetter(*chosen))
        self._in_tensors.update(places[n] for n in given if n.op != "placeholder")

    def check(self, args: Sequence[Any]) -> None:
        """Compute them for a call.

        Raises:
            Mismatch: with one of these numbers a kernel would compute something else.
            Exception: what Python raises where it computes with them.
        """
        if self._in_tensors:
            args = [a.item() if i in self._in_tensors else a for i, a in enumerate(args)]
        for operations, members in self._alike.values():
            for given in {chosen(args) for chosen in members}:
                numbers = list(given)
                for function, arguments in operations:
                    numbers.append(function(*[numbers[a] if type(a) is _Place else a for a in arguments]))
                if any(isinstance(n, complex) or (isinstance(n, int) and abs(n) > _EXACT) for n in numbers):
                    raise Mismatch("a number of Python's is complex, or an integer beyond 2⁵³", Code.NUMBER)


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    """The numbers that a graph is given, by their places among its arguments. Dynamo wraps floats, and reads them."""
    found = {}
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        example = recorded(node)
        if isinstance(example, _NUMBERS):
            found[node] = i
        elif isinstance(example, Tensor) and _is_float(example) and all(user.target == "item" for user in node.users):
            found |= dict.fromkeys(node.users, i)
    return found


def _is_float(example: Tensor) -> bool:
    return example.dtype == torch.float64 and example.device.type == "cpu" and not example.dim()


def _is_computed(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a number is computed of known ones and constants alone, which makes it known, too."""
    of_numbers = all(a in known if isinstance(a, fx.Node) else isinstance(a, (int, float)) for a in node.args)
    if node.op != "call_function" or node.kwargs or not node.all_input_nodes or not of_numbers:
        return False
    if isinstance(recorded(node), _NUMBERS):
        known.add(node)
    return node in known


def _below(last: fx.Node, given: Container[fx.Node]) -> set[fx.Node]:
    """What a number is computed of, down to those that are given, and itself."""
    found, waiting = {last}, [last]
    while waiting:
        for argument in waiting.pop().all_input_nodes:
            if argument not in found:
                found.add(argument)
                waiting += [] if argument in given else [argument]
    return found
