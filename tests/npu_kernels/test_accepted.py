"""Every kernel is accepted by the real compiler, moves no more than it has to, and overlaps copies with work."""

from __future__ import annotations

import pytest
import torch

from npu_fuse_pass.ir.expr import REDUCTIONS, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.npu.kernels.final_ir import facts
from npu_fuse_pass.lowerings.npu.kernels.pipes import waiting_loads
from tests.npu_kernels import steps
from tests.npu_kernels.compiler import TARGETS, final_ir
from tests.npu_kernels.executed import generated_groups
from tests.npu_kernels.steps import ALL, OURS, Step

CLASSES = ("Ascend910B3", "Ascend910B1", "Ascend910_9599")
"""One target of each kind: 40, 48 and 72 vector cores."""


def least(formula: Formula) -> int | None:
    """What a formula without sums has to move for each element: each tensor that it reads or writes, once."""
    order = postorder(formula.roots)
    if any(e.op in REDUCTIONS for e in order):
        return None
    read = {e.value for e in order if e.op == "leaf" and e.tensor}
    written = [s for s in formula.written if formula.slots[s].tensor]
    return sum(formula.slots[s].dtype.itemsize for s in [*read, *written])  # type: ignore[index]


WITH_SUMS = {
    "lamb": [40],
    "lamb_global": [44],
    "Lamb": [40],
    "ClippedSGD": [24],
    "Tiger": [24],
    "NovoGrad": [24],
    "CautiousAdamW": [36],
}
"""Bytes per element in float32, counted by hand. LAMB: the first pass reads four tensors and writes two, the second
reads three and writes one. Global: a norm of all gradients before. The others: a pass over what is
summed up (gradients; parameters; gradients and momentum), then the update."""
LAUNCHES = {"lamb_global": 3}
"""Beside one for an elementwise update and two with norms of tensors: the passes over memory, and no more."""
STATES = ("NovoGrad",)
"""With 0-dim states that follow from tensors: after all passes, a launch over members writes them."""


def check(step: Step, dtype: torch.dtype, targets: tuple[str, ...] = CLASSES[:1]) -> None:
    for captured in steps.captured(step, dtype):
        for found in generated_groups(captured):
            minimum = least(found.group.formula)
            launches = [kernel.over for kernel in found.kernels.launches]
            passes = ["chunks"] * LAUNCHES.get(step.name, 1 if minimum is not None else 2)
            assert launches == [*passes, *(["members"] if step.name in STATES else [])]
            if minimum is not None:
                assert found.kernels.bytes_per_element == minimum
            elif dtype == torch.float32:
                assert [found.kernels.bytes_per_element] == WITH_SUMS[step.name]
            for kernel in found.kernels.launches:
                for target in targets:
                    text = final_ir(kernel.text, target)
                    read = facts(text)
                    if kernel.over == "chunks":
                        assert read.bytes_per_element == kernel.bytes_per_element, (kernel.name, target, read)
                    if target == CLASSES[0]:
                        assert read.double_buffered, (kernel.name, read)
                        assert read.buffer_bytes <= read.buffer_limit == 192 * 1024
                        assert kernel.over == "members" or not waiting_loads(text)


@pytest.mark.parametrize("step", ALL, ids=str)
def test_float32(step: Step) -> None:
    check(step, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("step", ALL, ids=str)
def test_half(step: Step, dtype: torch.dtype) -> None:
    check(step, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("step", ALL, ids=str)
def test_each_kind_of_target(step: Step) -> None:
    check(step, torch.float32, CLASSES)


@pytest.mark.parametrize("target", TARGETS)
def test_seven_on_all_targets(target: str) -> None:
    chosen = ("sgd_momentum", "adam_amsgrad", "adamw", "lamb", "lamb_global", "rmsprop_tf_centered", "lion")
    for step in (s for s in OURS if s.name in chosen):
        for found in generated_groups(steps.captured(step, torch.float32)[0], size=4096):
            for kernel in found.kernels.launches:
                read = facts(final_ir(kernel.text, target))
                assert kernel.over == "members" or read.bytes_per_element == kernel.bytes_per_element
