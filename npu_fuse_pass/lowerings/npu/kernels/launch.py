"""A step of generated kernels: what is launched on which addresses. Who launches is behind `Hardware`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import Expr, postorder
from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.lowerings.npu.emit.split import Split, constants_of, slots_of, split_whole, states_from_tensors
from npu_fuse_pass.lowerings.npu.kernels.generate import STATES_IN, Kernel, Kernels, generate
from npu_fuse_pass.lowerings.npu.kernels.hardware import Hardware
from npu_fuse_pass.lowerings.npu.kernels.tables import chunk_table, in_elements, member_spans
from npu_fuse_pass.reasons import Code

KERNEL = "generated NPU kernel"
"""What reports call it."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """A group, how its formula is split between host and kernels, and these; `note`: for the report."""

    group: Group
    made: Split
    kernels: Kernels
    note: str = ""


def generate_group(
    group: Group,
    leaves: Sequence[Leaf],
    block: Callable[[Callable[[int], Kernels]], int],
    depths: Mapping[int, int] | None = None,
) -> Generated:
    """The kernels of a group.

    Args:
        block: finds the elements of a chunk, given what makes the kernels for one.
        depths: the round in which each total of the step is right, where one may depend on another.

    Raises:
        Unsupported: the vector unit cannot compute the group; says why.
    """
    formula = group.formula
    states = {s: _stored(group, leaves, s) for s in states_from_tensors(formula, formula.total_slots)}
    made = split_whole(formula, formula.total_slots, constants_of(group, leaves), states)
    several = {tuple(depths.get(t, 1) - 1 for t in row) for row in group.totals} if depths else set()
    if len(several) > 1:
        raise Unsupported(group.name, "its members add to totals of other rounds", Code.ACROSS_PARAMETERS)
    rounds = next(iter(several), None)
    shared = [k for k, e in enumerate(made.values) if _shared(group, e)]

    def kernels(size: int) -> Kernels:
        return generate(group.name, made, size, shared, rounds)

    return Generated(group, made, kernels(block(kernels)))


def _shared(group: Group, number: Expr) -> bool:
    """Whether a number from the host is one for all members."""
    slots, sized = slots_of(number), any(e.op == "numel" for e in postorder([number]))
    return not sized and len({tuple(member[s] for s in slots) for member in group.members}) <= 1


def _stored(group: Group, leaves: Sequence[Leaf], slot: int) -> torch.dtype:
    """The dtype of a 0-dim state that kernels read and write.

    Raises:
        Unsupported: they cannot.
    """
    found = [leaves[member[slot]] for member in group.members]
    dtypes = {leaf.dtype for leaf in found}
    name = group.labels[slot]
    if {leaf.device for leaf in leaves if leaf.shape} - {leaf.device for leaf in found}:
        why = f"{name!r} follows from tensors, and lies in the host's memory, which kernels do not write"
        raise Unsupported("copy_", why, Code.GE_STATE)
    if len(dtypes) > 1 or not dtypes <= {*STATES_IN}:
        why = f"{name!r} follows from tensors, and is stored in {' and '.join(sorted(map(str, dtypes)))}; kernels keep "
        raise Unsupported("copy_", f"{why}such 0-dim states in float32, bfloat16 or float16", Code.GE_STATE)
    return dtypes.pop()


class Launches:
    """The launches of one group on the tensors of a step.

    Args:
        leaves: of the step.
        terms: what is added up to totals, (totals, terms of all groups) float32 on the device.
        first_term: the group's first column there.
    """

    def __init__(self, generated: Generated, leaves: Sequence[Leaf], terms: Tensor, first_term: int) -> None:
        self.generated, self._leaves, self._terms, self._first_term = generated, leaves, terms, first_term
        self._classes: list[_Class] = []

    def bind(
        self,
        addresses: Sequence[Sequence[int]],
        sizes: Sequence[int],
        active: Sequence[bool],
        states: Sequence[Sequence[int]] = (),
    ) -> None:
        """Build the tables for tensors at these addresses, and put them on the device.

        Args:
            addresses: for each tensor slot of the device formula those of all members, whose elements fill memory.
            sizes: the elements of each member's tensors.
            active: which members take part.
            states: addresses of 0-dim states, as `addresses`.

        Raises:
            Mismatch: an address is no multiple of the size of an element.
        """
        group, made, kernels = self.generated.group, self.generated.made, self.generated.kernels
        itemsizes = [made.device.slots[s].dtype.itemsize for s in kernels.slots]
        members: dict[tuple[int, ...], list[int]] = {}
        for m, takes_part in enumerate(active):
            if takes_part and (sizes[m] or states or kernels.terms_of_members):
                read = tuple(self._leaves[group.members[m][s]].index for s in made.device_slots)
                members.setdefault((*read, *group.totals[m]), []).append(m)
        self._classes = []
        each_slot, each_state = (
            torch.tensor(each, dtype=torch.int64, device="cpu").reshape(-1, len(sizes)) for each in (addresses, states)
        )
        each_state = in_elements(each_state, [made.device.slots[s].dtype.itemsize for s in kernels.states])
        first_term, device = self._first_term, self._terms.device
        for totals, chosen in members.items():
            counts = [sizes[m] for m in chosen]
            tables = [chunk_table(chosen, counts, each_slot[:, chosen], itemsizes, kernels.block)]
            if kernels.sums or kernels.terms_of_members or kernels.states:
                spans = member_spans(len(active), chosen, counts, kernels.block)
                tables.append(torch.cat([spans, each_state.T], dim=1).contiguous())
                tables.append(torch.tensor(chosen, dtype=torch.int64, device="cpu"))
            rows = {"chunks": len(tables[0]), "members": len(chosen)}
            placed = torch.cat([t.flatten() for t in tables]).to(device)  # one transfer
            parts = dict(zip(("chunks", "spans", "members"), placed.split([t.numel() for t in tables]), strict=False))
            partial = torch.empty(max(1, kernels.sums * rows["chunks"]), dtype=torch.float32, device=device)
            self._classes.append(_Class(totals, parts, rows, partial, first_term))
            first_term += 0 if kernels.terms_of_members else rows["chunks"]

    def launch(self, numbers: int, round_: int | None, launcher: Hardware) -> None:
        """Launch a round of contributions to totals, or the update.

        Args:
            numbers: the address of those from the host, (members, numbers) float32 on the device.
        """
        for members in self._classes:
            for kernel in self.generated.kernels.launches:
                if kernel.round == round_ and members.rows[kernel.over]:
                    arguments = list(self._arguments(kernel, members, numbers))
                    launcher(kernel, arguments, members.rows[kernel.over])

    def _arguments(self, kernel: Kernel, members: _Class, numbers: int) -> Iterator[int]:
        tables = {**members.tables, "table": members.tables[kernel.over]}
        vectors = {"partial": members.partial, "terms": self._terms, **tables}
        places = {**{kind: vector.data_ptr() for kind, vector in vectors.items()}, "numbers": numbers}
        for pointer in kernel.pointers:
            yield 0 if pointer.slot >= 0 else places[pointer.kind]
        read = len(self.generated.made.device_slots)
        integers = {
            "rows": members.rows[kernel.over],
            "chunks": members.rows["chunks"],
            "terms": self._terms.shape[1],
            "first_term": members.first_term,
            **{f"total{k}": number for k, number in enumerate(members.totals[:read])},
            **{f"adds{k}": number for k, number in enumerate(members.totals[read:])},
        }
        yield from (integers[name] for name in kernel.integers)


@dataclasses.dataclass(frozen=True)
class _Class:
    """Members that read and add to the same totals: a launch of each kernel.

    Attributes:
        tables: on the device: "chunks", and where sums are combined "spans", and the "members" that take part.
        rows: of the first and the last.
        partial: sums of each chunk.
        first_term: where the terms of its chunks begin, or of the group's members.
    """

    totals: tuple[int, ...]
    tables: Mapping[str, Tensor]
    rows: Mapping[str, int]
    partial: Tensor
    first_term: int


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
        launcher: Hardware,
        device: torch.device,
    ) -> None:
        self.name, self.generated = name, generated
        self._numbers, self._launcher = numbers, launcher
        self._sizes = [[_elements(made, leaves, member) for member in made.group.members] for made in generated]
        counts = [_terms(made, sizes) for made, sizes in zip(generated, self._sizes, strict=True)]
        totals = {leaf.index for leaf in leaves if leaf.kind == "total"}
        totals |= {total for made in generated for row in made.group.totals for total in row}  # one may have no reader
        self._terms = torch.empty(max(totals, default=-1) + 1, sum(counts), dtype=torch.float32, device=device)
        self._launches = [Launches(made, leaves, self._terms, sum(counts[:k])) for k, made in enumerate(generated)]
        self.active = [[True] * len(made.group.members) for made in generated]
        kernels = [k for made in generated for k in made.kernels.launches]
        self._rounds = sorted({k.round for k in kernels if k.round is not None})
        self._bound: object = None
        self._zeroed: object = None  # which members took part when terms were

    def leaves(self, written: bool) -> list[tuple[Generated, int, int]]:
        """The tensors that the node writes, or only reads, in the order of its arguments: group, slot, member.

        Slots are those of the whole formula; tensors without elements are left out.
        """
        return [
            (made, s, m)
            for made, sizes in zip(self.generated, self._sizes, strict=True)
            for s in (*made.made.tensor_slots, *made.made.states)
            if (s in made.made.written) == written
            for m, size in enumerate(sizes)
            if size or s in made.made.states
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
            self._bound = (*bound[:2], self._zeroed)
        for round_ in (*self._rounds, None):
            for launches, first in zip(self._launches, self._numbers, strict=True):
                launches.launch(numbers + 4 * first, round_, self._launcher)

    def _bind(self, written: Sequence[int], read: Sequence[int]) -> None:
        if self.active != self._zeroed:
            # nobody adds what a member that is left out now added before; a copy from the host is done when it returns
            self._terms.copy_(torch.zeros(self._terms.shape, dtype=torch.float32, device="cpu"))
            self._zeroed = [list(a) for a in self.active]
        order = [*self.leaves(written=True), *self.leaves(written=False)]
        places = {(id(made), s, m): a for (made, s, m), a in zip(order, [*written, *read], strict=True)}
        for launches, sizes, active in zip(self._launches, self._sizes, self.active, strict=True):
            made = launches.generated
            rows, states = (
                [[places.get((id(made), s, m), 0) for m in range(len(sizes))] for s in slots]
                for slots in (made.made.tensor_slots, made.made.states)
            )
            launches.bind(rows, sizes, active, states)


def _terms(generated: Generated, sizes: Sequence[int]) -> int:
    """How many numbers a group adds to a total."""
    kernels = generated.kernels
    if all(k.round is None for k in kernels.launches):
        return 0
    return len(sizes) if kernels.terms_of_members else sum(-(-size // kernels.block) for size in sizes)


def _elements(generated: Generated, leaves: Sequence[Leaf], member: Sequence[int]) -> int:
    slots = generated.made.tensor_slots
    return math.prod(leaves[member[slots[0]]].shape) if slots else 0
