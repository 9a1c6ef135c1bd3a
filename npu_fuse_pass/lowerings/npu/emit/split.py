"""Split of a formula between host and device: numbers for an NPU graph, and the formula that it computes.

Scalars that depend on no tensor (step counts, bias corrections, learning rates) are computed on the host in
float64 once per step and enter the device formula as scalar slots, one for each value that a tensor operation
reads. So the graph has neither float64 nor a mutated host input, and a changed hyperparameter is a changed number.
States that follow from tensors (NovoGrad's second moments) stay on the device, where generated kernels compute them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder, rebuilt
from npu_fuse_pass.ir.fused_op import evaluate
from npu_fuse_pass.ir.lerp import interpolation
from npu_fuse_pass.ir.text import serialise
from npu_fuse_pass.ir.types import Formula, Group, Leaf, Slot
from npu_fuse_pass.reasons import Code


@dataclasses.dataclass(frozen=True)
class Split:
    """A device formula and the host's part of it.

    The device formula has the tensor slots that it reads or writes (`tensor_slots` are the numbers that they
    have in the whole formula), then one scalar slot for each of `values`, then one for each of `device_slots`, then
    one for each of `states`, and last, if it contributes to a total (`flagged`), a flag: nonzero if the member takes
    part. `advanced`: scalar slots that the host writes (step counters). `states`: those that the device reads and
    writes, because they follow from tensors. `written`: slots of the whole formula that the device writes.
    `constants`: values of slots that the whole formula does not have.
    """

    device: Formula
    tensor_slots: tuple[int, ...]
    values: tuple[Expr, ...]
    device_slots: tuple[int, ...]
    advanced: tuple[tuple[int, Expr], ...]
    host: Formula
    written: tuple[int, ...] = ()
    constants: Mapping[int, float] = dataclasses.field(default_factory=dict)
    flagged: bool = False
    states: tuple[int, ...] = ()

    @property
    def state_slots(self) -> tuple[int, ...]:
        """The slots of `states` in the device formula."""
        first = len(self.tensor_slots) + len(self.values) + len(self.device_slots)
        return tuple(range(first, first + len(self.states)))

    def host_values(self, scalars: dict[int, Tensor], numel: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Evaluate `values` and the new values of `advanced` for all members: scalars have shape () or (members,).

        `numel`: the elements of each member's tensors, float64; None only if the formula does not use them.
        """
        constants = {s: torch.tensor(x, dtype=torch.float64, device="cpu") for s, x in self.constants.items()}
        found = evaluate(self.host, {}, {**scalars, **constants}, numel)
        return [found[id(e)] for e in self.values], [found[id(e)] for _, e in self.advanced]


def split(
    formula: Formula, device_slots: Collection[int], contribute: bool, constants: Mapping[int, float] | None = None
) -> Split:
    """Split the writes of a formula, or its contributions to totals.

    `device_slots` are scalar slots whose value exists on the device only: totals. `constants` are the values of scalar
    slots that have one for all members and at all steps, as far as they are known.

    Raises:
        Unsupported: a 0-dim state depends on a tensor, so that the host cannot advance it.
    """
    if contribute:
        return _split(formula, device_slots, constants, contributions=formula.contributions, flagged=True)
    tensor_writes = [(s, e) for s, e in formula.writes if formula.slots[s].tensor]
    return _split(formula, device_slots, constants, tensor_writes, advanced=_advanced(formula))


def split_whole(
    formula: Formula,
    device_slots: Collection[int],
    constants: Mapping[int, float] | None = None,
    states: Mapping[int, torch.dtype] | None = None,
) -> Split:
    """Split the writes of a formula together with its contributions, as `split` does either.

    `states`: those of `states_from_tensors`, with their dtypes in memory.

    Raises:
        Unsupported: another 0-dim state depends on a tensor, so that the host cannot advance it.
    """
    states = states or {}
    writes = [(s, e) for s, e in formula.writes if formula.slots[s].tensor or s in states]
    advanced = [(s, e) for s, e in _advanced(formula) if s not in states]
    return _split(formula, device_slots, constants, writes, formula.contributions, advanced, states)


def split_operands(
    formula: Formula,
    operands: Sequence[Expr],
    written: Sequence[int],
    constants: Mapping[int, float],
    device_slots: Collection[int],
) -> Split:
    """Split the operands of an operation that computes the formula's writes to tensors.

    The operands become the contributions of the device formula, those that are numbers as scalar slots.

    Args:
        formula: of the group; its writes to 0-dim states stay with the host.
        operands: over the formula's slots and those in `constants`.
        written: the tensor slots that the operation writes.
        constants: values of the slots behind the formula's.
        device_slots: scalar slots whose value exists on the device only: totals.

    Raises:
        Unsupported: a 0-dim state depends on a tensor, so that the host cannot advance it.
    """
    return _split(formula, device_slots, constants, (), operands, _advanced(formula), operated=written)


def _split(
    formula: Formula,
    device_slots: Collection[int],
    constants: Mapping[int, float] | None,
    writes: Sequence[tuple[int, Expr]] = (),
    contributions: Sequence[Expr] = (),
    advanced: Sequence[tuple[int, Expr]] = (),
    states: Mapping[int, torch.dtype] | None = None,
    operated: Sequence[int] = (),
    flagged: bool = False,
) -> Split:
    """The split of these writes and contributions. `operated`: tensor slots that an operation writes besides."""
    constants, states = constants or {}, states or {}
    roots = [*(e for _, e in writes), *contributions]
    on_host = _on_host(roots, advanced, [*device_slots, *states])
    written = (*(s for s, _ in writes), *operated)
    read = {e.value for e in postorder(roots) if e.op == "leaf"}
    used = [s for s in formula.tensor_slots if s in read or s in written]
    totals = [s for s in device_slots if s in read]
    build = _Device(formula, used, on_host, [*totals, *states], constants)
    copied = [(s, build.copy(e)) for s, e in writes]
    added = [build.copy(e) for e in contributions]
    build.finish(states)
    if flagged:
        zero = Expr("zero", (), 0, torch.float64, False)
        taking_part = Expr("ne", (build.scalar(), zero), None, torch.bool, False)
        added = [Expr("where", (taking_part, e, zero), None, e.dtype, False) for e in added]
    new = [(build.place(s), e) for s, e in copied]
    device = Formula(tuple(build.slots), tuple(new), tuple(added), serialise(build.slots, new, added))
    host = Formula((), (), (*build.values, *(e for _, e in advanced)), "")
    behind = {s: x for s, x in constants.items() if s >= len(formula.slots)}
    found = (tuple(used), tuple(build.values), tuple(totals), tuple(advanced))
    return Split(device, *found, host, written, behind, flagged, tuple(states))


def states_from_tensors(formula: Formula, device_slots: Collection[int]) -> tuple[int, ...]:
    """The 0-dim states that the host cannot advance: they follow from tensors, from totals, or from such states."""
    advanced, found = _advanced(formula), set[int]()
    while True:
        on_host = _computed_on_host([e for _, e in advanced], {*device_slots, *found})
        more = {s for s, e in advanced if id(e) not in on_host} - found
        if not more:
            return tuple(sorted(found))
        found |= more


def constants_of(group: Group, leaves: Sequence[Leaf]) -> dict[int, float]:
    """The scalar slots of a group that hold one constant for all members, and its value."""
    held = {s: {member[s] for member in group.members} for s in group.formula.scalar_slots}
    return {s: leaves[i].value for s, (i, *others) in held.items() if leaves[i].kind == "constant" and not others}


def _advanced(formula: Formula) -> list[tuple[int, Expr]]:
    return [(s, e) for s, e in formula.writes if not formula.slots[s].tensor]


def slots_of(expr: Expr) -> list[int]:
    """The slots that an expression reads."""
    return sorted({e.value for e in postorder([expr]) if e.op == "leaf" and isinstance(e.value, int)})


def _on_host(roots: Sequence[Expr], advanced: Sequence[tuple[int, Expr]], device_slots: Collection[int]) -> set[int]:
    found = _computed_on_host([*roots, *(e for _, e in advanced)], device_slots)
    if any(id(e) not in found for _, e in advanced):
        raise Unsupported(
            "copy_", "a 0-dim state is computed from a tensor; GE operations leave those to the host", Code.GE_STATE
        )
    return found


def _computed_on_host(roots: Sequence[Expr], device_slots: Collection[int]) -> set[int]:
    found: set[int] = set()
    for e in postorder(roots):
        inner = e.op != "leaf" and e.op not in REDUCTIONS and all(id(a) in found for a in e.args)
        if not e.tensor and (inner or (e.op == "leaf" and e.value not in device_slots)):
            found.add(id(e))
    return found


class _Device:
    """The device formula, built by copying expressions. `scalar_slots`: totals and states."""

    def __init__(
        self,
        formula: Formula,
        tensor_slots: Sequence[int],
        on_host: set[int],
        scalar_slots: Sequence[int],
        constants: Mapping[int, float],
    ) -> None:
        self._on_host, self._constants = on_host, constants
        self.slots = [formula.slots[s] for s in tensor_slots]
        self._made: dict[int, Expr] = {}
        self._tensor_slot = {s: i for i, s in enumerate(tensor_slots)}
        self.values: list[Expr] = []
        self._device_leaves: dict[int, Expr] = {s: self._leaf(-1) for s in scalar_slots}

    def copy(self, root: Expr) -> Expr:
        """Copy a root."""
        return rebuilt(root, self._made, self._below, self._copied)

    def _below(self, e: Expr) -> Sequence[Expr]:
        if id(e) in self._on_host:
            return ()
        found = interpolation(e, self._is_number)  # which GE's Lerp, and kernels, compute in a way of their own
        return found if found is not None and found[0].tensor and found[1].tensor else e.args

    def _is_number(self, e: Expr, value: float) -> bool:
        return e.op == "leaf" and not e.tensor and isinstance(e.value, int) and self._constants.get(e.value) == value

    def finish(self, states: Mapping[int, torch.dtype]) -> None:
        """Assign slots to the totals and states, behind the host's values."""
        for s, leaf in self._device_leaves.items():
            leaf.value = len(self.slots)
            self.slots.append(Slot(False, states.get(s, torch.float64)))

    def place(self, slot: int) -> int:
        """The slot of the device formula for one that is written; after `finish`."""
        found = self._tensor_slot[slot] if slot in self._tensor_slot else self._device_leaves[slot].value
        assert isinstance(found, int)
        return found

    def scalar(self) -> Expr:
        self.slots.append(Slot(False, torch.float64))
        return self._leaf(len(self.slots) - 1)

    def _leaf(self, slot: int) -> Expr:
        return Expr("leaf", (), slot, torch.float64, False)

    def _copied(self, e: Expr, below: Sequence[Expr]) -> Expr:
        if id(e) in self._on_host:
            self.values.append(e)
            leaf = self.scalar()
            if e.dtype == torch.bool:
                return Expr("ne", (leaf, Expr("zero", (), 0, torch.float64, False)), None, torch.bool, False)
            return leaf if e.dtype == torch.float64 else Expr("cast", (leaf,), e.dtype, e.dtype, False)
        if e.op == "leaf":
            assert isinstance(e.value, int)
            if not e.tensor:
                return self._device_leaves[e.value]
            return Expr("leaf", (), self._tensor_slot[e.value], e.dtype, True)
        args = tuple(self._made[id(a)] for a in below)
        if below is not e.args:  # those of the interpolation that it is
            return Expr("lerp", args, None, e.dtype, True)
        return Expr(e.op, args, e.value, e.dtype, e.tensor)
