"""What bfloat16 parameters learn: error against float64 after many small steps: python scripts/half_precision.py.

A linear model on fixed data, trained with AdamW everywhere: in float64, and in bfloat16 with what each row says. Error
is the distance to the float64 parameters over the distance that these have moved; that of the means is the same for the
mean of all parameters' movements. "float32 parameters, cast for the model" is what apex and DeepSpeed call master
weights: the optimizer's own float32 copy, written back as bfloat16. Bytes are those that a step reads and writes for an
element, and those of the optimizer's own memory; for torch's they are counted, for ours they are the report's.
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


def held(opt: torch.optim.Optimizer, param: Tensor) -> int:
    """Bytes for each element that the optimizer keeps between steps."""
    return sum(t.itemsize for t in opt.state[param].values() if isinstance(t, Tensor) and t.numel() == param.numel())


def drift(got: Tensor, want: Tensor, began: Tensor) -> float:
    """Error of the parameters' mean movement in the direction of each one's own, over that movement."""
    direction = (want - began).sign()
    movement = ((want - began) * direction).mean()
    return float((((got - want) * direction).mean() / movement).abs())


def compiled(opt: torch.optim.Optimizer) -> Callable[[], object]:
    return torch.compile(opt.step, backend="npu_fused")


Row = Callable[[int], tuple[Tensor, str, int]]


def rows() -> list[tuple[str, Row]]:
    def of(make: Callable[[Any], torch.optim.Optimizer], traffic: str = "") -> Row:
        def run(steps: int) -> tuple[Tensor, str, int]:
            param = torch.nn.Parameter(start())
            opt = make([param])
            npu_fuse_pass.clear_reports()
            got = train(param, opt.step if traffic else compiled(opt), steps)
            moved = {g.bytes_per_element for r in npu_fuse_pass.reports() for g in r.groups}
            return got, traffic or ", ".join(f"{b:g}" for b in sorted(moved)), held(opt, param)

        return run

    def copied(steps: int) -> tuple[Tensor, str, int]:
        model = torch.nn.Parameter(start())
        param = torch.nn.Parameter(start().float())
        opt = torch.optim.AdamW([param], lr=LR, fused=True)
        # 6 for gradients that are cast, 16 read and 12 written by the step, 6 for parameters that are cast back
        return train(param, opt.step, steps, model), "40", held(opt, param) + param.itemsize

    ours = optimizers.NpuFusedAdamW
    return [
        ("torch.optim.AdamW, fused=True", of(lambda ps: torch.optim.AdamW(ps, lr=LR, fused=True), "14")),
        ("NpuFusedAdamW", of(lambda ps: ours(ps, lr=LR))),
        ("NpuFusedAdamW, float32 states", of(lambda ps: ours(ps, lr=LR, state_dtype=torch.float32))),
        ("NpuFusedAdamW, stochastic rounding", of(lambda ps: ours(ps, lr=LR, stochastic_rounding=True))),
        (
            "NpuFusedAdamW, stochastic rounding, float32 states",
            of(lambda ps: ours(ps, lr=LR, state_dtype=torch.float32, stochastic_rounding=True)),
        ),
        ("NpuFusedAdamW, master weights", of(lambda ps: ours(ps, lr=LR, master_weights=True))),
        (
            "NpuFusedAdamW, master weights, float32 states",
            of(lambda ps: ours(ps, lr=LR, state_dtype=torch.float32, master_weights=True)),
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
    columns = ["error over movement", "of the means", "bytes per element and step", "of memory"]
    print(f"| bfloat16 parameters and gradients | {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for name, run in rows():
        got, traffic, memory = run(steps)
        error, mean = float((got - want).norm()) / moved, drift(got, want, began)
        print(f"| {name} | {error:.2g} | {mean:.2g} | {traffic} | {memory} |")


if __name__ == "__main__":
    main()
