"""One update in many spellings, and updates that differ from it in one place.

A spelling is a step on `p, g, m, v, t, h`: parameter, gradient, the two moments, the number of steps done (0-dim), and
hyperparameters, either Python numbers (constants of the graph) or 0-dim tensors (inputs).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.inductor_prims  # defines torch.ops.prims.fma
from torch import fx

from npu_fuse_pass.ir.types import Captured, Group
from npu_fuse_pass.match.find import match_group
from tests.support.graphs import fused

VALUES = dict(lr=0.02, b1=0.9, b2=0.99, eps=1e-3, wd=0.1)
STEPS = 6.0
MODES = ("constants", "inputs")
TENSORS = ("p", "g", "m", "v", "w")  # w: the largest second moment, of amsgrad; a second state elsewhere

Step = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """`decay`: "" for none, "l2" in the gradient, "decoupled". `modes`: how hyperparameters may be given."""

    name: str
    step: Step
    kernel: str
    decay: str = ""
    modes: tuple[str, ...] = MODES
    extra: bool = False

    def arguments(self, mode: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        made = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in TENSORS]
        made = [x if name in "pgm" else x.abs() + 0.5 for name, x in zip(TENSORS, made, strict=True)]
        made[-1] += made[2].square()  # a second moment is at least the square of the first
        tensors = [x.to(dtype) for x in (made if self.extra else made[:-1])]
        hyper = [torch.tensor(x, dtype=torch.float64) for x in VALUES.values()] if mode == "inputs" else []
        return [*tensors, torch.tensor(STEPS, dtype=torch.float64), *hyper]

    def function(self, mode: str) -> Callable[..., None]:
        """The step as a function of the arguments."""
        count = len(TENSORS) + self.extra

        def run(*args: Any) -> None:
            h = SimpleNamespace(**(VALUES if mode == "constants" else dict(zip(VALUES, args[count:], strict=True))))
            self.step(*args[:count], h)

        return run

    def group(self, mode: str, dtype: torch.dtype = torch.float64) -> tuple[Captured, Group]:
        captured, (group,) = fused(self.function(mode), *self.arguments(mode, dtype))
        return captured, group

    def found(self, mode: str, dtype: torch.dtype = torch.float64) -> Any:
        captured, group = self.group(mode, dtype)
        return match_group(group, captured.leaves)


SPELLINGS: list[Spelling] = []


def spelling(name: str, **options: Any) -> Callable[[Step], Step]:
    def add(step: Step) -> Step:
        SPELLINGS.append(Spelling(name, step, **{"kernel": "adamw", **options}))
        return step

    return add


# Adam and AdamW -------------------------------------------------------------------------------------------------------


def in_place(operation: Callable[..., Any], x: Any, y: Any) -> Any:
    """`x += y` and the like; in a traced step as the node that Dynamo makes of it."""
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", operation, (x, y), {})
    return operation(x, y)


@spelling("operators")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    in_place(operator.iadd, t, 1)
    in_place(operator.imul, m, h.b1)
    in_place(operator.iadd, m, (1 - h.b1) * g)
    in_place(operator.imul, v, h.b2)
    in_place(operator.isub, v, (h.b2 - 1) * g * g)
    denominator = (v / (1 - h.b2**t)) ** 0.5
    in_place(operator.iadd, denominator, h.eps)
    in_place(operator.imul, denominator, 1 - h.b1**t)
    in_place(operator.isub, p, h.lr * m / denominator)


@spelling("lerp")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g.square(), 1 - h.b2)
    p.sub_(h.lr / (1 - h.b1**t) * m / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("lerp the other way")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.copy_(torch.lerp(g, m, h.b1))
    v.copy_(torch.lerp(g * g, v, h.b2))
    p.copy_(p - h.lr * m / (1 - h.b1**t) / (v.sqrt() / (1 - h.b2**t).sqrt() + h.eps))


@spelling("addcmul, addcdiv")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.mul_(h.b1).add_(g, alpha=1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    denominator = (v.sqrt() / (1 - h.b2**t).sqrt()).add_(h.eps)
    p.copy_(torch.addcdiv(p, m * (h.lr / (1 - h.b1**t)), denominator, value=-1))


@spelling("prims.fma", modes=("constants",))
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.copy_(torch.ops.prims.fma(g, torch.full_like(g, 1 - h.b1), m * h.b1))
    v.copy_(torch.ops.prims.fma(g * (1 - h.b2), g, v * h.b2))
    denominator = (v / (1 - h.b2**t)).sqrt() + h.eps
    p.copy_(torch.ops.prims.fma(-m / denominator, torch.ones_like(p) * (h.lr / (1 - h.b1**t)), p))


@spelling("sub with alpha")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.sub_(m - g, alpha=1 - h.b1)
    v.sub_(v - g**2, alpha=1 - h.b2)
    update = m / (1 - h.b1**t) / (torch.sqrt(v / (1 - h.b2**t)) + h.eps)
    p.sub_(update, alpha=h.lr)


@spelling("root split, step size folded")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    """As in the paper's remark on efficiency: epsilon is scaled, too."""
    t.add_(1)
    m.mul_(h.b1).add_((1 - h.b1) * g)
    v.mul_(h.b2).add_((1 - h.b2) * g.pow(2))
    root = (1 - h.b2**t).sqrt()
    step_size = h.lr * root / (1 - h.b1**t)
    p.sub_(step_size * m / (v.sqrt() + h.eps * root))


@spelling("epsilon over the step size")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    """As torch's for-loop form with capturable."""
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    negative = (h.lr / (1 - h.b1**t)).neg()
    p.addcdiv_(m, (v.sqrt() / ((1 - h.b2**t).sqrt() * negative)).add_(h.eps / negative))


@spelling("reciprocals")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.copy_(m + (1 - h.b1) * (g - m))
    v.copy_(v + (1 - h.b2) * (g * g - v))
    p.add_(m * (-h.lr * (1 - h.b1**t).reciprocal()) * ((v * (1 - h.b2**t).reciprocal()).sqrt() + h.eps).reciprocal())


@spelling("rsqrt")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    p.sub_(h.lr * m / (1 - h.b1**t) / (v.rsqrt() ** -1 * torch.rsqrt(1 - h.b2**t) + h.eps))


@spelling("the corrections as in torch.optim, capturable")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    first, second = h.b1**t, h.b2**t
    first.sub_(1).div_(h.lr).reciprocal_()
    second.sub_(1).neg_().sqrt_()
    p.add_(m / (v.sqrt() / second + h.eps) * first)


@spelling("steps counted before", decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    first, second = 1 - torch.pow(h.b1, t + 1), 1 - torch.pow(h.b2, 1 + t)
    p.mul_(1 - h.lr * h.wd).sub_(h.lr * m / first / ((v / second).sqrt() + h.eps))
    t.add_(1)


@spelling("the new moments written out again", decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    first, second = h.b1 * m + (1 - h.b1) * g, g * g * (1 - h.b2) + v * h.b2
    p.copy_(p - h.lr * h.wd * p - h.lr * first / (1 - h.b1**t) / ((second / (1 - h.b2**t)).sqrt() + h.eps))
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)


@spelling("multiplied out", decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    first, root = 1 - h.b1**t, (1 - h.b2**t).sqrt()
    below = first * (v.sqrt() + root * h.eps)
    p.copy_((p * (1 - h.lr * h.wd) * below - h.lr * root * m) / below)


@spelling("decay by mul", decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    p.mul_(1 - h.lr * h.wd)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    p.sub_(h.lr * (m / (1 - h.b1**t)) / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("decay with alpha", decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    p.add_(p, alpha=-h.lr * h.wd)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    p.sub_(h.lr * (m / (1 - h.b1**t)) / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("decay inside the update", decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    p.sub_(h.lr * (m / (1 - h.b1**t) / ((v / (1 - h.b2**t)).sqrt() + h.eps) + h.wd * p))


@spelling("decay where there is any", decay="decoupled", modes=("inputs",))
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    p.copy_(torch.where(h.wd != 0, p - h.lr * h.wd * p, p))
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    p.sub_(h.lr * (m / (1 - h.b1**t)) / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("penalty", decay="l2")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    g = g.add(p, alpha=h.wd)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    p.sub_(h.lr * (m / (1 - h.b1**t)) / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("penalty where there is any", decay="l2", modes=("inputs",))
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    g = torch.where(h.wd == 0, g, g + h.wd * p)
    m.mul_(h.b1).add_((1 - h.b1) * g)
    v.mul_(h.b2).add_((1 - h.b2) * g * g)
    p.sub_(h.lr * (m / (1 - h.b1**t)) / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("penalty spread over the moments", decay="l2", modes=("inputs",))
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    """(g + wd p) and its square are never computed as such."""
    t.add_(1)
    m.copy_(h.b1 * m + (1 - h.b1) * g + (1 - h.b1) * h.wd * p)
    v.copy_(h.b2 * v + (1 - h.b2) * (g * g + 2 * h.wd * (g * p) + h.wd * h.wd * (p * p)))
    p.sub_(h.lr * (m / (1 - h.b1**t)) / ((v / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("foreach", decay="decoupled", modes=("constants",))
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    torch._foreach_add_([t], 1)
    torch._foreach_mul_([p], 1 - h.lr * h.wd)
    torch._foreach_lerp_([m], [g], 1 - h.b1)
    torch._foreach_mul_([v], h.b2)
    torch._foreach_addcmul_([v], torch._foreach_mul([g], 1 - h.b2), [g])
    roots = torch._foreach_sqrt([v])
    torch._foreach_div_(roots, [(1 - h.b2**t).sqrt()])
    torch._foreach_add_(roots, h.eps)
    torch._foreach_div_(roots, [-h.lr / (1 - h.b1**t)])
    torch._foreach_addcdiv_([p], [m], roots)
