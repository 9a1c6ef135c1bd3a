"""A step of generated kernels: what is launched on which addresses. Who launches is behind `Launcher`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.lowerings.npu.emit.split import Split, constants_of, slots_of, split_whole
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel, Kernels, generate
from npu_fuse_pass.lowerings.npu.kernels.tables import chunk_table, member_table

KERNEL = "generated NPU kernel"
"""What reports call it."""


class Launcher(Protocol):
    """Runs one kernel on the current stream, after those before it; as `hardware.Hardware`."""

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Generated:
    """A group, how its formula is split between host and kernels, and these; `note`: for the report."""

    group: Group
    made: Split
    kernels: Kernels
    note: str = ""


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

    def bind(self, addresses: Sequence[Sequence[int]], sizes: Sequence[int], active: Sequence[bool]) -> None:
        """Build the tables for tensors at these addresses, and put them on the device.

        Args:
            addresses: for each tensor slot of the device formula those of all members, whose elements fill memory.
            sizes: the elements of each member's tensors.
            active: which members take part.

        Raises:
            Mismatch: an address is no multiple of the size of an element.
        """
        group, made, kernels = self.generated.group, self.generated.made, self.generated.kernels
        itemsizes = [made.device.slots[s].dtype.itemsize for s in kernels.slots]
        members: dict[tuple[int, ...], list[int]] = {}
        for m, takes_part in enumerate(active):
            if takes_part and sizes[m]:
                read = tuple(self._leaves[group.members[m][s]].index for s in made.device_slots)
                members.setdefault((*read, *group.totals[m]), []).append(m)
        self._classes = []
        each_slot = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        for totals, chosen in members.items():
            counts = [sizes[m] for m in chosen]
            chunks = chunk_table(chosen, counts, each_slot[:, chosen], itemsizes, kernels.block).to(self._terms.device)
            each = member_table(chosen, counts, kernels.block).to(self._terms.device)
            partial = torch.empty(max(1, kernels.sums * len(chunks)), device=self._terms.device)
            self._classes.append(_Class(totals, chunks, each, partial))

    def launch(self, numbers: int, contributes: bool, launcher: Launcher) -> None:
        """Launch the contributions to totals, or the update.

        Args:
            numbers: the address of those from the host, (members, numbers) float32 on the device.
        """
        for members in self._classes:
            for kernel in self.generated.kernels.launches:
                if kernel.contributes == contributes:
                    table = members.chunks if kernel.over == "chunks" else members.members
                    launcher(kernel, list(self._arguments(kernel, members, table, numbers)), len(table))

    def _arguments(self, kernel: Kernel, members: _Class, table: Tensor, numbers: int) -> Iterator[int]:
        vectors = {"partial": members.partial, "scratch": self._scratch, "terms": self._terms, "table": table}
        places = {**{kind: vector.data_ptr() for kind, vector in vectors.items()}, "numbers": numbers}
        for pointer in kernel.pointers:
            yield 0 if pointer.slot >= 0 else places[pointer.kind]
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


class Cluster:
    """The groups of one node: one, or all that add to totals or read them. Launches their kernels, when it is called.

    Args:
        name: of the node.
        generated: the groups.
        leaves: of the step.
        numbers: for each group, where its numbers begin in the vector that comes from the host.
        launcher: runs kernels.
        device: of the tensors.

    Attributes:
        active: for each group, which members take part in the next run.
    """

    def __init__(
        self,
        name: str,
        generated: Sequence[Generated],
        leaves: Sequence[Leaf],
        numbers: Sequence[int],
        launcher: Launcher,
        device: torch.device,
    ) -> None:
        self.name, self.generated = name, generated
        self._numbers, self._launcher = numbers, launcher
        totals = [leaf.index for leaf in leaves if leaf.kind == "total"]
        self._terms = torch.zeros(
            max(totals, default=-1) + 1, sum(len(g.group.members) for g in generated), device=device
        )
        self._launches, self._sizes = [], []
        first = 0
        for made in generated:
            self._launches.append(Launches(made, leaves, self._terms, first))
            self._sizes.append([_elements(made, leaves, member) for member in made.group.members])
            first += len(made.group.members)
        self.active = [[True] * len(made.group.members) for made in generated]
        self._bound: object = None

    def leaves(self, written: bool) -> list[tuple[Generated, int, int]]:
        """The tensors that the node writes, or only reads, in the order of its arguments: group, slot, member.

        Slots are those of the whole formula; members without elements are left out.
        """
        return [
            (made, s, m)
            for made, sizes in zip(self.generated, self._sizes, strict=True)
            for s in made.made.tensor_slots
            if (s in made.made.written) == written
            for m, size in enumerate(sizes)
            if size
        ]

    def __call__(self, written: Sequence[int], read: Sequence[int], numbers: int) -> None:
        """Launch all kernels: what is added to totals, then the updates.

        Args:
            written: addresses of the tensors that are written, in place.
            read: of those that are only read.
            numbers: the address of the numbers, float32.
        """
        bound = (list(written), list(read), self.active)
        if bound != self._bound:
            self._bound = None
            self._bind(written, read)
            self._bound = (*bound[:2], [list(a) for a in self.active])
        for contributes in (True, False):
            for launches, first in zip(self._launches, self._numbers, strict=True):
                launches.launch(numbers + 4 * first, contributes, self._launcher)

    def _bind(self, written: Sequence[int], read: Sequence[int]) -> None:
        # nobody adds what a member that is left out now added before; a copy from the host is done when it returns
        self._terms.copy_(torch.zeros(self._terms.shape, device="cpu"))
        order = [*self.leaves(written=True), *self.leaves(written=False)]
        places = {(id(made), s, m): a for (made, s, m), a in zip(order, [*written, *read], strict=True)}
        for launches, sizes, active in zip(self._launches, self._sizes, self.active, strict=True):
            made = launches.generated
            rows = [[places.get((id(made), s, m), 0) for m in range(len(sizes))] for s in made.made.tensor_slots]
            launches.bind(rows, sizes, active)


def _elements(generated: Generated, leaves: Sequence[Leaf], member: Sequence[int]) -> int:
    return math.prod(leaves[member[generated.made.tensor_slots[0]]].shape)
