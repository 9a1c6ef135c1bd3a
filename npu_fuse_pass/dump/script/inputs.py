"""The leaves of a step as the arguments of a function: lists named like the slots of groups, `param`, `grad`, …"""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Iterator

from torch import fx

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.script.loops import Place
from npu_fuse_pass.ir.types import Leaf

_GIVEN = ("input", "attribute")
_WORDS = ("torch", "math", "operator", "i")  # of the code around


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments: name -> leaves; `places` says where every leaf is."""

    lists: dict[str, list[int]]
    single: dict[str, int]
    places: dict[int, Place]

    @property
    def names(self) -> list[str]:
        return [*self.lists, *self.single]

    @property
    def lengths(self) -> dict[str, int]:
        return {name: len(indices) for name, indices in self.lists.items()}


def inputs_of(contents: Contents) -> Inputs:
    """Every leaf that is given to the step gets a name."""
    made = Inputs({}, {}, {})
    taken = set(_WORDS)
    for label, indices in _columns(contents):
        name = _new_name(label, taken)
        if len(indices) == 1:
            made.single[name] = indices[0]
            made.places[indices[0]] = Place(name)
        else:
            made.lists[name] = indices
            made.places.update({index: Place(name, (k,)) for k, index in enumerate(indices)})
    return made


def original_places(contents: Contents, graph: fx.Graph, inputs: Inputs) -> dict[fx.Node, Place]:
    """Where the inputs of the captured graph are."""
    arguments = {leaf.index: i for i, leaf in _given(contents) if leaf.kind == "input" and leaf.optimizer is None}
    attributes = {leaf.name: i for i, leaf in _given(contents) if leaf.kind == "attribute"}
    found = {n: arguments[k] for k, n in enumerate(graph.find_nodes(op="placeholder")) if k in arguments}
    found |= {n: attributes[n.target] for n in graph.find_nodes(op="get_attr") if n.target in attributes}
    return {node: inputs.places[leaf] for node, leaf in found.items()}


def fused_places(contents: Contents, graph: fx.Graph, inputs: Inputs) -> dict[fx.Node, Place]:
    """Where the inputs of the rewritten graph are: its placeholders are the leaves in order."""
    nodes = graph.find_nodes(op="placeholder")
    return {node: inputs.places[leaf] for node, (leaf, _) in zip(nodes, _given(contents), strict=True)}


def _given(contents: Contents) -> Iterator[tuple[int, Leaf]]:
    for i, leaf in enumerate(contents.grouped.leaves):
        if leaf.kind in _GIVEN:
            yield i, leaf


def _columns(contents: Contents) -> Iterator[tuple[str, list[int]]]:
    """Leaves that belong together: those of one slot of a group, then what no group has."""
    leaves = contents.grouped.leaves
    seen: set[int] = set()
    for group in contents.grouped.all_groups:
        for slot, label in enumerate(group.labels):
            new = [i for i in dict.fromkeys(m[slot] for m in group.members) if i not in seen]
            new = [i for i in new if leaves[i].kind in _GIVEN]
            seen.update(new)
            if new:
                yield label, new
    alike: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.kind in _GIVEN and i not in seen:
            alike.setdefault(re.sub(r"_?\d+", "", leaf.name), []).append(i)
    yield from alike.items()


def identifier(label: str) -> str:
    """A label as a name in Python: betas[0] is betas_0."""
    name = re.sub(r"\W+", "_", label).strip("_")
    return f"_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name


def _new_name(label: str, taken: set[str]) -> str:
    name = first = identifier(label)
    number = 2
    while name in taken:
        name, number = f"{first}_{number}", number + 1
    taken.add(name)
    return name
