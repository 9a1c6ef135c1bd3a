"""The last resort where kernels cannot be compiled: interpret every group with torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.fused_op import member_values, new_value
from npu_fuse_pass.ir.totals import rounds
from npu_fuse_pass.ir.types import Group, Leaf, LeafValues
from npu_fuse_pass.lowerings.interrupts import to_the_end
from npu_fuse_pass.tensors.memory import check_apart


class Program:
    """Same interface as `lowerings.cpu.Program`; right, not fast."""

    def __init__(self, leaves: Sequence[Leaf], groups: Sequence[Group]) -> None:
        self._leaves = leaves
        self._groups = groups
        self.begun = self.written = False

    @torch.no_grad()
    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None:
        """Run the step; fills in the values of "output" and "temporary" leaves. None values leave their member out."""
        self._check_memory(values)
        known: dict[int, Tensor] = {i: v for i, v in enumerate(values) if v is not None}
        for i, leaf in enumerate(self._leaves):
            if leaf.kind == "constant":
                known[i] = torch.tensor(leaf.value, dtype=torch.float64, device="cpu")
        for _ in range(max(1, rounds(self._groups, self._leaves))):
            known |= self._totals(known)
        results: list[tuple[int, Tensor]] = []
        for group in self._groups:
            for member in group.members:
                if self._missing(member, known):
                    continue
                tensors, scalars = self._given(group, member, known)
                made = member_values(group.formula, tensors, scalars)
                for slot, e in group.formula.writes:
                    results.append((member[slot], new_value(group.formula, slot, made[id(e)], tensors)))

        def write() -> None:
            self.begun = True
            for leaf_index, value in results:
                if self._leaves[leaf_index].kind in ("output", "temporary"):
                    values[leaf_index] = _laid_out(value, self._leaves[leaf_index])
                else:
                    known[leaf_index].copy_(value)
            self.written = True

        to_the_end(write)

    def _check_memory(self, values: LeafValues) -> None:
        members = [m for g in self._groups for m in g.members]
        written = {m[s] for g in self._groups for s in g.formula.written for m in g.members}
        used = {i for m in members for i in m if i < len(values)}
        tensors = {i: t for i in used if (t := values[i]) is not None}
        check_apart(
            [t for i, t in tensors.items() if i in written], [t for i, t in tensors.items() if i not in written]
        )

    def _missing(self, member: tuple[int, ...], known: dict[int, Tensor]) -> bool:
        return any(i not in known and self._leaves[i].kind in ("input", "attribute", "result") for i in member)

    def _given(
        self, group: Group, member: tuple[int, ...], known: dict[int, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        formula = group.formula
        like = next((known[member[s]] for s in formula.tensor_slots if member[s] in known), _zero())
        tensors = [
            known[member[s]] if member[s] in known else self._made(member[s], like) for s in formula.tensor_slots
        ]
        scalars = [known.get(member[s], _zero()) for s in formula.scalar_slots]
        return tensors, scalars

    def _made(self, index: int, like: Tensor) -> Tensor:
        """Stands for a tensor that the step creates: only its shape is looked at."""
        leaf = self._leaves[index]
        return torch.empty_like(like) if like.shape == leaf.shape else like.new_empty(leaf.shape, dtype=leaf.dtype)

    def _totals(self, known: dict[int, Tensor]) -> dict[int, Tensor]:
        sums: dict[int, Tensor] = {}
        for group in self._groups:
            for member, numbers in zip(group.members, group.totals, strict=True):
                if not numbers or self._missing(member, known):
                    continue
                made = member_values(group.formula, *self._given(group, member, known))
                for number, e in zip(numbers, group.formula.contributions, strict=True):
                    sums[number] = sums.get(number, _zero()) + made[id(e)].cpu()
        return {i: sums.get(leaf.index, _zero()) for i, leaf in enumerate(self._leaves) if leaf.kind == "total"}


def _laid_out(value: Tensor, leaf: Leaf) -> Tensor:
    if leaf.strides is None or value.stride() == leaf.strides:
        return value.to(leaf.dtype)
    return torch.empty_strided(leaf.shape, leaf.strides, dtype=leaf.dtype, device=value.device).copy_(value)


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")
