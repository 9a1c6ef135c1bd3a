"""Dumps of steps that differ in kind, made by a process of its own: dump_cases.py FOLDER."""

from __future__ import annotations

import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

import optimizers

SHAPES = ((4, 3), (5, 2), (4, 3), (6, 5), (3, 3))


def parameters(half: int = 0) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    dtypes = [torch.float32] * len(SHAPES) + [torch.bfloat16] * half
    made = [torch.nn.Parameter(torch.randn(s).to(d)) for s, d in zip([*SHAPES, *SHAPES[:half]], dtypes, strict=True)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def compiled(step: Callable[..., Any], dump: pathlib.Path, **options: Any) -> Callable[..., Any]:
    return torch.compile(step, backend="npu_fused", options={"dump": dump}, **options)


def adam(dump: pathlib.Path) -> None:
    """A for-loop over two dtypes and two learning rates."""
    params = parameters(half=3)
    groups = [dict(params=params[:2], lr=0.1), dict(params=params[2:])]
    compiled(torch.optim.Adam(groups, lr=0.01, foreach=False).step, dump)()


def sgd(dump: pathlib.Path) -> None:
    """Two graphs: without buffers; with them and with lr as an argument."""
    opt = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    step = compiled(opt.step, dump)
    step()
    step()
    opt.param_groups[0]["lr"] = 0.05
    step()


def muon(dump: pathlib.Path) -> None:
    """Matrix products stay between fused kernels."""
    compiled(torch.optim.Muon(parameters(), lr=0.1).step, dump)()


def tail(dump: pathlib.Path) -> None:
    """Clipping, LAMB with a norm over all gradients, and an average in one graph; a step can be skipped."""
    params = parameters()
    averages = [p.detach().clone() for p in params]
    opt = optimizers.NpuFusedLamb(params, lr=1e-3, use_global_grad_norm=True)
    opt.found_inf = torch.zeros(())

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 0.01)

    compiled(step, dump, fullgraph=True)()


def double(dump: pathlib.Path) -> None:
    """Captured counters are float32, in which a bias correction has fewer digits than the parameters."""
    params = [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    for p in params:
        p.grad = torch.randn_like(p)
    compiled(torch.optim.Adam(params, lr=0.01, foreach=False).step, dump)()


def rows(dump: pathlib.Path) -> None:
    """A state for each row: a stage makes what the next one reads, in another shape."""
    params = parameters()
    states = [torch.zeros(len(p), 1) for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, s in zip(params, states, strict=True):
            s.mul_(0.9).add_(p.grad.square().mean(1, keepdim=True))
            p.sub_(0.1 * p.grad / (s.sqrt() + 1e-3))

    compiled(step, dump, fullgraph=True)()


# and how many compiles there are
CASES = {
    "adam": (adam, 1),
    "sgd": (sgd, 2),
    "muon": (muon, 1),
    "tail": (tail, 1),
    "double": (double, 1),
    "rows": (rows, 1),
}


def main(root: str) -> None:
    warnings.simplefilter("ignore", UserWarning)
    for name, (run, _) in CASES.items():
        run(pathlib.Path(root) / name)


if __name__ == "__main__":
    main(sys.argv[1])
