"""The step after fusing as boxes: leaves in lists, fused nodes, totals, original operations, written leaves."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import called
from npu_fuse_pass.dump.page.drawing import Node
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.types import Call, Group, Leaf, references


def after(contents: Contents) -> list[Node]:
    """The boxes, arguments before their readers."""
    return _After(contents.grouped.leaves).run(contents)


class _After:
    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._boxes: list[Node] = []
        self._lists: dict[tuple[int, ...], int] = {}
        self._made: dict[int, int] = {}  # leaf that the step makes -> the box that makes it
        self._totals: dict[int, int] = {}
        self._number = 0

    def run(self, contents: Contents) -> list[Node]:
        for segment in contents.grouped.segments:
            self._fuse(segment.groups)
            self._calls(segment.calls)
        self._add_totals(contents.grouped.groups)
        self._fuse(contents.grouped.groups)
        return self._boxes

    def _add(self, made: Node) -> int:
        made.args = list(dict.fromkeys(made.args))
        self._boxes.append(made)
        return len(self._boxes) - 1

    def _fuse(self, groups: Sequence[Group]) -> None:
        boxes = []
        for group in groups:
            read = self._reads(group, range(len(group.formula.slots)))
            boxes.append(self._add(Node("fused", group.name, read, group=self._number, count=len(group.members))))
            self._number += 1
        for group, box in zip(groups, boxes, strict=True):
            for slot in group.formula.written:
                self._write(group, slot, box)

    def _write(self, group: Group, slot: int, box: int) -> None:
        leaves = list(dict.fromkeys(m[slot] for m in group.members))
        if self._leaves[leaves[0]].kind == "temporary":
            self._made |= dict.fromkeys(leaves, box)
            return
        name, scalar = f"{group.labels[slot]}'", not group.formula.slots[slot].tensor
        self._add(Node("written", name, [box], origin=self._names(leaves), scalar=scalar, count=len(leaves)))

    def _reads(self, group: Group, slots: Sequence[int]) -> list[int]:
        """The boxes that a group reads in these slots."""
        found: list[int] = []
        for slot in slots:
            leaves = list(dict.fromkeys(m[slot] for m in group.members))
            kinds = {self._leaves[i].kind for i in leaves}
            if kinds <= {"constant", "output", "temporary"} and not set(leaves) & self._made.keys():
                continue  # numbers of the formula; tensors that the step makes
            if kinds == {"total"}:
                found += [self._totals[self._leaves[i].index] for i in leaves if self._leaves[i].index in self._totals]
            elif kinds & {"temporary", "result"}:
                found += [self._made[i] for i in leaves if i in self._made]
            else:
                found.append(self._list(leaves, group.labels[slot], not group.formula.slots[slot].tensor))
        return found

    def _list(self, leaves: list[int], label: str, scalar: bool) -> int:
        key = tuple(leaves)
        if key not in self._lists:
            made = Node("leaf", label, origin=self._names(leaves), scalar=scalar, count=len(leaves))
            self._lists[key] = self._add(made)
        return self._lists[key]

    def _names(self, leaves: Sequence[int]) -> list[str]:
        return [self._leaves[i].name for i in leaves]

    def _calls(self, calls: Sequence[Call]) -> None:
        """Add original operations, one box per name."""
        by_name: dict[str, list[Call]] = {}
        for call in calls:
            by_name.setdefault(called(call).removesuffix(".default"), []).append(call)
        for name, several in by_name.items():
            read = []
            for call in several:
                for ref in references((call.args, call.kwargs)):
                    if ref.index in self._made:
                        read.append(self._made[ref.index])
                    elif self._leaves[ref.index].kind in ("input", "attribute"):
                        read.append(self._list([ref.index], self._leaves[ref.index].name, False))
            box = self._add(Node("kept", name, read, origin=[call.node for call in several], count=len(several)))
            self._made |= dict.fromkeys([i for call in several for i in call.results], box)

    def _add_totals(self, groups: Sequence[Group]) -> None:
        """Add totals in order of dependence."""
        parts: dict[int, list[tuple[int, Group, int]]] = {}
        for offset, group in enumerate(groups):
            for k in range(len(group.formula.contributions)):
                for total in sorted({numbers[k] for numbers in group.totals}):
                    parts.setdefault(total, []).append((self._number + offset, group, k))
        for total in sorted(parts):
            args = []
            for number, group, k in parts[total]:
                below = postorder([group.formula.contributions[k]])
                read = self._reads(group, [e.value for e in below if e.op == "leaf" and isinstance(e.value, int)])
                args.append(self._add(Node("contribute", group.name, read, group=number, count=len(group.members))))
            self._totals[total] = self._add(Node("total", f"total_{total}", args, scalar=True))
