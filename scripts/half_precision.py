"""What bfloat16 parameters learn: error against float64 after many small steps: python scripts/half_precision.py.

A linear model on fixed data, trained with AdamW everywhere: in float64, and in bfloat16 with what each row says. Error
is the distance to the float64 parameters over the distance that these have moved. "float32 parameters, cast for the
model" is what apex and DeepSpeed call master weights: the optimizer's own float32 copy, written back as bfloat16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import npu_fuse_pass
import optimizers

STEPS, LR = 1000, 1e-4
IN, OUT = 200, 50


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, IN, generator=generator, dtype=torch.float64)
    return x, x @ torch.randn(IN, OUT, generator=generator, dtype=torch.float64) / IN**0.5


def start() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).div(IN**0.5).bfloat16()


def train(param: Tensor, step: Callable[[], object], steps: int, model: Tensor | None = None) -> Tensor:
    """Train; `model`: the bfloat16 copy that the forward pass uses, where the optimizer has parameters of its own."""
    x, y = data()
    used = param if model is None else model
    x, y = x.to(used.dtype), y.to(used.dtype)
    for _ in range(steps):
        used.grad = None
        ((x @ used.T) - y).square().mean().backward()
        if model is not None:
            assert model.grad is not None
            param.grad = model.grad.to(param.dtype)
        step()
        if model is not None:
            model.data.copy_(param.detach())
    return used.detach().double()


def compiled(opt: torch.optim.Optimizer) -> Callable[[], object]:
    return torch.compile(opt.step, backend="npu_fused")


def rows() -> list[tuple[str, Callable[[int], tuple[Tensor, str]]]]:
    def of(make: Callable[[Any], torch.optim.Optimizer], fuse: bool) -> Callable[[int], tuple[Tensor, str]]:
        def run(steps: int) -> tuple[Tensor, str]:
            param = torch.nn.Parameter(start())
            opt = make([param])
            npu_fuse_pass.clear_reports()
            got = train(param, compiled(opt) if fuse else opt.step, steps)
            moved = {g.bytes_per_element for r in npu_fuse_pass.reports() for g in r.groups}
            return got, ", ".join(f"{b:g}" for b in sorted(moved)) or "-"

        return run

    def copied(steps: int) -> tuple[Tensor, str]:
        model = torch.nn.Parameter(start())
        param = torch.nn.Parameter(start().float())
        return train(param, torch.optim.AdamW([param], lr=LR).step, steps, model), "-"

    ours = optimizers.NpuFusedAdamW
    return [
        ("torch.optim.AdamW, fused=True", of(lambda ps: torch.optim.AdamW(ps, lr=LR, fused=True), False)),
        ("NpuFusedAdamW", of(lambda ps: ours(ps, lr=LR), True)),
        ("NpuFusedAdamW, float32 states", of(lambda ps: ours(ps, lr=LR, state_dtype=torch.float32), True)),
        ("NpuFusedAdamW, master weights", of(lambda ps: ours(ps, lr=LR, master_weights=True), True)),
        (
            "NpuFusedAdamW, master weights, float32 states",
            of(lambda ps: ours(ps, lr=LR, state_dtype=torch.float32, master_weights=True), True),
        ),
        ("float32 parameters, cast for the model", copied),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    exact = torch.nn.Parameter(start().double())
    began = copy.deepcopy(exact.detach())
    want = train(exact, torch.optim.AdamW([exact], lr=LR).step, steps)
    moved = float((want - began).norm())
    print(f"{steps} steps of AdamW at lr {LR:g}; in float64 the parameters move by {moved:.3g} (norm)\n")
    print("| bfloat16 parameters and gradients | error over movement | bytes per element and step |")
    print("|---|---|---|")
    for name, run in rows():
        got, traffic = run(steps)
        print(f"| {name} | {float((got - want).norm()) / moved:.2g} | {traffic} |")


if __name__ == "__main__":
    main()
