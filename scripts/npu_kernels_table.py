"""What a step moves on an NPU: today's GE operations, generated kernels, and the least that its formula allows.

    bash scripts/npu_python.sh scripts/npu_kernels_table.py             # for 100 parameters, half a minute
    bash scripts/npu_python.sh scripts/npu_kernels_table.py 10

Runs in the environment of the NPU lane, which `bash scripts/npu_lane.sh` makes. A cell is bytes for each parameter
element, float32, then launches: compute nodes of the emitted GE graph today, with tensors that lie apart, and launches
of generated kernels. "Least" is each tensor that the formula reads or writes once for every pass over memory that norms
and totals force, and these passes. Bytes of generated kernels are those of their arguments; that the compiler's last IR
moves the same is what tests/npu_kernels proves (bash scripts/npu_kernels_lane.sh). Nothing here was launched.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import npu_graphs  # noqa: E402
import torch  # noqa: E402

import optimizers  # noqa: E402
from npu_fuse_pass.capture.rule import capture_batches  # noqa: E402
from npu_fuse_pass.ir.expr import REDUCTIONS, postorder  # noqa: E402
from npu_fuse_pass.ir.totals import total_slots  # noqa: E402
from npu_fuse_pass.ir.types import Formula, Grouped  # noqa: E402
from npu_fuse_pass.lowerings.kernels.sweeps import schedule  # noqa: E402
from npu_fuse_pass.lowerings.npu.kernels.launch import Generated, generate_group  # noqa: E402
from npu_fuse_pass.passes.group import group  # noqa: E402
from optimizers.paddle import RMSProp  # noqa: E402

Make = Callable[[Any], Any]
ROWS: dict[str, Make] = {
    "Adam": lambda p: optimizers.NpuFusedAdam(p, lr=1e-3),
    "Adam, weight decay": lambda p: optimizers.NpuFusedAdam(p, lr=1e-3, weight_decay=0.01),
    "AdamW": lambda p: optimizers.NpuFusedAdamW(p, lr=1e-3),
    "AMSGrad": lambda p: optimizers.NpuFusedAdam(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: optimizers.NpuFusedSGD(p, lr=1e-3),
    "SGD, momentum": lambda p: optimizers.NpuFusedSGD(p, lr=1e-3, momentum=0.9),
    "RMSpropTF": lambda p: optimizers.NpuFusedRMSpropTF(p, lr=1e-3),
    "RMSpropTF, momentum": lambda p: optimizers.NpuFusedRMSpropTF(p, lr=1e-3, momentum=0.9),
    "RMSpropTF, centered": lambda p: optimizers.NpuFusedRMSpropTF(p, lr=1e-3, momentum=0.9, centered=True),
    "Paddle RMSProp": lambda p: RMSProp(1e-3, parameters=p),
    "LAMB": lambda p: optimizers.NpuFusedLamb(p, lr=1e-3),
    "LAMB, norm of all gradients": lambda p: optimizers.NpuFusedLamb(p, lr=1e-3, use_global_grad_norm=True),
}
_SHAPE = (64, 64)
BLOCK = 4096
"""Elements of a chunk; tables alone depend on it."""


def least(formula: Formula, totals: Collection[int] | None) -> tuple[int, int]:
    """Bytes for each element that no kernel for a formula can do without, and passes over memory.

    Args:
        totals: as `schedule` takes them.
    """
    order = postorder(formula.roots)
    if any(e.op in REDUCTIONS for e in order):
        scheduled = schedule(formula, totals)
        return sum(scheduled.bytes), sum(len(function.sweeps) for function in scheduled.functions)
    used = {e.value for e in order if e.op == "leaf" and e.tensor}
    each = [*used, *(s for s in formula.written if formula.slots[s].tensor)]
    return sum(slot.dtype.itemsize for s in each if isinstance(s, int) for slot in [formula.slots[s]]), 1


def grouped(make: Make) -> Grouped:
    """An optimizer's step in groups."""
    params = [torch.nn.Parameter(torch.zeros(_SHAPE)) for _ in range(2)]
    for p in params:
        p.grad = torch.zeros(_SHAPE)
    opt = make(params)
    opt._prelude.prepare()
    return group(capture_batches(opt._prelude.batches))


def kernels_of(step: Grouped) -> list[Generated]:
    """The groups of a step, with their kernels."""
    return [generate_group(g, step.leaves, lambda _: BLOCK) for g in step.groups]


def table(parameters: int) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| optimizer | before: GE operations | now: generated kernels | least |"
    yield "|---|---|---|---|"
    for name, make in ROWS.items():
        nodes, _ = npu_graphs.emitted(make, [_SHAPE] * parameters, False)
        before = sum(size for _, size in nodes) / (parameters * _SHAPE[0] * _SHAPE[1])
        step = grouped(make)
        made, totals = kernels_of(step), total_slots(step.groups, step.leaves)
        now, launches = (sum(k.kernels.bytes_per_element for k in made), sum(len(k.kernels.launches) for k in made))
        minimum, passes = map(sum, zip(*map(least, (g.formula for g in step.groups), totals), strict=True))
        yield f"| {name} | {before:.0f} B, {len(nodes)} | {now} B, {launches} | {minimum} B, {passes} |"


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parameters", nargs="?", type=int, default=100, help="how many")
    print("\n".join(table(parser.parse_args().parameters)))


if __name__ == "__main__":
    main()
