"""The step of a rule optimizer before fusing: the traced operations of its rule."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import written_leaf
from npu_fuse_pass.dump.page.drawing import Before, Drawing, Node, Texts
from npu_fuse_pass.dump.page.families import plain, texts
from npu_fuse_pass.ir.expr import DTYPE_NAMES, Expr, postorder
from npu_fuse_pass.ir.types import Group, Leaf


def of_formulas(contents: Contents) -> Before:
    """One drawing for each group; a family is a group's members."""
    leaves = contents.grouped.leaves
    drawings = [_drawing(g, number, leaves) for number, g in enumerate(contents.grouped.groups)]
    operations = sum(len(d.members) * sum(node.kind == "op" for node in d.nodes) for d in drawings)
    totals = _totals(contents.grouped.groups, drawings)
    return Before(drawings, totals, operations)


def _drawing(group: Group, number: int, leaves: Sequence[Leaf]) -> Drawing:
    nodes: list[Node] = []
    boxes: dict[int, int] = {}
    for e in postorder(group.formula.roots):
        if e.op == "leaf":
            assert isinstance(e.value, int)
            if _kind(group, e.value, leaves) == "constant":
                continue  # a number of the operations that read it
            made = _leaf(group, e.value, leaves)
        elif e.op == "cast" and not e.tensor and id(e.args[0]) in boxes:
            boxes[id(e)] = boxes[id(e.args[0])]  # how a number is rounded says little
            continue
        else:
            args = [boxes[id(a)] for a in e.args if id(a) in boxes]
            note = _note(e, group, leaves)
            made = Node("op", e.op, list(dict.fromkeys(args)), note, groups=[number], scalar=not e.tensor)
        boxes[id(e)] = len(nodes)
        nodes.append(made)
    for e, total in zip(group.formula.contributions, group.totals[0], strict=True):
        nodes.append(Node("port", f"total_{total}", [boxes[id(e)]] if id(e) in boxes else [], scalar=True, to=-1))
    members = [written_leaf(group.formula, group.labels, leaves, member) for member in group.members]
    return Drawing(nodes, [plain(leaf.name) for leaf in members], [leaf.shape for leaf in members], [number])


def _kind(group: Group, slot: int, leaves: Sequence[Leaf]) -> str:
    return leaves[group.members[0][slot]].kind


def _leaf(group: Group, slot: int, leaves: Sequence[Leaf]) -> Node:
    names = texts([leaves[m[slot]].name for m in group.members])
    scalar = not group.formula.slots[slot].tensor
    if _kind(group, slot, leaves) == "total":
        return Node("port", str(leaves[group.members[0][slot]].name), origin=names, scalar=True, to=-1)
    return Node("leaf", group.labels[slot], origin=names, scalar=scalar)


def _note(e: Expr, group: Group, leaves: Sequence[Leaf]) -> Texts:
    """An operation's numbers."""
    if e.op == "cast":
        return DTYPE_NAMES[e.dtype]
    slots = [a.value for a in e.args if a.op == "leaf" and isinstance(a.value, int)]
    constant = [s for s in slots if _kind(group, s, leaves) == "constant"]
    return texts([" ".join(f"{leaves[m[s]].value:.6g}" for s in constant) for m in group.members])


def _totals(groups: Sequence[Group], drawings: list[Drawing]) -> Drawing | None:
    """The drawing of the totals over parameters."""
    users = {
        total: [i for i, g in enumerate(groups) if any(total in t for t in g.totals)]
        for total in sorted({t for g in groups for totals in g.totals for t in totals})
    }
    nodes: list[Node] = []
    for total, contributing in users.items():
        ports = range(len(nodes), len(nodes) + len(contributing))
        nodes += [Node("port", "contribution", scalar=True, to=i) for i in contributing]
        count = sum(len(drawings[i].members) for i in contributing)
        note = f"over {count} parameters"
        nodes.append(Node("op", f"total_{total}", list(ports), note, groups=contributing, scalar=True))
    return Drawing(nodes, [], [], []) if nodes else None
