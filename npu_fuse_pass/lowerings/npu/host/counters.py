"""0-dim states that the host advances (step counters), and the writes of their new values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.types import Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.host import mirror as npu_mirror
from npu_fuse_pass.lowerings.npu.host.mirror import Kind, Mirror
from npu_fuse_pass.tensors.memory import copy_each


@dataclasses.dataclass(frozen=True, eq=False)
class AdvancedState:
    """New values of a 0-dim state, of shape () or (members,); `row`: one vector over all members' memory for it."""

    slot: int
    value: Tensor
    row: Tensor | None


class HostStates:
    """The tensors of a slot that the host writes: one per member, in host memory or on a device."""

    def __init__(self, group: Group, leaves: Sequence[Leaf], slot: int) -> None:
        self._indices = [m[slot] for m in group.members]
        self._made = [leaves[i].kind == "output" for i in self._indices]
        self._dtypes = [leaves[i].dtype for i in self._indices]
        self._here: list[int] = []  # members
        self._there: dict[Kind, list[int]] = {}
        for m, leaf in enumerate(leaves[i] for i in self._indices):
            found = self._here if leaf.device.type == "cpu" else self._there.setdefault((leaf.dtype, leaf.device), [])
            found.append(m)

    def write(self, new: AdvancedState, active: Sequence[bool], values: LeafValues) -> None:
        """Write the states in host memory; create those that the step makes."""
        if new.row is not None and all(active):
            new.row.copy_(new.value)
            return
        each = new.value.expand(len(active)).unbind() if self._here else ()
        chosen: list[tuple[Tensor, Tensor]] = []
        for m in self._here:
            i = self._indices[m]
            if self._made[m]:
                values[i] = each[m].to(self._dtypes[m], copy=True)
            elif active[m] and (target := values[i]) is not None:
                chosen.append((target, each[m]))
        if chosen:
            copy_each([t for t, _ in chosen], [x for _, x in chosen])

    def outgoing(self, new: AdvancedState, active: Sequence[bool]) -> list[tuple[Kind, list[int], Tensor]]:
        """For the states on devices: dtype and device, leaves, values."""
        found = []
        for kind, members in self._there.items():
            if not all(active):
                members = [m for m in members if active[m] or self._made[m]]
            values = new.value.expand(len(active))
            if len(members) < len(active):
                values = values[torch.tensor(members, dtype=torch.int64, device="cpu")]
            found.append((kind, [self._indices[m] for m in members], values))
        return found


class OutgoingStates:
    """New values for states of one dtype on one device, sent in one transfer."""

    def __init__(self, kind: Kind, written: Sequence[tuple[list[int], Tensor]]) -> None:
        self.dtype, self.device = kind
        self._indices = [i for indices, _ in written for i in indices]
        self.values = torch.cat([x.to(self.dtype) for _, x in written])
        self.sent: Tensor | None = None  # the values on the device, if already sent

    def send_with(self, numbers: Tensor) -> Tensor:
        """Send them in one transfer with numbers of the same dtype. Returns the numbers on the device."""
        both = npu_mirror.to_device(torch.cat([numbers, self.values]), self.device)
        self.sent = both[len(numbers) :]
        return both[: len(numbers)]

    def write(self, values: LeafValues, mirror: Mirror) -> None:
        """Write the states; create those that the step makes."""
        sent = npu_mirror.to_device(self.values, self.device) if self.sent is None else self.sent
        kept: list[tuple[int, int]] = []  # where among these values, and in the mirror
        targets: list[Tensor] = []
        each = sent.unbind()
        for k, i in enumerate(self._indices):
            if i not in mirror.places:
                values[i] = each[k].clone()
            elif (target := values[i]) is not None:
                kept.append((k, mirror.places[i]))
                targets.append(target)
        if targets:
            copy_each(targets, [each[k] for k, _ in kept])
            written = torch.tensor([k for k, _ in kept], dtype=torch.int64, device="cpu")
            mirror.wrote(values, [place for _, place in kept], self.values[written])
