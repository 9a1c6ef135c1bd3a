"""What a lowering gets of a match is enough to emit the dedicated operation: a small lowering, written here, does it.

It uses nothing but the `Match`, the group, and the split between host and device that the NPU lowering uses for any
formula. "The operation" is the kernel's function on float32 tensors, in place on the leaves that it writes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import optimizers
from npu_fuse_pass.ir.fused_op import evaluate
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Captured, Group, Leaf
from npu_fuse_pass.lowerings.npu.emit.split import split
from npu_fuse_pass.match.find import match
from npu_fuse_pass.match.result import Match
from tests.support.graphs import captured_step, step_with, with_groups
from tests.support.spellings import Spelling
from tests.support.spellings_more import SPELLINGS
from tests.support.tolerances import DEDICATED
from tests.support.training import clones, gradients, parameters, set_gradients
from tests.unit.match.test_match import apart, over


def run_dedicated(
    captured: Captured, made: Group, found: Match, values: list[Tensor | None], dtype: torch.dtype
) -> None:
    """One step of a matched group: prepared inputs elementwise, numbers on the host, one operation per member, then
    the formula's own writes to step counters.
    """
    operands = found.operands
    totals = [s for s in made.formula.scalar_slots if captured.leaves[made.members[0][s]].kind == "total"]
    parts = split(parse(operands.formula.text), totals, contribute=False)
    own = split(made.formula, totals, contribute=False)
    for member in made.members:
        given = {s: value_of(captured.leaves[i], values, i) for s, i in enumerate(member)}
        given |= {s: torch.tensor(x, dtype=torch.float64) for s, x in operands.constants.items()}
        scalars = {s: x.double() for s, x in given.items() if not operands.formula.slots[s].tensor}
        numbers, advanced = parts.host_values(scalars)
        assert len(advanced) == len(found.scalars)
        arguments = {name: given[slot] for name, slot in operands.slot.items() if slot in given}
        slots = [slot for slot, _ in parts.advanced]
        arguments |= {n: advanced[slots.index(s)].to(dtype) for n, s in operands.slot.items() if s in slots}
        arguments |= prepared(parts, operands.slot, given, numbers)
        assert arguments.keys() == {*found.kernel.inputs, *found.kernel.scalars}
        _, counters = own.host_values(scalars)
        tensors = [arguments[name] for name in found.kernel.inputs]
        results = found.kernel.function(*tensors, **{name: arguments[name] for name in found.kernel.scalars})
        for name, result in zip(found.kernel.outputs, results, strict=True):
            given[found.outputs[name]].copy_(result)
        for (slot, _), counter in zip(own.advanced, counters, strict=True):
            given[slot].copy_(counter)


def value_of(leaf: Leaf, values: list[Tensor | None], i: int) -> Tensor:
    value = torch.tensor(leaf.value, dtype=torch.float64) if leaf.kind == "constant" else values[i]
    assert value is not None
    return value


def prepared(parts: Any, slot_of: Any, given: dict[int, Any], numbers: list[Tensor]) -> dict[str, Tensor]:
    """The inputs that are computed on the device: a formula of tensors and host numbers."""
    device = parts.device
    tensors = {k: given[s] for k, s in enumerate(parts.tensor_slots) if s in given}
    scalars = dict(zip(device.scalar_slots, numbers, strict=True))
    values = evaluate(device, tensors, scalars)
    name_of = {slot: name for name, slot in slot_of.items()}
    return {name_of[parts.tensor_slots[k]]: values[id(e)] for k, e in device.writes}


RULES: list[tuple[Any, dict[str, Any]]] = [
    (optimizers.NpuFusedAdam, dict(lr=0.02, weight_decay=0.1)),
    (optimizers.NpuFusedAdam, dict(lr=0.02, amsgrad=True)),
    (optimizers.NpuFusedAdamW, dict(lr=0.02, weight_decay=0.1)),
    (optimizers.NpuFusedAdamW, dict(lr=0.02, weight_decay=0.1, amsgrad=True)),
    (optimizers.NpuFusedSGD, dict(lr=0.02, momentum=0.9, weight_decay=0.1)),
    (optimizers.NpuFusedSGD, dict(lr=0.02, momentum=0.9, dampening=0.3)),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, weight_decay=0.1)),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, centered=True)),
    (optimizers.NpuFusedRMSpropTF, dict(lr=0.02, momentum=0.9, decoupled_decay=True, weight_decay=0.1)),
]


@pytest.mark.parametrize("numbers", DEDICATED, ids=str)
@pytest.mark.parametrize(("cls", "options"), RULES, ids=[f"{i}-{c.__name__}" for i, (c, _) in enumerate(RULES)])
def test_steps_of_the_dedicated_operation_are_the_optimizers(
    cls: Any, options: dict[str, Any], numbers: torch.dtype
) -> None:
    """Four steps, two parameter groups with different numbers, a parameter that starts later, another lr at each."""
    shapes = [(3, 4), (5,), (2, 3)]
    params = parameters(shapes)
    others = clones(params)
    both = []
    for own in (params, others):
        second = {"params": own[2:], "lr": 0.05, "weight_decay": options.get("weight_decay", 0.0) / 2}
        both.append(cls([{"params": own[:2]}, second], **options))
    for seed in range(4):
        grads: list[Tensor | None] = [*gradients(params, seed)]
        grads[1] = None if seed == 0 else grads[1]
        for opt, own in zip(both, (params, others), strict=True):
            opt.param_groups[0]["lr"] = options["lr"] * (1 + seed)
            set_gradients(own, grads)
        before = [p.detach().clone() for p in params]
        both[1].step()
        steps_with_the_operation(both[0], numbers)
        for got, want, old in zip(params, others, before, strict=True):
            assert apart(got.detach(), want.detach(), old) <= DEDICATED[numbers]
        for p, q in zip(params, others, strict=True):
            for name, want in both[1].state[q].items():
                assert apart(both[0].state[p][name], want) <= DEDICATED[numbers], name


def steps_with_the_operation(opt: Any, numbers: torch.dtype) -> None:
    """`opt.step()` with the core replaced by dedicated operations."""

    def core(values: list[Tensor | None]) -> None:
        captured, groups = with_groups(captured_step(opt))
        for made, found in zip(groups, match(groups, captured.leaves), strict=True):
            assert isinstance(found, Match), found
            inactive = {i for member in made.members for i in member if is_missing(captured, values, i)}
            made.members = [member for member in made.members if not inactive & {*member}]
            with torch.no_grad():
                run_dedicated(captured, made, found, values, numbers)

    step_with(opt, core)


def is_missing(captured: Captured, values: list[Tensor | None], i: int) -> bool:
    return captured.leaves[i].kind == "input" and values[i] is None


@over(SPELLINGS)
def test_every_argument_has_a_slot(spelling: Spelling, mode: str) -> None:
    """Stored tensors are the formula's own slots, all else is written, nothing twice; the text can be parsed."""
    captured, made = spelling.group(mode)
    (found,) = match([made], captured.leaves)
    assert isinstance(found, Match)
    operands, kernel = found.operands, found.kernel
    assert operands.slot.keys() == {*kernel.inputs, *kernel.scalars}
    own = len(made.formula.slots)
    written = {slot for slot, _ in operands.formula.writes}
    assert written == {operands.slot[name] for name in operands.computed}
    assert {*operands.computed} == {*found.prepared, *kernel.scalars}
    assert all(slot < own for name, slot in operands.slot.items() if name not in operands.computed)
    assert {*operands.constants} == set(range(own, own + len(operands.constants)))
    assert {*found.outputs.values()} == {s for s, _ in made.formula.writes if made.formula.slots[s].tensor}
    assert parse(operands.formula.text).writes
    scalar_writes = [e for slot, e in operands.formula.writes if not operands.formula.slots[slot].tensor]
    assert all(not e.tensor and e.dtype == torch.float64 for e in scalar_writes)
