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
from npu_fuse_pass.ir.fused_op import member_values
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Captured, Group, Leaf
from npu_fuse_pass.lowerings.npu.emit.split import Split, split_operands
from npu_fuse_pass.match.find import match
from npu_fuse_pass.match.result import Match
from tests.support.graphs import captured_step, step_with, with_groups
from tests.support.spellings import Spelling
from tests.support.spellings_more import SPELLINGS
from tests.support.tolerances import DEDICATED
from tests.support.training import clones, gradients, parameters, set_gradients
from tests.unit.match.test_match import apart, over


def operands(found: Match, made: Group, totals: list[int]) -> Split:
    """All arguments of the operation: its tensors, then its numbers."""
    kernel = found.kernel
    given = [*(found.inputs[name] for name in kernel.inputs), *(found.scalars[name] for name in kernel.scalars)]
    return split_operands(made.formula, given, [*found.outputs.values()], found.constants, totals)


def run_dedicated(
    captured: Captured, made: Group, found: Match, values: list[Tensor | None], dtype: torch.dtype
) -> None:
    """One step of a matched group: prepared inputs elementwise, numbers on the host, one operation per member, then
    the formula's own writes to step counters.
    """
    kernel = found.kernel
    totals = [s for s in made.formula.scalar_slots if captured.leaves[made.members[0][s]].kind == "total"]
    parts = operands(found, made, totals)
    for member in made.members:
        given = {s: value_of(captured.leaves[i], values, i) for s, i in enumerate(member)}
        scalars = {s: given[s].double() for s in made.formula.scalar_slots}
        numbers, counters = parts.host_values(scalars)
        made_of = member_values(parts.device, [given[s] for s in parts.tensor_slots], numbers)
        arguments = [made_of[id(e)] for e in parts.device.contributions]
        tensors, rest = arguments[: len(kernel.inputs)], arguments[len(kernel.inputs) :]
        results = kernel.function(*tensors, **{n: x.to(dtype) for n, x in zip(kernel.scalars, rest, strict=True)})
        for name, result in zip(kernel.outputs, results, strict=True):
            given[found.outputs[name]].copy_(result)
        for (slot, _), counter in zip(parts.advanced, counters, strict=True):
            given[slot].copy_(counter)


def value_of(leaf: Leaf, values: list[Tensor | None], i: int) -> Tensor:
    value = torch.tensor(leaf.value, dtype=torch.float64) if leaf.kind == "constant" else values[i]
    assert value is not None
    return value


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
def test_every_argument_is_made_of_the_formula(spelling: Spelling, mode: str) -> None:
    """Stored tensors are the formula's own slots, all else is computed of them and of constants; the text of what the
    device computes can be parsed.
    """
    captured, made = spelling.group(mode)
    (found,) = match([made], captured.leaves)
    assert isinstance(found, Match)
    kernel, own = found.kernel, len(made.formula.slots)
    assert {*found.inputs} == {*kernel.inputs} and {*found.scalars} == {*kernel.scalars}
    stored = [e.value for name, e in found.inputs.items() if name not in found.prepared]
    assert len({*stored}) == len(stored) and {*stored} <= {*made.formula.tensor_slots}
    assert {*found.constants} == set(range(own, own + len(found.constants))) == set(range(own, len(found.slots)))
    assert {*found.outputs.values()} == {s for s, _ in made.formula.writes if made.formula.slots[s].tensor}
    assert all(not e.tensor and e.dtype == torch.float64 for e in found.scalars.values())
    device = operands(found, made, []).device
    assert len(parse(device.text).contributions) == len(device.contributions) == len(kernel.inputs + kernel.scalars)
