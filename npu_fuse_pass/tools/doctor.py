"""Diagnosis of an observed optimizer: gains from fusing, and obstacles."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import FuseError, NumericsError
from npu_fuse_pass.reasons import advised
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules.hidden import hidden_class
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.tensors.memory import lie_apart
from npu_fuse_pass.tensors.sharded import local
from npu_fuse_pass.tools.explain import try_on_copy
from npu_fuse_pass.tools.observe import Measured, Observed, measure

_OURS = "an optimizer of this package or a rule never recompiles for it"
# ours -> torch's class of the same kind, whose memory is measured for comparison
_COUNTERPART = {"NpuFusedAdam": "Adam", "NpuFusedAdamW": "AdamW", "NpuFusedSGD": "SGD", "NpuFusedRMSpropTF": "RMSprop"}
# Temporaries of torch_npu.optim 2.13 that live at once, in copies of all parameters, counted in its source: root and
# quotient of Adam's denominator, square and difference of RMSprop's average. True: weight_decay makes one more, where
# it is added to the gradient.
_TORCH_NPU = {"Adam": (2, True), "AdamW": (2, False), "SGD": (0, True), "RMSprop": (2, True)}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of one optimizer.

    Attributes:
        memory: peak bytes that a step allocates, by implementation.
        findings: obstacles to fusing, or to its gain, if any; with what to do.
    """

    name: str
    parameters: int
    elements: int
    calls: tuple[int | str, int]
    report: CompileReport
    memory: dict[str, int]
    findings: list[str]

    def __str__(self) -> str:
        now, fused = self.calls
        lines = [f"{self.name}: {self.parameters} parameters, {self.elements:,} elements"]
        lines.append(f"  kernel calls per step: now {now}, fused {fused or '-'}")
        traffic = self.report.bytes_per_element
        if traffic:
            saved = traffic["before"] / traffic["after"]
            lines.append(
                f"  memory traffic, bytes per element: operation by operation {traffic['before']:.0f}, "
                f"fused {traffic['after']:.0f} ({saved:.1f} times less)"
            )
        lines.append("  memory that a step allocates at its peak:")
        lines += [f"    {size:14,} bytes  {who}" for who, size in self.memory.items()]
        lines.append("  in the way:" if self.findings else "  in the way: nothing")
        lines += [f"    - {finding}" for finding in self.findings]
        return "\n".join([*lines, *(f"  {line}" for line in str(self.report).splitlines())])


def examine(seen: Observed, check_numerics: bool = False) -> Diagnosis:
    """Try the fused step on a copy of the optimizer, with its gradients, and measure it."""
    opt = seen.optimizer
    params = [p for group in opt.param_groups for p in group["params"]]
    measured = seen.measured
    memory = {}
    if isinstance(measured, Measured):
        memory["as the script runs it, eagerly (measured)"] = measured.peak_bytes
    memory |= _others(opt, params)
    findings = _tensors(params)
    report, launches = CompileReport("auto"), 0
    try:
        trial = try_on_copy(opt, {})
        report, launches = trial.report, sum(g.launches for g in trial.report.groups)
        findings += [reason.advised for reason in report.reasons]
        if trial.step is not None:
            memory["fused (measured)"] = measure(trial.step).peak_bytes
            if check_numerics:
                try_on_copy(opt, {"check_numerics": True})
    except NumericsError as e:
        findings.append(advised(f"WRONG NUMBERS: {e}", "please report it, with this output"))
    except FuseError as e:
        findings.append(str(e))
    findings += _recompiles(seen, report)
    if seen.closures:
        remedy = "compute the loss before the step, where the optimizer allows it"
        findings.append(advised("steps are given a closure, which runs outside of every graph", remedy))
    now = measured.calls if isinstance(measured, Measured) else f"not measured ({measured})"
    elements = sum(p.numel() for p in params)
    return Diagnosis(_name(opt), len(params), elements, (now, launches), report, memory, findings)


def _others(opt: torch.optim.Optimizer, params: list[Tensor]) -> dict[str, int]:
    """Peak bytes of torch.optim's foreach form (its default on accelerators) and of torch_npu.optim."""
    name = _COUNTERPART.get(type(opt).__name__, type(opt).__name__)
    cls: Any = getattr(torch.optim, name, None)
    if hidden_class(opt) is not None or cls is None or "foreach" not in inspect.signature(cls).parameters:
        return {}
    given = opt.param_groups[0]
    known = {k: given[k] for k in inspect.signature(cls).parameters if k in given and k not in ("params", "fused")}
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p in twins:
        p.grad = torch.zeros_like(p)
    numbers = {k: float(v) if isinstance(v, Tensor) else v for k, v in known.items()}
    made = cls(twins, **{**numbers, "foreach": True})
    made.step()
    found = {f"torch.optim.{name}, foreach (measured)": measure(made.step).peak_bytes}
    if name in _TORCH_NPU:
        copies, decays = _TORCH_NPU[name]
        copies += bool(decays and given.get("weight_decay"))
        size = copies * sum(p.nbytes for p in params)
        found["torch_npu.optim, flat tensors (modelled; its first step copies parameters and gradients once)"] = size
    return found


def _tensors(params: list[Tensor]) -> list[str]:
    """Findings about memory and gradients that no kernel supports."""
    found = []
    sparse = sum(p.grad is not None and p.grad.layout is not torch.strided for p in params)
    if sparse:
        remedy = "dense gradients: sparse=False in torch.nn.Embedding"
        found.append(advised(f"{sparse} parameters have sparse gradients", remedy))
    if not lie_apart([p for p in map(local, params) if p.data_ptr()]):
        remedy = "pass tied parameters once, or give them memory of their own"
        found.append(advised("two parameters share memory", remedy))
    return found


def _recompiles(seen: Observed, report: CompileReport) -> list[str]:
    """Findings about what makes a step compile again. Rules never do, and run some classes of torch.optim, too."""
    opt = seen.optimizer
    by_rule = report.replaces is not None  # unless torch.compile is given the step
    if isinstance(opt, RuleOptimizer) or (by_rule and seen.by_us):
        return []
    again = "a step by torch.compile(opt.step)" if by_rule else "the compiled step"
    instead = "npu_fuse_pass.compile_optimizer_(opt), whose step does not; or " if by_rule else ""
    found = []
    numbers = sorted(seen.changed - {"lr"})
    floats = not all(isinstance(group.get("lr"), Tensor) for group in opt.param_groups)
    if floats and ("lr" in seen.changed or any("initial_lr" in group for group in opt.param_groups)):
        what = f"lr is a Python number and a scheduler or the script changes it: {again} recompiles"
        found.append(advised(what, f"{instead}lr=torch.tensor(...), which schedulers fill; {_OURS}"))
    if numbers:
        what = f"{', '.join(numbers)} changed between steps: {again} recompiles"
        found.append(advised(what, f"{instead.removesuffix('or ')}{_OURS}"))
    if len(seen.gradients) > 1:
        what = f"gradients are None at some steps: {again} recompiles at every new pattern"
        found.append(advised(what, f"{instead}zero_grad(set_to_none=False); {_OURS}"))
    return found


def _name(opt: torch.optim.Optimizer) -> str:
    if type(opt) is RuleOptimizer:
        return f"the rule {opt.rule.name}"
    module = type(opt).__module__
    return f"torch.optim.{type(opt).__name__}" if module.startswith("torch.optim") else type(opt).__name__
