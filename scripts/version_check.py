"""Sixteen optimizers fuse and agree with eager: python scripts/version_check.py, with any torch.

Each is compiled with torch.compile and with compile_step and makes five steps beside an eager twin; two make them in
one graph with the clipping of their gradients. Printed is what is not fused or differs by more than 1e-6 (norm of a
tensor), and the number of failures, also the exit status: not fused, differing by more than 1e-5, or an exception.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

import npu_fuse_pass
import optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{row.optimizer: row.build for row in optimizers.one_each(optimizers.ROWS)},
    "torch.optim.SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "torch.optim.Adam": lambda ps: torch.optim.Adam(ps),
    "torch.optim.Adam, foreach": lambda ps: torch.optim.Adam(ps, foreach=True),
    "torch.optim.AdamW": lambda ps: torch.optim.AdamW(ps),
    "torch.optim.RMSprop": lambda ps: torch.optim.RMSprop(ps),
    "torch.optim.Adagrad": lambda ps: torch.optim.Adagrad(ps),
    "torch.optim.Adamax": lambda ps: torch.optim.Adamax(ps),
    "torch.optim.NAdam": lambda ps: torch.optim.NAdam(ps),
    "torch.optim.RAdam": lambda ps: torch.optim.RAdam(ps),
}


CLIPPED = ("NpuFusedAdam", "NpuFusedLamb")


def clipped(opt: torch.optim.Optimizer) -> Callable[[], object]:
    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.5)
        opt.step()

    return tail


def compiled(opt: torch.optim.Optimizer, how: str) -> Callable[[], object]:
    if how == "compile_step":
        fused: Callable[[], object] = npu_fuse_pass.compile_step(opt)
        return fused
    if how == "one graph with clipping":
        whole: Callable[[], object] = torch.compile(clipped(opt), backend="npu_fused", fullgraph=True)
        return whole
    step: Callable[[], object] = torch.compile(opt.step, backend="npu_fused")
    return step


def check(make: Callable[[Any], torch.optim.Optimizer], how: str) -> tuple[bool, float]:
    """Whether every compile is fused, and the largest relative difference from eager."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt, eager = make(params), make(others)
    step = compiled(opt, how)
    twin = clipped(eager) if how == "one graph with clipping" else eager.step
    for _ in range(5):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step()
        twin()
    reports = npu_fuse_pass.reports()
    fused = bool(reports) and all(r.groups and r.fallback is None and not r.unfused for r in reports)
    return fused, max(float((p - q).norm() / q.norm()) for p, q in zip(params, others, strict=True))


def main() -> None:
    warnings.simplefilter("ignore")
    failures = 0
    checks = [(name, how) for name in OPTIMIZERS for how in ("torch.compile", "compile_step")]
    checks += [(name, "one graph with clipping") for name in CLIPPED]
    for name, how in checks:
        try:
            fused, error = check(OPTIMIZERS[name], how)
        except Exception as e:
            failures += 1
            print(f"{name}, {how}: {type(e).__name__}: {e}")
            continue
        failures += not fused or error > 1e-5
        if not fused or error > 1e-6:
            print(f"{name}, {how}: fused {fused}, relative difference {error:.1e}")
    version = sys.version.split()[0]
    print(f"torch {torch.__version__}, Python {version}: {len(checks)} checks, {failures} failures")
    sys.exit(min(failures, 100))


if __name__ == "__main__":
    main()
