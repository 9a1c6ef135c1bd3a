"""Parity: steps compiled for a platform, against the same optimizer run eagerly in float64 on the CPU."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.report.report import CompileReport, clear_reports, reports
from npu_fuse_pass.tolerances import SELF_TEST
from npu_fuse_pass.tools.compile_step import compile_step
from npu_fuse_pass.tools.selftest.cases import Case
from npu_fuse_pass.tools.selftest.private import anonymous, first_line

SHAPES = [(64, 33), (7,), (1,), (3, 5, 2), (16, 4, 3, 3)]
STEPS = 5
_WITHOUT_GRADIENT = (3, 1)  # at this step, this parameter


@dataclasses.dataclass
class Outcome:
    """The outcome of a case.

    Attributes:
        name: of the case.
        verdict: "ok", "WRONG" (numbers), "NOT FUSED" (right, but the original ran) or "ERROR".
        error: largest relative error of parameters and states; None where no step ran.
        tolerance: the allowed error.
        seconds: all of it, compile included.
        kernels: kernel of each group, with calls per step and bytes per element.
        why: the error, or why the original ran.
    """

    name: str
    verdict: str
    error: float | None
    tolerance: float
    seconds: float
    kernels: list[str]
    why: str = ""

    def __str__(self) -> str:
        error = "no step ran" if self.error is None else f"max relative error {self.error:.1e}"
        line = f"{self.verdict:10}{self.name}: {error} (allowed {self.tolerance:.0e}), {self.seconds:.1f} s"
        return line + (f"\n          {self.why}" if self.why else "")


def compare(case: Case, platform: str, device: str, **options: Any) -> Outcome:
    """Compare five compiled steps of a case, with parameters on `device`, with float64. `options`: of the backend."""
    start = time.perf_counter()
    clear_reports()
    torch.compiler.reset()
    error, why = None, ""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="npu_fused")  # the report says it
            error = _worst_error(case, device, {"platform": platform, **options})
    except Exception as e:  # the next case may still run
        why = first_line(e)
    made = [r for r in reports() if r.is_step]
    tolerance = SELF_TEST[case.dtype]
    if error is None:
        verdict = "ERROR"
    elif not error <= tolerance:  # NaN too
        verdict = "WRONG"
    else:
        why = _not_fused(made, platform)
        verdict = "NOT FUSED" if why else "ok"
    kernels = [f"{g.launches} x {g.kernel}, {g.bytes_per_element} bytes/element" for r in made for g in r.groups]
    return Outcome(case.name, verdict, error, tolerance, time.perf_counter() - start, kernels, why)


def _not_fused(made: Sequence[CompileReport], platform: str) -> str:
    """Why something did not run fused on the platform; "" if all did."""
    if not made:
        return "nothing reached the backend"
    reasons = [r.fallback for r in made if r.fallback] + [str(reason) for r in made for reason in r.unfused]
    lowerings = {g.lowering for r in made for g in r.groups}
    return anonymous("; ".join(reasons)) or ("" if lowerings == {platform} else f"it ran on {sorted(lowerings)}")


def _worst_error(case: Case, device: str, options: dict[str, Any]) -> float:
    generator = torch.Generator().manual_seed(0)
    # as large as what the steps change, or an error of an update would drown in the parameter's size
    start = [torch.randn(s, generator=generator).mul_(0.1).to(case.dtype) for s in SHAPES]
    params = [torch.nn.Parameter(t.to(device, copy=True)) for t in start]
    wanted = [torch.nn.Parameter(t.double()) for t in start]
    opt, reference = case.make(params), case.make(wanted)
    step = compile_step(opt, **options)
    for k in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(100 * k)
        for i, (p, q) in enumerate(zip(params, wanted, strict=True)):
            grad = torch.randn(q.shape, generator=generator).to(case.dtype)
            missing = case.ours and (k, i) == _WITHOUT_GRADIENT
            p.grad, q.grad = (None, None) if missing else (grad.to(device), grad.double())
        for o in (opt, reference) if case.ours else ():
            for name in {"lr", "learning_rate"} & o.param_groups[0].keys():
                o.param_groups[0][name] *= 0.9
        step()
        reference.step()
    pairs = [(p.detach(), q.detach()) for p, q in zip(params, wanted, strict=True)]
    for p, q in zip(params, wanted, strict=True):
        states = {name: value for name, value in reference.state[q].items() if isinstance(value, Tensor)}
        pairs += [(opt.state[p][name], value) for name, value in states.items()]
    return float(torch.tensor([_error(got, want) for got, want in pairs]).max())  # of which a NaN comes through


def _error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the element or to the tensor's mean size, where that is larger."""
    got, want = got.double().cpu(), want.double()
    scale = torch.maximum(want.abs(), want.abs().mean()).clamp_min(1e-30)
    return float(((got - want).abs() / scale).max())
