"""Steps with norms of sharded tensors: kernels in pieces, and exchanges between processes after each.

A piece ends where a sweep has reduced something. What members that are spread over processes have reduced then becomes
that of their whole tensors: one exchange for each process group, whatever the number of members and kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from npu_fuse_pass.errors import Declined
from npu_fuse_pass.ir.types import Leaf
from npu_fuse_pass.lowerings.cpu.kernel import Kernel
from npu_fuse_pass.lowerings.kernels.cache import key_of
from npu_fuse_pass.lowerings.kernels.sweeps import CONTRIBUTE, UPDATE
from npu_fuse_pass.rules.meeting import Opening, flagged
from npu_fuse_pass.tensors.exchange import reduce_over


class Spread:
    """The pieces of a step in order.

    Attributes:
        opening: the first exchange; no piece before it writes anything.
    """

    def __init__(
        self, kernels: Sequence[Kernel], leaves: Sequence[Leaf], rounds: int, add_totals: Callable[[], None]
    ) -> None:
        self._kernels = kernels
        self._across = {k: [_across(member, leaves) for member in k.group.members] for k in kernels}
        self._groups = list(dict.fromkeys(g for rows in self._across.values() for row in rows for g in row))
        self._actions: list[Callable[[int], None]] = []
        self._open_after = 0
        self._at = 0
        exchanges: tuple[tuple[Any, tuple[str, ...]], ...] = tuple((g, ("sum",)) for g in self._groups)
        for _ in range(rounds):
            exchanges = self._add(CONTRIBUTE, exchanges)
            self._actions.append(lambda threads: add_totals())
        exchanges = self._add(UPDATE, exchanges)
        text = [(k.group.name, k.group.members, k.group.formula.text) for k in kernels]
        self.opening = Opening(int(key_of(repr(text))[:12], 16), exchanges)

    def _add(self, function: int, exchanges: Any) -> Any:
        """Add the pieces of a function to the actions.

        Returns:
            The exchanges of the step's opening, as far as they are known.
        """
        pieces = [(kernel, kernel.pieces[function]) for kernel in self._kernels if kernel.pieces[function]]
        for phase in range(max((len(p) for _, p in pieces), default=1) - 1):
            for kernel, functions in pieces:
                if phase < len(functions) - 1:
                    self._call(kernel, functions[phase])
            exchanges = self._exchange(
                [(k, k.reduced[function][phase]) for k, p in pieces if phase < len(p) - 1], exchanges
            )
        if function == UPDATE and not self._open_after:
            exchanges = self._exchange([], exchanges)
        for kernel, functions in pieces:
            self._call(kernel, functions[-1])
        return exchanges

    def _call(self, kernel: Kernel, function: Callable[..., None]) -> None:
        self._actions.append(lambda threads: kernel.call(function, threads))

    def _exchange(self, reduced: Sequence[tuple[Kernel, Sequence[tuple[int, str]]]], exchanges: Any) -> Any:
        opens = not self._open_after
        made = []
        for group in self._groups:
            places, ops = [], ["sum"] if opens else []
            for kernel, columns in reduced:
                members = [m for m, groups in enumerate(self._across[kernel]) if group in groups]
                at = [m * kernel.source.scratch + column for m in members for column, _ in columns]
                if at:
                    places.append((kernel.scratch, torch.tensor(at, dtype=torch.int64, device="cpu")))
                    ops += [op for _ in members for _, op in columns]
            if ops:
                made.append((group, tuple(ops), places))
        self._actions.append(lambda threads: _meet(made, opens))
        if opens:
            self._open_after = len(self._actions)
            return tuple((group, ops) for group, ops, _ in made)
        return exchanges

    def begin(self) -> None:
        """Begin a new step."""
        self._at = 0

    def open(self, threads: int) -> None:
        """Run the pieces up to the first exchange.

        Raises:
            Declined: another process does not run this step fused; nothing was changed.
        """
        self._until(self._open_after, threads)

    def finish(self, threads: int) -> None:
        """Run the rest of the step."""
        self._until(len(self._actions), threads)

    def _until(self, end: int, threads: int) -> None:
        while self._at < end:
            self._actions[self._at](threads)
            self._at += 1


def _meet(exchanges: Sequence[tuple[Any, tuple[str, ...], Any]], opens: bool) -> None:
    """Reduce over one process group after the other; the flag of the opening goes through all of them."""
    flag = torch.zeros(int(opens), dtype=torch.float64, device="cpu")
    for group, ops, places in exchanges:
        numbers = torch.cat([flag, *(scratch[at] for scratch, at in places)])
        reduce_over(group, ops, numbers)
        flag = numbers[: int(opens)]
        rest = numbers[int(opens) :]
        for scratch, at in places:
            scratch[at], rest = rest[: len(at)], rest[len(at) :]
    if opens and flagged(flag):
        raise Declined("another process does not run this step fused")


def _across(member: Sequence[int], leaves: Sequence[Leaf]) -> tuple[Any, ...]:
    return next((leaves[i].across for i in member if leaves[i].across), ())
