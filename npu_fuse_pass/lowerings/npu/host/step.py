"""The host's record of one call of an NPU program."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fuse_pass.lowerings.npu.host import mirror
from npu_fuse_pass.lowerings.npu.host.counters import AdvancedState, HostStates, OutgoingStates

Key = tuple[int, torch.dtype, torch.device]

Leaves = tuple[int, ...]
"""The leaves behind one input of the graph: one, or those of a span, which are contiguous."""


class HostStep:
    """One call: its numbers, the graph's inputs, and the writes to do after it ran."""

    def __init__(self, complete: bool) -> None:
        self.complete = complete
        self.active: list[list[bool]] = []  # per group and member: takes part
        self.numbers: list[list[list[Tensor]]] = []  # per group, split and value: 0-dim or one per member
        self.advanced: list[tuple[HostStates, AdvancedState, list[bool]]] = []
        self.outgoing: list[OutgoingStates] = []
        self.inputs: list[Tensor] = []
        self.flat: dict[Leaves, Tensor] = {}
        self.used: dict[Leaves, Tensor] = {}  # the tensors behind the inputs, of members that take part
        self.copies = 0
        self.made: dict[int, Tensor] = {}  # leaves that the step makes, as inputs of generated kernels
        self.orders: dict[int, tuple[bool, tuple[int, ...]]] = {}  # per tensor: takes part, strides it is read in
        self.copy_back: list[tuple[Tensor, Tensor]] = []

    def send(self, numbers: Tensor, device: torch.device) -> Tensor:
        """Send numbers to a device, together with new values of states of the same dtype there."""
        for outgoing in self.outgoing:
            if (outgoing.dtype, outgoing.device) == (numbers.dtype, device):
                return outgoing.send_with(numbers)
        return mirror.to_device(numbers, device)

    @property
    def all_numbers(self) -> list[list[Tensor]]:
        """Per group: the numbers of its members."""
        return [[v for found in group for v in found] for group in self.numbers]
