"""A step by generated kernels: numbers from the host, tables of addresses, launches. The interface of `npu.program`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch, Unsupported
from npu_fuse_pass.ir.types import Leaf
from npu_fuse_pass.lowerings.npu.host.host import Host
from npu_fuse_pass.lowerings.npu.kernels.launch import Generated, Launcher, Launches
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.tensors.memory import check_apart, in_order, memory_order

Values = list[Tensor | None]


class Numbered:
    """What the host needs to know of a group to compute its numbers."""

    def __init__(self, generated: Generated, leaves: Sequence[Leaf]) -> None:
        self.group, self.splits = generated.group, [generated.made]
        used = {m[s] for s in self.group.formula.scalar_slots for m in self.group.members}
        given = (i for i in used if leaves[i].kind in ("input", "attribute"))
        self.on_the_device = {i for i in given if leaves[i].device.type != "cpu"}


class Program:
    """All groups of a step.

    Args:
        leaves: of the captured step.
        groups: with their kernels.
        launcher: runs them.
        device: of the tensors.

    Raises:
        Unsupported: several members write one 0-dim state.
    """

    def __init__(
        self, leaves: Sequence[Leaf], groups: Sequence[Generated], launcher: Launcher, device: torch.device
    ) -> None:
        self._leaves, self._groups, self._launcher, self._device = leaves, groups, launcher, device
        for generated in groups:
            for slot in generated.group.formula.written:
                targets = [member[slot] for member in generated.group.members]
                if len(set(targets)) != len(targets):
                    raise Unsupported(
                        generated.group.name, "several members write the same 0-dim tensor", Code.SAME_SCALAR
                    )
        self._host = Host(leaves, [Numbered(g, leaves) for g in groups])
        totals = [leaf.index for leaf in leaves if leaf.kind == "total"]
        self._terms = torch.zeros(max(totals, default=-1) + 1, sum(len(g.group.members) for g in groups), device=device)
        self._launches = []
        first = 0
        for generated in groups:
            self._launches.append(Launches(generated, leaves, self._terms, first))
            first += len(generated.group.members)
        self._bound: object = None

    def __call__(self, values: Values, complete: bool = False, kinds: object = None) -> None:
        """Run the step; fills in the values of "output" leaves.

        Args:
            values: one tensor per leaf; None for the gradient of a parameter that is left out.
            complete: check dtypes too (the caller has not).

        Raises:
            Mismatch: a tensor is not what the kernels were made for; nothing was changed.
        """
        with torch.no_grad():
            step = self._host.look(values, complete)
            binding = _Binding(self._leaves, values)
            found = [
                binding.group(generated, active) for generated, active in zip(self._groups, step.active, strict=True)
            ]
            binding.check()
            addresses = ([[[t.data_ptr() for t in row] for row in tensors] for tensors in found], step.active)
            if addresses != self._bound:
                self._terms.zero_()  # nobody adds what a member that is left out now added before
                for launches, tensors, active in zip(self._launches, found, step.active, strict=True):
                    launches.bind(tensors, active)
                self._bound = addresses
            numbers = [
                rows_of(found[0], len(g.group.members)) for found, g in zip(step.numbers, self._groups, strict=True)
            ]
            flat = torch.cat([n.flatten() for n in numbers]).float().to(self._device)
            rows = [
                part.reshape(n.shape) for part, n in zip(flat.split([n.numel() for n in numbers]), numbers, strict=True)
            ]
            for contributes in (True, False):
                for launches, own in zip(self._launches, rows, strict=True):
                    launches.launch(own, contributes, self._launcher)
            self._host.finish(step, values)
            binding.finish(values)


def rows_of(found: Sequence[Tensor], members: int) -> Tensor:
    """A row of numbers per member, float64."""
    if not found:
        return torch.zeros(members, 0, dtype=torch.float64, device="cpu")
    return torch.stack([v.double().expand(members) for v in found], dim=1)


class _Binding:
    """The tensors of one step, dense in memory and checked."""

    def __init__(self, leaves: Sequence[Leaf], values: Values) -> None:
        self._leaves, self._values = leaves, values
        self._used: dict[int, Tensor] = {}
        self._written: set[int] = set()
        self._orders: dict[int, tuple[bool, tuple[int, ...]]] = {}
        self._copy_back: list[tuple[Tensor, Tensor]] = []
        self._made: dict[int, Tensor] = {}

    def group(self, generated: Generated, active: Sequence[bool]) -> list[list[Tensor]]:
        """For each tensor slot of the device formula those of all members; of one that is left out, empty ones."""
        rows = [self._member(generated, m, active[m]) for m in range(len(active))]
        return [[row[k] for row in rows] for k in range(len(generated.made.tensor_slots))]

    def _member(self, generated: Generated, m: int, active: bool) -> list[Tensor]:
        group, slots = generated.group, generated.made.tensor_slots
        member = group.members[m]
        given = [
            t for s in slots if (t := self._values[member[s]]) is not None and self._leaves[member[s]].kind != "output"
        ]
        strides = memory_order(given)
        found = []
        for s in slots:
            i, dtype = member[s], group.formula.slots[s].dtype
            if self._orders.setdefault(i, (active, strides)) != (active, strides):
                raise Mismatch("two updates of one tensor disagree on its memory order, or one of them is left out")
            if not active:
                found.append(torch.empty(0, dtype=dtype))
                continue
            if s in group.formula.written:
                self._written.add(i)
            found.append(self._dense(i, s in group.formula.written, dtype, strides))
        return found

    def _dense(self, i: int, written: bool, dtype: torch.dtype, strides: tuple[int, ...]) -> Tensor:
        leaf, t = self._leaves[i], self._values[i]
        if leaf.kind == "output":
            if i not in self._made:
                self._made[i] = torch.empty_strided(leaf.shape, strides, dtype=dtype, device=leaf.device)
            return self._made[i]
        assert t is not None
        if t.numel() != math.prod(leaf.shape) or t.layout is not torch.strided:
            raise Mismatch("a tensor has another size or layout than when the step was compiled")
        if t.dtype != dtype:
            raise Mismatch(f"a tensor is {t.dtype}; the kernel was generated for {dtype}")
        dense = t.detach()
        self._used[i] = dense
        if not in_order(dense, strides):
            dense = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(dense)
            if written:
                self._copy_back.append((t, dense))
        return dense

    def check(self) -> None:
        """Refuse tensors that share memory where one of them is written: kernels take them for apart."""
        written = [t for i, t in self._used.items() if i in self._written]
        check_apart(written, [t for i, t in self._used.items() if i not in self._written])

    def finish(self, values: Values) -> None:
        """Write back what was copied, give what was made, tell autograd what changed."""
        for target, dense in self._copy_back:
            target.detach().copy_(dense)
        for i, t in self._made.items():
            values[i] = t
        torch.autograd.graph.increment_version([written for i in self._written if (written := values[i]) is not None])
