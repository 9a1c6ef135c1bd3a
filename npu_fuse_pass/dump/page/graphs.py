"""The step before fusing, drawn for one parameter of every family.

A family is all parameters that the same operations update and that the same groups take: one drawing stands for them.
Computations over several parameters (a global norm) are a separate drawing. Every operation has the fused nodes that it
became part of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.page.drawing import Before, Drawing, Node
from npu_fuse_pass.dump.page.elements import SEVERAL, Element, Flow
from npu_fuse_pass.dump.page.families import Member, box, drawing, operation, plain
from npu_fuse_pass.dump.page.formulas import of_formulas
from npu_fuse_pass.dump.page.owners import Owners
from npu_fuse_pass.ir.types import Group, Leaf, references

_CHAIN = 8  # elements over several parameters beyond which those of one operation in a row are drawn as one


def before(contents: Contents) -> Before:
    """The operations before fusing: those that were captured; of a rule optimizer, those of its rule."""
    return of_formulas(contents) if contents.original is None else _Provenance(contents).before()


class _Provenance:
    """The families of a captured graph."""

    def __init__(self, contents: Contents) -> None:
        assert contents.original is not None
        self._leaves = contents.grouped.leaves
        self._groups = contents.grouped.all_groups
        self._owners = Owners(self._leaves, self._groups, contents.grouped.segments)
        named = {leaf.name: i for i, leaf in enumerate(self._leaves) if leaf.kind in ("input", "attribute")}
        owners = {name: self._owners.of_leaf.get(i) for name, i in named.items()}
        self._flow = Flow(contents.original, owners, {name for name, i in named.items() if self._leaves[i].shape})
        self._kept = {call.node: call for segment in contents.grouped.segments for call in segment.calls}
        self._stored = self._last_values()
        self._exports: dict[int, list[Element]] = {}  # elements of a parameter that shared computations read
        for e in self._flow.elements:
            for a in e.args if e.owner == SEVERAL else ():
                if a.owner is not None and a.owner != SEVERAL:
                    self._exports.setdefault(a.owner, []).append(a)

    def before(self) -> Before:
        """The drawings of all families, in the order of their first parameters."""
        found: dict[object, list[Member]] = {}
        for owner, places in enumerate(self._owners.members):
            member = self._member(owner, places)
            key = (tuple(g for g, _ in places), member.signature())
            found.setdefault(key, []).append(member)
        firsts = [family[0] for family in found.values()]
        return Before([*map(drawing, found.values())], self._shared(firsts), len(self._flow.elements))

    def _member(self, owner: int, places: Sequence[tuple[int, int]]) -> Member:
        labels: dict[str, str] = {}
        for g, m in places:
            for leaf, label in zip(self._groups[g].members[m], self._groups[g].labels, strict=True):
                labels.setdefault(self._leaves[leaf].name, label)
        member = Member(*named(self._groups, places, self._leaves), labels, self._kept)
        exports = self._exports.get(owner, [])
        for g, m in places:
            group = self._groups[g]
            written = [self._stored.get(group.members[m][slot]) for slot in group.formula.written]
            for e in (*written, *(exports if group.formula.contributions else ())):
                if e is not None:
                    member.add(e, g)
        for e in exports:
            member.add(e, None)
        return member

    def _last_values(self) -> dict[int, Element]:
        """The element stored in every leaf that a group writes: at the end, or for an original operation."""
        stored: dict[int, Element] = {}
        for i, leaf in enumerate(self._leaves):
            if leaf.kind in ("input", "attribute") and leaf.name in self._flow.last:
                stored[i] = self._flow.last[leaf.name]
        for name, call in self._kept.items():
            for ref, e in zip(references((call.args, call.kwargs)), self._flow.given.get(name, ()), strict=False):
                if self._leaves[ref.index].kind == "temporary":
                    stored[ref.index] = e
        outputs = {leaf.index: i for i, leaf in enumerate(self._leaves) if leaf.kind == "output"}
        stored |= {outputs[i]: e for i, e in enumerate(self._flow.returned) if e is not None and i in outputs}
        return stored

    def _shared(self, firsts: Sequence[Member]) -> Drawing | None:
        """The drawing of computations over several parameters; a chain of one operation (Python's sum) is one box."""
        number = {e: f for f, first in enumerate(firsts) for e in first.elements}
        several = [e for e in self._flow.elements if e.owner == SEVERAL]
        nodes: list[Node] = []
        boxes: dict[Element, int] = {}
        for e in several:
            chain = next((boxes[a] for a in e.args if a in boxes and nodes[boxes[a]].name == e.name), None)
            if chain is not None and len(several) > _CHAIN:
                boxes[e] = chain
                nodes[chain].count += 1
                continue
            args = [_shared_arg(a, nodes, boxes, number) for a in e.args]
            boxes[e] = len(nodes)
            made = operation(e)
            made.kept = e.node is not None and e.node.name in self._kept
            made.args = list(dict.fromkeys(i for i in args if i is not None))
            made.groups = [] if made.kept else _takers(self._groups)
            nodes.append(made)
        return Drawing(nodes, [], [], []) if nodes else None


def _takers(groups: Sequence[Group]) -> list[int]:
    """Groups that add to totals or read them, and so compute over several parameters."""
    return [i for i, g in enumerate(groups) if g.formula.contributions or any("total" in x for x in g.labels)]


def _shared_arg(a: Element, nodes: list[Node], boxes: dict[Element, int], number: Mapping[Element, int]) -> int | None:
    """The box of an argument; one port stands for a family, at its first parameter."""
    if a not in boxes:
        if a.owner is not None:
            if a not in number:
                return None
            made = Node("port", a.name, scalar=not a.tensor, to=number[a])
        else:
            made = box(a, plain(a.name))
        boxes[a] = len(nodes)
        nodes.append(made)
    return boxes[a]


def named(
    groups: Sequence[Group], places: Sequence[tuple[int, int]], leaves: Sequence[Leaf]
) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape."""
    tensors = [
        (label, leaves[groups[g].members[m][slot]])
        for g, m in reversed(places)
        for slot, label in sorted(enumerate(groups[g].labels), key=lambda s: s[0] not in groups[g].formula.written)
        if leaves[groups[g].members[m][slot]].kind in ("input", "attribute", "output")
    ]
    tensors.sort(key=lambda t: (t[0] != "param", t[0] == "grad", not t[1].shape))
    return (plain(tensors[0][1].name), tensors[0][1].shape) if tensors else ("?", ())
