"""Updates with reductions over some of the dimensions beside eager and Inductor: python scripts/bench_dimensions.py

Gradient centralisation (the mean of every row of a gradient, then SGD with momentum) and factored second moments (a
mean of rows and one of columns, as in Adafactor), on tensors of one shape. Medians of steps that take turns in one run,
on fresh gradients; `--inductor` adds torch.compile's own compiler.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from typing import Any

import torch
from bench_measure import machine, race
from torch import Tensor

SHAPES = [((256, 256), 40), ((2048, 2048), 4), ((64, 64, 3, 3), 40)]


class Centralised(torch.optim.Optimizer):
    """SGD with momentum on centralised gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            g = p.grad - p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True)
            p.sub_(self.state[p]["momentum"].mul_(0.9).add_(g), alpha=1e-3)


class Factored(torch.optim.Optimizer):
    """The second moment as a row and a column of means."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"row": p.new_zeros(p.shape[:-1]), "column": p.new_zeros(p.shape[:-2] + p.shape[-1:])}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            row, column = self.state[p]["row"], self.state[p]["column"]
            square = p.grad * p.grad + 1e-30
            row.mul_(0.99).add_(square.mean(-1), alpha=0.01)
            column.mul_(0.99).add_(square.mean(-2), alpha=0.01)
            scale: Tensor = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
            p.sub_(scale * p.grad, alpha=1e-3)


def contestants(make: Callable[[Any], Any], shape: tuple[int, ...], count: int, inductor: bool) -> dict[str, Any]:
    """Ours, eager and Inductor, each with parameters of its own."""
    compiled: dict[str, dict[str, Any] | None] = {"ours": {"backend": "npu_fused"}, "eager": None}
    if inductor:
        compiled["inductor"] = {}
    made: dict[str, Any] = {}
    for name, options in compiled.items():
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
        opt = make(params)
        # every contestant has code of its own to compile, and recompiles for none of the others
        torch._dynamo.reset()
        made[name] = (params, opt.step if options is None else torch.compile(opt.step, **options))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of timed rounds for each row")
    parser.add_argument("--inductor", action="store_true", help="torch.compile with Inductor as a peer")
    given = parser.parse_args()
    print(f"{datetime.date.today().isoformat()}, {machine()}")
    print("| update | tensors | ours, us | eager, us | eager / ours | Inductor, us | Inductor / ours |")
    print("|---|---|---|---|---|---|---|")
    for make in (Centralised, Factored):
        for shape, count in SHAPES:
            found = race(contestants(make, shape, count, given.inductor), given.seconds)
            cells = [f"{make.__name__}", f"{count} x {'x'.join(map(str, shape))}", f"{found.median('ours') * 1e6:.0f}"]
            for peer in ("eager", "inductor"):
                there = bool(found.steps.get(peer))
                cells += [f"{found.median(peer) * 1e6:.0f}", f"{found.ratio(peer):.2f}"] if there else ["–", "–"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
