"""The data of the drawings of a step, before fusing and after."""

from __future__ import annotations

import dataclasses

# one text for all members of a family, or one for each
Texts = str | list[str]


@dataclasses.dataclass
class Node:
    """One box: an operation, a leaf, or a port to another drawing; of the fused step also a list of leaves.

    Attributes:
        kind: "op", "leaf" or "port"; of the fused step "leaf", "fused", "contribute", "total", "kept" or "written".
        name: the operation's, or the role of a leaf for its parameter.
        args: boxes of this drawing, by number.
        note: an operation's numbers.
        origin: the name of the captured graph's node, or of the leaf, or of all that it stands for.
        source: file, line and text of the code that called the operation.
        groups: fused nodes that it became part of, by number.
        group: the number of the fused node that it is, or that contributes.
        scalar: it has one value for each parameter.
        listed: it is one entry of a list operation.
        kept: it stays as it is.
        count: number of repetitions in a row, or of leaves or calls that it stands for.
        to: the drawing that a port leads to; -1: that of all parameters together.
    """

    kind: str
    name: str
    args: list[int] = dataclasses.field(default_factory=list)
    note: Texts = ""
    origin: Texts = ""
    source: str = ""
    groups: list[int] = dataclasses.field(default_factory=list)
    group: int | None = None
    scalar: bool = False
    listed: bool = False
    kept: bool = False
    count: int = 1
    to: int | None = None


@dataclasses.dataclass
class Drawing:
    """Boxes, and the parameters that they are drawn for; `groups` are the fused nodes that update them."""

    nodes: list[Node]
    members: list[str]
    shapes: list[tuple[int, ...]]
    groups: list[int]


@dataclasses.dataclass
class Before:
    """All drawings; `shared` is that of several parameters. `operations`: on one tensor each, in the whole step."""

    families: list[Drawing]
    shared: Drawing | None
    operations: int
