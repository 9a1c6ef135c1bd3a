"""The host's half of a step, before tensors are bound: the numbers of all members, and which take part."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from npu_fuse_pass.ir.types import Leaf, LeafValues
from npu_fuse_pass.lowerings.npu.host.counters import HostStates, OutgoingStates
from npu_fuse_pass.lowerings.npu.host.mirror import Kind, Mirror
from npu_fuse_pass.lowerings.npu.host.numbers import HostValues
from npu_fuse_pass.lowerings.npu.host.scalars import picked
from npu_fuse_pass.lowerings.npu.host.step import HostStep
from npu_fuse_pass.lowerings.npu.lowered_group import LoweredGroup


class Host:
    """The host's part of a step."""

    def __init__(self, leaves: Sequence[Leaf], groups: Sequence[LoweredGroup]) -> None:
        self._leaves, self._groups = leaves, groups
        self._mirror = Mirror(sorted({i for lowered in groups for i in lowered.device_scalars}), leaves)
        self._evaluate = [
            [HostValues(lowered.group, made, leaves, self._mirror) for made in lowered.splits] for lowered in groups
        ]
        self._states = [
            {s: HostStates(lowered.group, leaves, s) for made in lowered.splits for s, _ in made.advanced}
            for lowered in groups
        ]
        self._given = [[self._given_to(m) for m in lowered.group.members] for lowered in groups]
        self._all_given = [picked(sorted({i for given in each for i in given})) for each in self._given]

    @torch.no_grad()
    def prepare(self, values: LeafValues, complete: bool) -> HostStep:
        """Compute the numbers and active members of a step.

        Args:
            values: of all leaves; None for a gradient that is missing.
            complete: check dtypes too.
        """
        step = HostStep(complete)
        self._mirror.update(values)
        each = zip(self._evaluate, self._given, self._all_given, self._states, strict=True)
        for evaluate, given, whole, states in each:
            all_given = all(map(operator.is_not, whole(values), repeat(None)))
            active = [all_given or all(values[i] is not None for i in leaves) for leaves in given]
            found = [e(values) for e in evaluate]
            step.active.append(active)
            step.numbers.append([n for n, _ in found])
            step.advanced += [(states[new.slot], new, active) for _, advanced in found for new in advanced]
        written: dict[Kind, list[tuple[list[int], Tensor]]] = {}
        for state, new, active in step.advanced:
            for kind, indices, x in state.outgoing(new, active):
                written.setdefault(kind, []).append((indices, x))
        step.outgoing = [OutgoingStates(kind, found) for kind, found in written.items()]
        return step

    def finish(self, step: HostStep, values: LeafValues) -> None:
        """Write the new values of 0-dim states, in host memory and on devices."""
        for state, new, active in step.advanced:
            state.write(new, active, values)
        for outgoing in step.outgoing:
            outgoing.write(values, self._mirror)

    def _given_to(self, member: tuple[int, ...]) -> list[int]:
        """The leaves that a member needs to take part."""
        return [i for i in member if self._leaves[i].kind in ("input", "attribute")]
