"""Finds where a graph does the same again and again: blocks of nodes that differ in list positions only."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

_LONGEST = 64  # nodes of a block
_PLENTY = 4 * _LONGEST
_FEWEST = 3  # repetitions that are worth a loop


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a value is: in a variable, or in a list there."""

    name: str
    indices: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """`length` nodes that are repeated `count` times; `steps` says how far list positions advance."""

    length: int
    count: int
    steps: tuple[Any, ...] = ()


def element_of(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """The node whose result a node takes an element from, and which."""
    path: list[int] = []
    while is_element(node):
        path.insert(0, node.args[1])  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return node, tuple(path)


def is_element(node: fx.Node) -> bool:
    """Whether a node takes an element of a list, and not of a tensor."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return False
    source: Any = node.args[0]
    return not isinstance(source.meta.get("example_value", source.meta.get("val")), Tensor)


class _Different(Exception):  # noqa: N818 - an answer
    pass


class Loops:
    """Splits nodes into blocks. `place` says where the value of a node is that came before."""

    def __init__(self, nodes: Sequence[fx.Node], place: Callable[[fx.Node], Place | None]) -> None:
        self._nodes = nodes
        self._place = place

    def block_at(self, start: int) -> Block:
        """The block that begins here and stands for most nodes."""
        best = Block(1, 1)
        target = self._nodes[start].target
        for length in range(1, min(_LONGEST, (len(self._nodes) - start) // _FEWEST) + 1):
            if self._nodes[start + length].target != target:
                continue
            found = self._repeated(start, length)
            if found.count >= _FEWEST and found.length * found.count > best.length * best.count:
                best = found
            if best.length * best.count > _PLENTY:  # a multiple of this length would be found again and again
                break
        return best

    def _repeated(self, start: int, length: int) -> Block:
        blocks = (self._nodes[i : i + length] for i in range(start, len(self._nodes) - length + 1, length))
        before = next(blocks)
        count, steps = 1, None
        for block in blocks:
            try:
                advanced = tuple(self._advance(before, block))
            except _Different:
                break
            if steps is not None and advanced != steps:
                break
            steps, before, count = advanced, block, count + 1
        return Block(length, count, steps or ())

    def _advance(self, before: Sequence[fx.Node], after: Sequence[fx.Node]) -> Iterator[Any]:
        """How every list position advances from one block to the next."""
        one = {node: i for i, node in enumerate(before)}
        two = {node: i for i, node in enumerate(after)}
        for x, y in zip(before, after, strict=True):
            if (x.op, x.target) != (y.op, y.target):
                raise _Different
            yield from self._compare((x.args, x.kwargs), (y.args, y.kwargs), one, two)

    def _compare(self, x: Any, y: Any, one: Mapping[fx.Node, int], two: Mapping[fx.Node, int]) -> Iterator[Any]:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            yield self._step(x, y, one, two)
        elif type(x) is not type(y):
            raise _Different
        elif isinstance(x, (list, tuple)):
            if len(x) != len(y):
                raise _Different
            for a, b in zip(x, y, strict=True):
                yield from self._compare(a, b, one, two)
        elif isinstance(x, dict):
            yield from self._compare([*x.items()], [*y.items()], one, two)
        elif isinstance(x, slice):
            yield from self._compare([x.start, x.stop, x.step], [y.start, y.stop, y.step], one, two)
        elif repr(x) != repr(y):
            raise _Different

    def _step(self, x: fx.Node, y: fx.Node, one: Mapping[fx.Node, int], two: Mapping[fx.Node, int]) -> Any:
        (source_x, path_x), (source_y, path_y) = element_of(x), element_of(y)
        if source_x in one or source_y in two:
            if one.get(source_x) != two.get(source_y) or path_x != path_y:
                raise _Different
            return None
        a, b = self._place(x), self._place(y)
        if a is None or b is None or a.name != b.name or len(a.indices) != len(b.indices):
            raise _Different
        step = tuple(j - i for i, j in zip(a.indices, b.indices, strict=True))
        if sum(map(bool, step)) > 1:
            raise _Different
        return step
