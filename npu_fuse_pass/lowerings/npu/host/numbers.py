"""The numbers of a step: evaluated on the host for all members of a group, and packed for the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.types import Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.emit.split import Split, slots_of
from npu_fuse_pass.lowerings.npu.host.counters import AdvancedState
from npu_fuse_pass.lowerings.npu.host.mirror import Mirror
from npu_fuse_pass.lowerings.npu.host.scalars import ScalarVector
from npu_fuse_pass.lowerings.npu.plan import Span


class HostValues:
    """The host's part of one split, for all members at once."""

    def __init__(self, group: Group, made: Split, leaves: Sequence[Leaf], mirror: Mirror) -> None:
        self.made = made
        slots = _slots(made, made.host.roots)
        self._columns = {s: _Column([m[s] for m in group.members], leaves, mirror) for s in slots}
        self._numel = torch.tensor(numels(group, leaves), dtype=torch.float64, device="cpu")

    def __call__(self, values: LeafValues) -> tuple[list[Tensor], list[AdvancedState]]:
        """Evaluate `made.values` (float64, of shape () or (members,)), and the new values of 0-dim states."""
        given = {s: c.of(values) for s, c in self._columns.items()}
        found, new = self.made.host_values({s: column for s, (column, _) in given.items()}, self._numel)
        rows = {s: row for s, (_, row) in given.items()}
        advanced = [AdvancedState(s, x, rows.get(s)) for (s, _), x in zip(self.made.advanced, new, strict=True)]
        return [v.double() for v in found], advanced


class PackedNumbers:
    """The places of a split's numbers in the packed vector: one of each value for every span that needs its own."""

    def __init__(self, group: Group, made: Split, spans: Sequence[Span], offset: int) -> None:
        self.made = made
        self._rows: list[Tensor] = []
        self.positions: list[list[int]] = []  # per value: index for every span
        self.count = 0
        for e in made.values:
            keys: dict[tuple[int, ...], int] = {}
            rows: list[int] = []
            self.positions.append([])
            counts = any(x.op == "numel" for x in postorder([e]))
            for span in spans:
                key = tuple(group.members[span.members[0]][s] for s in _slots(made, [e]))
                if counts:
                    key = (*key, -1 - span.members[0])  # the members' sizes
                if key not in keys:
                    keys[key] = offset + self.count + len(rows)
                    rows.append(span.members[0])
                self.positions[-1].append(keys[key])
            self._rows.append(torch.tensor(rows, dtype=torch.int64, device="cpu"))
            self.count += len(rows)
        self._flags = [span.members[0] for span in spans] if made.flagged else []
        if self._flags:
            self.positions.append([offset + self.count + k for k in range(len(self._flags))])
        self.count += len(self._flags)

    def pieces(self, found: Sequence[Tensor], active: Sequence[bool]) -> list[Tensor]:
        """The pieces of the packed vector. `found`: results of `HostValues`; `active`: members that take part."""
        chosen = [v.expand(len(rows)) if v.ndim == 0 else v[rows] for v, rows in zip(found, self._rows, strict=True)]
        return [*chosen, torch.tensor([float(active[m]) for m in self._flags], dtype=torch.float64, device="cpu")]


class NumberTable:
    """The numbers of a group with generated kernels in the packed vector: a row per member."""

    def __init__(self, group: Group, made: Split, offset: int) -> None:
        self.made, self.first, self._members = made, offset, len(group.members)
        self.count = max(1, self._members * len(made.values))  # a node has numbers in any case

    def pieces(self, found: Sequence[Tensor], active: Sequence[bool]) -> list[Tensor]:
        """As those of `PackedNumbers`."""
        if not found:
            return [torch.zeros(1, dtype=torch.float64, device="cpu")]
        return [torch.stack([v.expand(self._members) for v in found], dim=1).flatten()]


def numels(group: Group, leaves: Sequence[Leaf]) -> list[int]:
    """The number of elements of every member's tensors."""
    first = group.formula.tensor_slots[:1]
    return [math.prod(leaves[member[s]].shape) for member in group.members for s in first] or [1]


def _slots(made: Split, exprs: Sequence[Expr]) -> list[int]:
    """The slots of members that expressions read."""
    return sorted({s for e in exprs for s in slots_of(e)} - made.constants.keys())


class _Column:
    """A scalar slot over all members: one 0-dim tensor where they share it, else one value per member."""

    def __init__(self, indices: list[int], leaves: Sequence[Leaf], mirror: Mirror) -> None:
        self._indices = indices[:1] if len(set(indices)) == 1 else indices
        numbers = [leaves[i].value if leaves[i].kind == "constant" else None for i in self._indices]
        self._numbers = [None if n is None else torch.tensor(n, dtype=torch.float64, device="cpu") for n in numbers]
        self._mirror = mirror
        places = [mirror.places[i] for i in self._indices if i in mirror.places]
        self._mirrored = torch.tensor(places, dtype=torch.int64, device="cpu") if len(places) == len(numbers) else None
        here = all(leaves[i].device.type == "cpu" and leaves[i].kind != "constant" for i in self._indices)
        self._row = ScalarVector(self._indices) if here else None

    def of(self, values: LeafValues) -> tuple[Tensor, Tensor | None]:
        """The values in float64, and one vector over the memory of all if they are contiguous."""
        row = None if self._row is None else self._row.of(values)
        if row is not None:
            column = row.to("cpu", torch.float64, copy=True)  # the step writes there, too
        elif self._mirrored is not None:
            column = self._mirror.values[self._mirrored]
        else:
            given = [self._value(i, n, values) for i, n in zip(self._indices, self._numbers, strict=True)]
            column = torch.stack([t for t in given if t is not None]).cpu().double()
        return column[0] if len(self._indices) == 1 else column, row

    def _value(self, index: int, number: Tensor | None, values: LeafValues) -> Tensor | None:
        if index in self._mirror.places:
            return self._mirror.values[self._mirror.places[index]]
        return values[index] if number is None else number
