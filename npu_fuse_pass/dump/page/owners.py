"""Leaves by parameter: its gradient, its states, temporaries between fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.ir.disjoint import Disjoint
from npu_fuse_pass.ir.types import Call, Group, GroupedSegment, Leaf, references


class Owners:
    """Parameters by number, in the order of the groups' members.

    Attributes:
        of_leaf: the parameter that a leaf belongs to, by index; leaves of several or of none are missing.
        members: for every parameter its places in the groups: pairs of a group's and a member's number.
    """

    def __init__(self, leaves: Sequence[Leaf], groups: Sequence[Group], segments: Sequence[GroupedSegment]) -> None:
        """`groups`: those of all segments and of the last."""
        self._leaves = leaves
        self._sets = Disjoint()
        places = [(g, m, member) for g, group in enumerate(groups) for m, member in enumerate(group.members)]
        for _, _, member in places:
            self._join([i for i in member if leaves[i].shape])
        for _ in segments:  # what a call gives may be an argument of the next segment's
            for segment in segments:
                for call in segment.calls:
                    self._join_results(call)
        self._join_counters([member for _, _, member in places])
        numbers: dict[int, int] = {}
        self.members: list[list[tuple[int, int]]] = []
        for g, m, member in places:
            number = numbers.setdefault(self._root(member), len(numbers))
            if number == len(self.members):
                self.members.append([])
            self.members[number].append((g, m))
        roots = ((i, self._sets.find(i)) for i in range(len(leaves)))
        self.of_leaf = {i: numbers[root] for i, root in roots if root in numbers}

    def _root(self, member: Sequence[int]) -> int:
        tensor = next((i for i in member if self._leaves[i].shape), None)
        own = next((i for i in member if self._leaves[i].kind not in ("constant", "total")), member[0])
        return self._sets.find(own if tensor is None else tensor)

    def _join(self, leaves: Sequence[int]) -> None:
        for i in leaves[1:]:
            self._sets.join(i, leaves[0])

    def _join_results(self, call: Call) -> None:
        """Assign an operation's results to the parameter that its tensors belong to."""
        read = [ref.index for ref in references((call.args, call.kwargs)) if self._leaves[ref.index].shape]
        if read and len({self._sets.find(i) for i in read}) == 1:
            self._join([read[0], *(i for i in call.results if self._leaves[i].shape)])

    def _join_counters(self, members: Sequence[Sequence[int]]) -> None:
        """Assign 0-dim leaves that only one parameter reads (step counters) to it."""
        users: dict[int, set[int]] = {}
        for member in members:
            tensor = next((i for i in member if self._leaves[i].shape), None)
            if tensor is not None:
                for i in member:
                    if not self._leaves[i].shape and self._leaves[i].kind in ("input", "attribute"):
                        users.setdefault(i, set()).add(self._sets.find(tensor))
        for leaf, found in users.items():
            if len(found) == 1:
                self._sets.join(leaf, found.pop())
