"""A graph as the body of a Python function that runs and that people read: repetitions become loops."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.dump.names import typed
from npu_fuse_pass.dump.script.loops import Block, Loops, Place, is_element
from npu_fuse_pass.dump.script.values import Values

INDENT = "    "
_WIDTH = 110
_FIXED = "\0"  # a space at which no line is broken
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


class Code:
    """Writes a graph.

    Args:
        graph: what to write.
        places: where inputs are: variables, or lists of them.
        lengths: of those lists.
        constants: what only the caller knows by name: functions, and long texts.
        sources: say from where in the program a node comes, and of which kind its value is.
    """

    def __init__(
        self,
        graph: fx.Graph,
        places: Mapping[fx.Node, Place],
        lengths: Mapping[str, int],
        constants: Mapping[Any, str] | None = None,
        sources: bool = False,
    ) -> None:
        self._values = Values(places, lengths, constants or {})
        self._sources = sources
        self._output = next((n.args[0] for n in graph.nodes if n.op == "output"), ())
        self._nodes = [n for n in graph.nodes if n.op.startswith("call_") and not is_element(n) and not _idle(n)]
        self._taken = {p.name for p in places.values()} | set(self._values.constants.values())
        self._users = {node: _users(node) for node in self._nodes}
        self._said = ""
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        """The statements, without a return."""
        loops, start = Loops(self._nodes, self._values.place), 0
        while start < len(self._nodes):
            block = loops.block_at(start)
            nodes = self._nodes[start : start + block.length * block.count]
            self._source(nodes[0])
            if block.count == 1:
                self._plain(nodes[0])
            elif block.length == 1:
                self._comprehension(nodes, block)
            else:
                self._loop(nodes, block)
            start += len(nodes)
        return self._lines

    def returned(self, positions: Sequence[int] | None = None) -> str:
        """What the graph returns, or some of it, after `lines`."""
        output: Any = self._output
        return self._values.text(output if positions is None else [output[i] for i in positions])

    def _plain(self, node: fx.Node) -> None:
        call = self._values.call(node)
        if not self._users[node]:
            self._add(call, node)
            return
        name = self._new_name(node.name)
        self._values.places[node] = Place(name)
        value = _recorded(node)
        elements = [int(u.args[1]) for u in node.users if is_element(u)]  # type: ignore[arg-type]
        if isinstance(value, (list, tuple)):
            self._values.lengths[name] = len(value)
        elif elements:
            self._values.lengths[name] = 1 + max(elements)
        self._add(f"{name} = {call}", node)

    def _comprehension(self, nodes: Sequence[fx.Node], block: Block) -> None:
        """One call for every element of lists."""
        text, head = self._values.call(nodes[0], self._advancing(block)), f"for i in range({block.count})"
        if any(self._users[n] for n in nodes):
            name = self._new_name(nodes[0].name)
            self._add(f"{name} = [{text} {head}]", nodes[0])
            self._holds(name, nodes)
        else:
            self._add(f"{head}:")
            self._add(INDENT + text)

    def _loop(self, nodes: Sequence[fx.Node], block: Block) -> None:
        """Several calls again and again; what later nodes read goes into lists."""
        columns = [nodes[i :: block.length] for i in range(block.length)]
        rounds = [set(nodes[k : k + block.length]) for k in range(0, len(nodes), block.length)]
        names = {c[0]: self._new_name(c[0].name) for c in columns if any(self._users[n] for n in c)}
        lists = {
            c[0]: self._new_name(f"{names[c[0]]}_of")
            for c in columns
            if any(not self._users[n] <= inside for n, inside in zip(c, rounds, strict=True))
        }
        for name in lists.values():
            self._add(f"{name} = []")
        self._add(f"for i in range({block.count}):")
        element = self._advancing(block)
        for first in (c[0] for c in columns):
            text = self._values.call(first, element)
            self._add(INDENT + (f"{names[first]} = {text}" if first in names else text), first)
            if first in names:
                self._values.local[first] = names[first]
            if first in lists:
                self._add(INDENT + f"{lists[first]}.append({names[first]})")
        self._values.local.clear()
        for column in columns:
            if column[0] in lists:
                self._holds(lists[column[0]], column)

    def _advancing(self, block: Block) -> Callable[[fx.Node], str]:
        """Writes the nodes of a block in order, with list positions that depend on the loop's variable."""
        steps: Iterator[Any] = iter(block.steps)

        def element(node: fx.Node) -> str:
            step, place = next(steps), self._values.place(node)
            if step is None or place is None or not any(step):
                return self._values.node(node)
            indices = zip(place.indices, step, strict=True)
            return place.name + "".join(f"[{_index(begin, by)}]" for begin, by in indices)

        return element

    def _holds(self, name: str, nodes: Sequence[fx.Node]) -> None:
        for k, node in enumerate(nodes):
            self._values.places[node] = Place(name, (k,))
        self._values.lengths[name] = len(nodes)

    def _add(self, line: str, node: fx.Node | None = None) -> None:
        value = _recorded(node) if node is not None and self._sources else None
        self._lines += wrapped(INDENT + line)
        if isinstance(value, Tensor):
            self._lines[-1] += f"  # {typed(value)}"

    def _source(self, node: fx.Node) -> None:
        """From where a node comes, if that is elsewhere than the one before."""
        frames = _FRAME.findall(node.stack_trace or "") if self._sources else []
        if frames:
            path, line, function, text = frames[-1]
            path = path.rpartition("site-packages/")[2].removeprefix(f"{os.getcwd()}/")
            said = f"# {path}:{line} in {function}: {text}".rstrip()
            if said != self._said:
                self._lines += ["", INDENT + said]
                self._said = said

    def _new_name(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def wrapped(line: str) -> list[str]:
    """A long line in several, broken after commas."""
    if len(line) <= _WIDTH or '"' in line or "'" in line:
        return [line]
    begin = line[: len(line) - len(line.lstrip())]
    parts = line.strip().replace(" ", _FIXED).replace(f",{_FIXED}", ", ")
    lines = textwrap.wrap(
        *(parts, _WIDTH),
        initial_indent=begin,
        subsequent_indent=begin + 2 * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part.replace(_FIXED, " ") for part in lines]


def _idle(node: fx.Node) -> bool:
    """Whether nothing reads what a node makes, and it does nothing else."""
    return not node.users and isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable


def _users(node: fx.Node) -> set[fx.Node]:
    """Who reads a node, or elements of it."""
    return {u for user in node.users for u in (_users(user) if is_element(user) else {user})}


def _index(begin: int, step: int) -> str:
    if not step:
        return str(begin)
    times = "i" if abs(step) == 1 else f"{abs(step)}*i"
    if step < 0:
        return f"{begin} - {times}"
    return f"{times} + {begin}" if begin else times


def _recorded(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))
