"""Families: parameters that the same operations update, drawn once."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from npu_fuse_pass.dump.page.drawing import Drawing, Node, Texts
from npu_fuse_pass.dump.page.elements import SEVERAL, Element


class Member:
    """The operations of one parameter, arguments first, and the groups that they became part of."""

    def __init__(self, name: str, shape: tuple[int, ...], labels: Mapping[str, str], kept: Container[str]) -> None:
        """
        Args:
            name: the parameter's.
            shape: the parameter's.
            labels: roles of leaves for the parameter, by their names.
            kept: names of nodes that stay as they are.
        """
        self.name = name
        self.shape = shape
        self._labels = labels
        self._kept = kept
        self.elements: list[Element] = []
        self.groups: dict[Element, list[int]] = {}

    def add(self, root: Element, group: int | None) -> None:
        """Add everything below `root` to `group`, up to the original operations that stay."""
        seen: set[Element] = set()
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if ready:
                self._enter(e, group)
            elif e not in seen:
                seen.add(e)
                stack.append((e, True))
                if self.stays(e):
                    for a in e.args if e not in self.groups else ():
                        self.add(a, None)  # groups of its arguments are known already
                elif e.owner != SEVERAL:
                    stack += [(a, False) for a in reversed(e.args)]

    def _enter(self, e: Element, group: int | None) -> None:
        if e not in self.groups:
            self.groups[e] = []
            self.elements.append(e)
        taken = e.node is not None and e.owner != SEVERAL and not self.stays(e)
        if group is not None and taken and group not in self.groups[e]:
            self.groups[e].append(group)

    def stays(self, e: Element) -> bool:
        """True if an operation stays as it is."""
        return e.node is not None and e.node.name in self._kept

    def label(self, e: Element) -> str:
        """The role of a leaf for the parameter."""
        return self._labels.get(e.name, plain(e.name))

    def args(self, e: Element) -> tuple[Element, ...]:
        """The arguments to draw; those shared by several parameters are drawn elsewhere."""
        return tuple(a for a in e.args if a in self.groups) if e.owner != SEVERAL else ()

    def signature(self) -> tuple[object, ...]:
        """A key, equal for parameters that the same operations update."""
        place = {e: i for i, e in enumerate(self.elements)}
        found: list[object] = []
        for e in self.elements:
            name = e.name if e.node is not None else self.label(e)
            found.append((name, e.tensor, tuple(self.groups[e]), tuple(place[a] for a in self.args(e))))
        return tuple(found)


def drawing(family: Sequence[Member]) -> Drawing:
    """The boxes of the first of members with the same signature, with the names that each member has for them."""
    first = family[0]
    place = {e: i for i, e in enumerate(first.elements)}
    nodes = []
    for i, e in enumerate(first.elements):
        several = [member.elements[i] for member in family]
        made = box(e, first.label(e))
        made.args = list(dict.fromkeys(place[a] for a in first.args(e)))
        made.note = texts([x.note for x in several])
        made.origin = texts([x.node.name if x.node is not None else x.name for x in several])
        made.groups, made.kept = first.groups[e], first.stays(e)
        nodes.append(made)
    groups = sorted({g for found in first.groups.values() for g in found})
    return Drawing(nodes, [member.name for member in family], [member.shape for member in family], groups)


def box(e: Element, label: str) -> Node:
    """An element as a box without arguments."""
    if e.node is None:
        return Node("leaf", label, origin=e.name, scalar=not e.tensor)
    if e.owner == SEVERAL:
        return Node("port", e.name, origin=e.node.name, scalar=not e.tensor, to=-1)
    return operation(e)


def operation(e: Element) -> Node:
    """The box of an operation."""
    name = e.node.name if e.node is not None else ""
    source = call_site(e.node.meta.get("stack_trace")) if e.node is not None else ""
    return Node("op", e.name, [], e.note, name, source, scalar=not e.tensor, listed=e.index is not None)


def texts(each: list[str]) -> Texts:
    """One text where all are the same."""
    return each[0] if len(set(each)) == 1 else each


def call_site(trace: Any) -> str:
    """The innermost line of a stack trace, with the path from the package on: `torch/optim/adam.py:769  code`."""
    found = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', str(trace or ""))
    if not found:
        return ""
    path, line, code = found[-1]
    path = path.replace("\\", "/")
    _, packages, below = path.rpartition("/site-packages/")
    return f"{below if packages else path.rpartition('/')[2]}:{line}  {code.strip()}"


def plain(name: str) -> str:
    """A leaf's name as the user would write it, as far as Dynamo's name allows."""
    found = re.search(r"param_groups_+(\d+)_+params_+(\d+)(_+grad)?", name)
    if found:
        return f"param_groups[{found[1]}].params[{found[2]}]{'.grad' if found[3] else ''}"
    return re.sub(r"^[lLgG]_|_+$", "", name) or name
