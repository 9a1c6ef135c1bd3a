"""What scripts/bench.py measures: workloads (parameter shapes) and families of optimizers with their peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import optimizers
from npu_fuse_pass.rules import core_op, rule, zeros
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.tools.model_shapes import Shape, gpt2, resnet50
from optimizers.paddle import RMSProp

INDUCTOR_AT_MOST = 200  # parameters; with 1000 it compiles for many minutes
Params = list[torch.nn.Parameter]
Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Parameter shapes. `large`: bandwidth decides, not the cost of a call."""

    name: str
    shapes: Sequence[Shape]
    large: bool
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        return sum(torch.Size(s).numel() for s in self.shapes)


WORKLOADS = [
    Workload("1000 x 1024", [(1024,)] * 1000, large=False),
    Workload("100 x 256x256", [(256, 256)] * 100, large=False),
    Workload("ResNet-50", resnet50(), large=True),
    Workload("8 x 2048x2048", [(2048, 2048)] * 8, large=True),
    Workload("GPT-2 small", gpt2(), large=True),
    Workload("100 x 256x256 bf16", [(256, 256)] * 100, large=False, dtype=torch.bfloat16),
    Workload("100 x 256x256 f16", [(256, 256)] * 100, large=False, dtype=torch.float16),
]


@rule(states={"exp_avg": zeros}, defaults=dict(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.01))
def own_rule(
    param: Tensor, grad: Tensor, exp_avg: Tensor, *, lr: Tensor, beta1: Tensor, beta2: Tensor, weight_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Lion, as a user would write it."""
    update = (beta1 * exp_avg + (1 - beta1) * grad).sign() + weight_decay * param
    return param - lr * update, beta2 * exp_avg + (1 - beta2) * grad


class Tail:
    """What often surrounds a step, as one function: clipping by the global norm, and an average of the parameters."""

    def __init__(self, params: Params, opt: torch.optim.Optimizer) -> None:
        self.params: list[Tensor] = [*params]
        self.averages = [p.detach().clone() for p in params]
        self.opt = opt

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.params, 0.01)


_EVEN = 1 / 1.05
AIMS = {  # on 1000 x 1024, on 100 x 256x256, elsewhere; 3 for what has no fused kernel in torch
    "Adam": (5, 1.3, _EVEN),
    "AdamW": (5, 1.3, _EVEN),
    "SGD momentum": (3, 1.3, _EVEN),
    "Adam, stock": (_EVEN, _EVEN, _EVEN),
    "Adagrad, stock": (_EVEN, _EVEN, _EVEN),
    "clip, Adam, average": (_EVEN, _EVEN, _EVEN),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One algorithm: what we compile, and its peers.

    Attributes:
        ours: makes the optimizer whose step is compiled with npu_fused.
        stock: torch.optim's class with the same update and state; its for-loop, foreach and (if there) fused forms are
            the peers. Without one the peer is our own rule, run eagerly for every parameter.
            With --inductor each has one more peer: torch's foreach form, or our rule, through Inductor.
        bytes_per_element: what a step must move at least, in float32.
    """

    name: str
    ours: Callable[[Params], Any]
    stock: Callable[..., Any] | None
    options: dict[str, Any]
    fused: bool
    bytes_per_element: int

    def aim(self, workload: Workload) -> float:
        """How many times as fast as the best peer a step should be."""
        small, medium, elsewhere = AIMS.get(self.name, (3, 3, 3))
        return {"1000 x 1024": small, "100 x 256x256": medium}.get(workload.name, elsewhere)

    @property
    def aim_bandwidth(self) -> float:
        """The share of the in-place bandwidth to reach on large workloads; norms make a step wait."""
        return 0.8 if self.name in ("LAMB", "clip, Adam, average") else 0.85


_ADAM: dict[str, Any] = dict(lr=1e-3)
_SGD: dict[str, Any] = dict(lr=1e-2, momentum=0.9)
_RMS: dict[str, Any] = dict(lr=1e-3, momentum=0.9)

FAMILIES = [
    Family("Adam", lambda p: optimizers.NpuFusedAdam(p, **_ADAM), torch.optim.Adam, _ADAM, True, 28),
    Family("AdamW", lambda p: optimizers.NpuFusedAdamW(p, **_ADAM), torch.optim.AdamW, _ADAM, True, 28),
    Family("SGD momentum", lambda p: optimizers.NpuFusedSGD(p, **_SGD), torch.optim.SGD, _SGD, True, 20),
    Family("Adam, stock", lambda p: torch.optim.Adam(p, **_ADAM), torch.optim.Adam, _ADAM, True, 28),
    Family("Adagrad, stock", lambda p: torch.optim.Adagrad(p, lr=1e-2), torch.optim.Adagrad, dict(lr=1e-2), True, 20),
    Family("RMSprop, stock", lambda p: torch.optim.RMSprop(p, **_RMS), torch.optim.RMSprop, _RMS, False, 28),
    Family("NAdam, stock", lambda p: torch.optim.NAdam(p, **_ADAM), torch.optim.NAdam, _ADAM, False, 28),
    Family("RMSpropTF", lambda p: optimizers.NpuFusedRMSpropTF(p, **_RMS), None, {}, False, 28),
    Family("paddle RMSProp", lambda p: RMSProp(1e-3, momentum=0.9, parameters=p), None, {}, False, 28),
    Family("LAMB", lambda p: optimizers.NpuFusedLamb(p, lr=1e-3), None, {}, False, 40),
    Family(
        "clip, Adam, average",
        lambda p: Tail(p, optimizers.NpuFusedAdam(p, **_ADAM)),
        lambda p, **options: Tail(p, torch.optim.Adam(p, **options)),
        _ADAM,
        True,
        44,
    ),
    Family("own rule", lambda p: own_rule(p, lr=1e-4), None, {}, False, 20),
]


def parameters(workload: Workload) -> Params:
    """Small random parameters."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator).mul_(0.02).to(workload.dtype) for s in workload.shapes]
    return [torch.nn.Parameter(p) for p in made]


def rule_through_inductor(opt: RuleOptimizer) -> Step:
    """The step of an optimizer of ours with Inductor as the compiler of its loop over parameters."""
    run = torch.compile(core_op.run_rules, backend="inductor", fullgraph=True)

    def step() -> None:
        opt._before(None)
        with torch.no_grad():
            run(opt._prelude.batches)
        opt._after()

    return step


def peers(family: Family, workload: Workload, inductor: bool) -> dict[str, tuple[Params, Step]]:
    """Every contestant with parameters of its own: name -> (parameters, step)."""
    found: dict[str, tuple[Params, Step]] = {}
    inductor = inductor and len(workload.shapes) <= INDUCTOR_AT_MOST

    def enter(name: str, make: Callable[[Params], Any], backend: str | None = None) -> None:
        params = parameters(workload)
        step = make(params).step
        found[name] = (params, step if backend is None else torch.compile(step, backend=backend))

    enter("ours", family.ours, "npu_fused")
    stock, options = family.stock, family.options
    if stock is None:
        enter("eager rule", family.ours)
        if inductor:
            params = parameters(workload)
            found["inductor"] = params, rule_through_inductor(family.ours(params))
    else:
        for form in ("for-loop", "foreach", *(["fused"] if family.fused else [])):
            given = {"foreach": False} if form == "for-loop" else {form: True}
            enter(form, lambda p, given=given: stock(p, **options, **given))  # type: ignore[misc]
        if inductor:
            enter("inductor", lambda p: stock(p, **options, foreach=True), "inductor")
    return found
