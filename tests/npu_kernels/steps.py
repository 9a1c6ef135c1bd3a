"""The steps that this lane proves: our optimizers, torch's, and the tests' rules, as captured formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.ir.types import Grouped
from tests.npu_kernels.executed import GraphBackend, captured_rules
from tests.support.cases import CASES
from tests.support.papers import AdaBelief, Adan, Lion, ScheduleFreeAdamW, Signum, Tiger
from tests.support.papers_norms import CautiousAdamW, ClippedSGD, DiffGrad, Lamb, NovoGrad, Yogi

O = torch.optim  # noqa: E741
Params = Sequence[torch.nn.Parameter]

_STOCK: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("SGD", O.SGD, dict(lr=0.05)),
    ("SGD nesterov decay", O.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("SGD dampening", O.SGD, dict(lr=0.05, momentum=0.9, dampening=0.3)),
    ("Adam", O.Adam, dict(lr=0.02)),
    ("Adam amsgrad decay", O.Adam, dict(lr=0.02, amsgrad=True, weight_decay=0.1)),
    ("AdamW", O.AdamW, dict(lr=0.02)),
    ("RMSprop", O.RMSprop, dict(lr=0.02)),
    ("RMSprop centered momentum", O.RMSprop, dict(lr=0.02, centered=True, momentum=0.9)),
    ("Adagrad", O.Adagrad, dict(lr=0.02)),
    ("Adadelta", O.Adadelta, dict(lr=0.5)),
    ("Adamax", O.Adamax, dict(lr=0.02)),
    ("NAdam", O.NAdam, dict(lr=0.02)),
    ("RAdam", O.RAdam, dict(lr=0.02)),
    ("Rprop", O.Rprop, dict(lr=0.02)),
    ("ASGD", O.ASGD, dict(lr=0.02)),
]
RULES = (
    *(Lion, Adan, Tiger, AdaBelief, ScheduleFreeAdamW, Signum),
    *(Lamb, ClippedSGD, NovoGrad, DiffGrad, Yogi, CautiousAdamW),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer with options: `build(params)`; `stock`: one of torch's."""

    name: str
    build: Callable[[Params], Any]
    stock: bool = False

    def __str__(self) -> str:
        return self.name


OURS = [Step(case.name, case.build) for case in CASES]
STOCK = [
    Step(
        f"{name} {'foreach' if foreach else 'loop'}", lambda p, c=cls, o=options, f=foreach: c(p, foreach=f, **o), True
    )
    for name, cls, options in _STOCK
    for foreach in (False, True)
]
RULED = [Step(rule.__name__, lambda p, r=rule: r(p)) for rule in RULES]
ALL = [*OURS, *STOCK, *RULED]


def parameters(sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def set_gradients(params: Params, seed: int, missing: Sequence[int] = ()) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(params[0].dtype if p.dtype != torch.float64 else p.dtype)
        p.grad = None if i in missing else grad.to(p.dtype)


def captured(step: Step, dtype: torch.dtype) -> list[Grouped]:
    """What the second step of two small parameters is: that of most steps."""
    params = parameters((3, 5), dtype)
    opt = step.build(params)
    set_gradients(params, 0)
    if hasattr(opt, "_prelude"):
        return [captured_rules(opt)]
    torch._dynamo.reset()
    opt.step()
    backend = GraphBackend(run=False)
    set_gradients(params, 1)
    torch.compile(opt.step, backend=backend)()
    return backend.captured


def tensors(opt: Any) -> list[Tensor]:
    """Parameters and states, but for step counters, by role."""
    groups = getattr(opt, "param_groups", None)
    params = [p for g in groups for p in g["params"]] if groups else [*opt._parameter_list]
    roles: dict[str, list[Tensor]] = {}
    for p in params if groups else ():
        for key, t in opt.state[p].items():
            if isinstance(t, Tensor) and (t.shape == p.shape or (not t.shape and key != "step")):
                roles.setdefault(key, []).append(t)
    return joined(params, *roles.values())


SMALL = 100
"""Elements below which a tensor's distance from float64 is a matter of luck, eager's, too."""


def joined(*roles: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of each role; small ones as one tensor.

    Alone, a few elements say little of a kernel: where terms cancel, a last bit of them is many of the sum.
    """
    found = []
    for role in roles:
        small = [t.detach().flatten() for t in role if t.numel() < SMALL]
        found += [t for t in role if t.numel() >= SMALL] + ([torch.cat(small)] if small else [])
    return found
