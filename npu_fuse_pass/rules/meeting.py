"""How processes that hold parts of the same parameters keep together, where a step has to communicate.

A step with norms of whole parameters runs fused in all of these processes or in none, and that with the same
collectives: a process that cannot run it fused must not leave the others waiting. They agree before the first step and
whenever one of them wants another step than the one agreed on. Until then nothing is sent but what the kernels exchange
anyway: the first exchange of a step has a flag, and nothing is written before it.

A process without a gradient for a parameter that has one elsewhere takes part with zeros, as the part of the gradient
of the whole parameter that it holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules.batch import Batch
from npu_fuse_pass.tensors.exchange import largest_over, reduce_over
from npu_fuse_pass.tensors.sharded import across


@dataclasses.dataclass(frozen=True)
class Opening:
    """The first exchange of a fused step, which can be declined.

    Attributes:
        key: of all that has to be the same everywhere.
        exchanges: process groups in order, and the operations of the numbers that are reduced over each; the first
            number is the flag of those who decline.
    """

    key: int
    exchanges: tuple[tuple[Any, tuple[str, ...]], ...]


class Meeting:
    """What the processes of one optimizer have agreed on."""

    def __init__(self) -> None:
        self._opening: Opening | None = None  # of the fused step that all run
        self._own: list[bool] = []  # which gradients this process had then
        self._anywhere: list[bool] = []  # which of them there were in any process
        self._refused = False

    def agree(self, batches: Sequence[Batch], opening: Opening | None) -> bool:
        """True if all processes run this step fused; gradients that only this process lacks become zeros.

        Args:
            batches: all of the optimizer's; those that need whole parameters count.
            opening: of the fused step; None: this process cannot run it.
        """
        spread = [b for b in batches if b.needs_whole]
        own = [g is not None for b in spread for g in b.grads]
        if opening is not None and self._opening == opening and self._own == own:
            self._fill(spread)
            return True
        self.leave()
        key = 0 if opening is None else opening.key
        numbers = torch.tensor([opening is None, key, -key, *own], dtype=torch.float64, device="cpu")
        largest_over(groups_of(spread), numbers)
        self._own, self._anywhere = own, (numbers[3:] > 0).tolist()
        self._fill(spread)
        agreed = bool(numbers[0] == 0 and numbers[1] == -numbers[2])
        self._opening, self._refused = opening if agreed else None, not agreed
        return agreed

    def leave(self) -> None:
        """Decline the step that was agreed on, if there is one: all agree anew before they write anything."""
        if self._opening is not None:
            for group, ops in self._opening.exchanges:
                reduce_over(group, ops, torch.tensor([1.0] + [0.0] * (len(ops) - 1), dtype=torch.float64, device="cpu"))
        self._opening = None

    def dissolve(self) -> None:
        """Another process has declined."""
        self._opening = None

    def unfused(self, batches: Sequence[Batch]) -> None:
        """Announce an unfused step, unless it was announced: all other processes make one, too."""
        if not self._refused:
            self.agree(batches, None)
        self._refused = False

    def _fill(self, spread: Sequence[Batch]) -> None:
        missing = iter([there and not here for there, here in zip(self._anywhere, self._own, strict=True)])
        for batch in spread:
            for i, p in enumerate(batch.params):
                if next(missing):
                    batch.grads[i] = torch.zeros_like(p, dtype=batch.grad_dtype, requires_grad=False)


def groups_of(batches: Sequence[Batch]) -> list[Any]:
    """The process groups over which parameters of these batches are spread, in an order that all processes share."""
    return list(dict.fromkeys(group for b in batches for p in b.owners for group in across(p)))


def flagged(numbers: Tensor) -> bool:
    """True if a process has declined the step that these numbers open."""
    return bool(numbers[0] != 0)
