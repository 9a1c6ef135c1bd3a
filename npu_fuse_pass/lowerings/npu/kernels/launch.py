"""A step of generated kernels: what is launched on which addresses. Who launches is behind `Launcher`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.lowerings.npu.emit.split import Split, constants_of, slots_of, split_whole
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel, Kernels, generate
from npu_fuse_pass.lowerings.npu.kernels.tables import chunk_table, member_table


class Launcher(Protocol):
    """Runs one kernel on the current stream, after those before it."""

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        """Launch.

        Args:
            arguments: addresses and integers, in the order of `kernel.pointers` and `kernel.integers`.
            rows: of its table; more blocks than that have nothing to do.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Generated:
    """A group and its kernels."""

    group: Group
    made: Split
    kernels: Kernels


def generate_group(group: Group, leaves: Sequence[Leaf], block: Callable[[Callable[[int], Kernels]], int]) -> Generated:
    """The kernels of a group.

    Args:
        block: finds the elements of a chunk, given what makes the kernels for one.

    Raises:
        Unsupported: the vector unit cannot compute the group; says why.
    """
    formula = group.formula
    totals = [s for s in formula.scalar_slots if any(leaves[m[s]].kind == "total" for m in group.members)]
    made = split_whole(formula, totals, constants_of(group, leaves))
    shared = [k for k, e in enumerate(made.values) if _shared(group, e)]

    def kernels(size: int) -> Kernels:
        return generate(group.name, made, size, shared)

    return Generated(group, made, kernels(block(kernels)))


def _shared(group: Group, number: Expr) -> bool:
    """Whether a number from the host is one for all members."""
    slots, sized = slots_of(number), any(e.op == "numel" for e in postorder([number]))
    return not sized and len({tuple(member[s] for s in slots) for member in group.members}) <= 1


class Launches:
    """The launches of one group on the tensors of a step.

    Args:
        leaves: of the step.
        terms: what members add to totals, (totals, members of all groups) float32 on the device.
        first_term: the group's first column there.
    """

    def __init__(self, generated: Generated, leaves: Sequence[Leaf], terms: Tensor, first_term: int) -> None:
        self.generated, self._leaves, self._terms, self._first_term = generated, leaves, terms, first_term
        group, device = generated.group, terms.device
        self._scratch = torch.zeros(max(1, generated.kernels.scratch * len(group.members)), device=device)
        self._classes: list[_Class] = []

    def bind(self, tensors: Sequence[Sequence[Tensor]], active: Sequence[bool]) -> None:
        """Build the tables for these tensors.

        Args:
            tensors: for each tensor slot of the device formula those of all members, dense in memory.
            active: which members take part.
        """
        group, made, kernels = self.generated.group, self.generated.made, self.generated.kernels
        self._tensors = tensors  # kernels reach them by address alone
        itemsizes = [made.device.slots[s].dtype.itemsize for s in kernels.slots]
        members: dict[tuple[int, ...], list[int]] = {}
        for m, takes_part in enumerate(active):
            if takes_part and tensors[0][m].numel():
                read = tuple(self._leaves[group.members[m][s]].index for s in made.device_slots)
                members.setdefault((*read, *group.totals[m]), []).append(m)
        self._classes = []
        for totals, chosen in members.items():
            sizes = [tensors[0][m].numel() for m in chosen]
            addresses = torch.tensor(
                [[t[m].data_ptr() for m in chosen] for t in tensors], dtype=torch.int64, device="cpu"
            )
            chunks = chunk_table(chosen, sizes, addresses, itemsizes, kernels.block).to(self._terms.device)
            each = member_table(chosen, sizes, kernels.block).to(self._terms.device)
            partial = torch.zeros(max(1, kernels.sums * len(chunks)), device=self._terms.device)
            self._classes.append(_Class(totals, chunks, each, partial))

    def launch(self, numbers: Tensor, contributes: bool, launcher: Launcher) -> int:
        """Launch the contributions to totals, or the update; gives the number of launches.

        Args:
            numbers: from the host, (members, numbers) float32 on the device.
        """
        count = 0
        for members in self._classes:
            for kernel in self.generated.kernels.launches:
                if kernel.contributes == contributes:
                    table = members.chunks if kernel.over == "chunks" else members.members
                    launcher(kernel, list(self._arguments(kernel, members, table, numbers)), len(table))
                    count += 1
        return count

    def _arguments(self, kernel: Kernel, members: _Class, table: Tensor, numbers: Tensor) -> Iterator[int]:
        vectors = {"partial": members.partial, "scratch": self._scratch, "terms": self._terms, "numbers": numbers}
        for pointer in kernel.pointers:
            yield 0 if pointer.slot >= 0 else {**vectors, "table": table}[pointer.kind].data_ptr()
        read = len(self.generated.made.device_slots)
        integers = {
            "rows": len(table),
            "chunks": len(members.chunks),
            "members": len(self.generated.group.members),
            "terms": self._terms.shape[1],
            "first_term": self._first_term,
            **{f"total{k}": number for k, number in enumerate(members.totals[:read])},
            **{f"adds{k}": number for k, number in enumerate(members.totals[read:])},
        }
        yield from (integers[name] for name in kernel.integers)


@dataclasses.dataclass(frozen=True)
class _Class:
    """Members that read and add to the same totals: a launch of each kernel."""

    totals: tuple[int, ...]
    chunks: Tensor
    members: Tensor
    partial: Tensor
