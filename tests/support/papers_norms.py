"""More optimizers from their papers (see papers.py): norms of a tensor, masks, and states created in the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.papers import AdaBelief, Adan, Lion, Paper, ScheduleFreeAdamW, Signum, Tiger


class Lamb(Paper):
    """You et al. 2019, Large batch optimization (arXiv 1904.00962), algorithm 2, with bias correction."""

    states, numbers = ("m", "v"), dict(b1=0.9, b2=0.999, eps=1e-6, wd=0.01)

    def loop(self, k: Any, p: Any, g: Any, m: Any, v: Any, t: Any) -> None:
        m.mul_(k["b1"]).add_(g, alpha=1 - k["b1"])
        v.mul_(k["b2"]).addcmul_(g, g, value=1 - k["b2"])
        root = (v / (1 - k["b2"] ** t)).sqrt_().add_(k["eps"])
        move = (m / (1 - k["b1"] ** t)).div_(root).add_(p, alpha=k["wd"])
        weight, length = p.norm(), move.norm()
        trust = torch.where((weight > 0) & (length > 0), weight / length, 1.0)
        p.sub_(k["lr"] * trust * move)

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, vs: Any, ts: Any) -> None:
        torch._foreach_mul_(ms, k["b1"])
        torch._foreach_add_(ms, gs, alpha=1 - k["b1"])
        torch._foreach_mul_(vs, k["b2"])
        torch._foreach_addcmul_(vs, gs, gs, value=1 - k["b2"])
        roots = torch._foreach_div(vs, [1 - k["b2"] ** t for t in ts])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, k["eps"])
        moves = torch._foreach_div(ms, [1 - k["b1"] ** t for t in ts])
        torch._foreach_div_(moves, roots)
        torch._foreach_add_(moves, ps, alpha=k["wd"])
        norms = zip(torch._foreach_norm(ps), torch._foreach_norm(moves), strict=True)
        trusts = [torch.where((w > 0) & (n > 0), w / n, 1.0) for w, n in norms]
        torch._foreach_mul_(moves, [k["lr"] * trust for trust in trusts])
        torch._foreach_sub_(ps, moves)


class ClippedSGD(Paper):
    """Pascanu et al. 2013, On the difficulty of training RNNs (arXiv 1211.5063), every tensor clipped by itself."""

    states, numbers = ("m",), dict(b=0.9, limit=0.5)
    counts = False

    def loop(self, k: Any, p: Any, g: Any, m: Any) -> None:
        scale = (k["limit"] / (torch.linalg.vector_norm(g) + 1e-6)).clamp(max=1.0)
        m.mul_(k["b"]).add_(g * scale)
        p.add_(m, alpha=-k["lr"])

    def many(self, k: Any, ps: Any, gs: Any, ms: Any) -> None:
        scales = torch._foreach_norm(gs)
        torch._foreach_add_(scales, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, k["limit"])
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(ms, k["b"])
        torch._foreach_add_(ms, torch._foreach_mul(gs, scales))
        torch._foreach_add_(ps, ms, alpha=-k["lr"])


class NovoGrad(Paper):
    """Ginsburg et al. 2019, Layer-wise adaptive moments (arXiv 1905.11286): the second moment is one number."""

    states, numbers = ("m", "v"), dict(b1=0.95, b2=0.98, eps=1e-8, wd=0.01)

    def start(self, name: str, p: Tensor) -> Tensor:
        return torch.zeros((), dtype=p.dtype) if name == "v" else torch.zeros_like(p)

    def loop(self, k: Any, p: Any, g: Any, m: Any, v: Any, t: Any) -> None:
        square = (g * g).sum()
        v.copy_(torch.where(t == 1, square, k["b2"] * v + (1 - k["b2"]) * square))
        m.mul_(k["b1"]).add_(g / (v.sqrt() + k["eps"])).add_(p, alpha=k["wd"])
        p.add_(m, alpha=-k["lr"])

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, vs: Any, ts: Any) -> None:
        squares = torch._foreach_pow(torch._foreach_norm(gs), 2)
        means = torch._foreach_add(torch._foreach_mul(vs, k["b2"]), squares, alpha=1 - k["b2"])
        torch._foreach_copy_(vs, [torch.where(t == 1, s, x) for t, s, x in zip(ts, squares, means, strict=True)])
        roots = torch._foreach_sqrt(vs)
        torch._foreach_add_(roots, k["eps"])
        torch._foreach_mul_(ms, k["b1"])
        torch._foreach_add_(ms, torch._foreach_div(gs, roots))
        torch._foreach_add_(ms, ps, alpha=k["wd"])
        torch._foreach_add_(ps, ms, alpha=-k["lr"])


class DiffGrad(Paper):
    """Dubey et al. 2019 (arXiv 1909.11015): Adam's step times the sigmoid of how much the gradient changed."""

    states, numbers = ("m", "v", "previous"), dict(b1=0.9, b2=0.999, eps=1e-8)

    def loop(self, k: Any, p: Any, g: Any, m: Any, v: Any, previous: Any, t: Any) -> None:
        m.lerp_(g, 1 - k["b1"])
        v.lerp_(g * g, 1 - k["b2"])
        friction = torch.sigmoid((previous - g).abs())
        previous.copy_(g)
        size = k["lr"] * torch.sqrt(1 - k["b2"] ** t) / (1 - k["b1"] ** t)
        p.sub_(size * m * friction / (v.sqrt() + k["eps"]))

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, vs: Any, previous: Any, ts: Any) -> None:
        torch._foreach_lerp_(ms, gs, 1 - k["b1"])
        torch._foreach_lerp_(vs, torch._foreach_mul(gs, gs), 1 - k["b2"])
        frictions = torch._foreach_sigmoid(torch._foreach_abs(torch._foreach_sub(previous, gs)))
        torch._foreach_copy_(previous, gs)
        sizes = [k["lr"] * torch.sqrt(1 - k["b2"] ** t) / (1 - k["b1"] ** t) for t in ts]
        torch._foreach_mul_(frictions, ms)
        torch._foreach_mul_(frictions, sizes)
        roots = torch._foreach_sqrt(vs)
        torch._foreach_add_(roots, k["eps"])
        torch._foreach_addcdiv_(ps, frictions, roots, -1.0)


class Yogi(Paper):
    """Zaheer et al. 2018, Adaptive methods for nonconvex optimization: the second moment moves by the sign."""

    states, numbers = ("m", "v"), dict(b1=0.9, b2=0.999, eps=1e-3)

    def loop(self, k: Any, p: Any, g: Any, m: Any, v: Any, t: Any) -> None:
        square = g.square()
        m.mul_(k["b1"]).add_(g, alpha=1 - k["b1"])
        v.addcmul_(torch.sign(v - square), square, value=k["b2"] - 1)
        p.addcdiv_(m, v.sqrt().add_(k["eps"]), value=-k["lr"])

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, vs: Any, ts: Any) -> None:
        squares = torch._foreach_pow(gs, 2)
        torch._foreach_mul_(ms, k["b1"])
        torch._foreach_add_(ms, gs, alpha=1 - k["b1"])
        torch._foreach_addcmul_(vs, torch._foreach_sign(torch._foreach_sub(vs, squares)), squares, value=k["b2"] - 1)
        roots = torch._foreach_sqrt(vs)
        torch._foreach_add_(roots, k["eps"])
        torch._foreach_addcdiv_(ps, ms, roots, value=-k["lr"])


class CautiousAdamW(Paper):
    """Liang et al. 2024, Cautious optimizers (arXiv 2411.16085): moves against the gradient are masked out."""

    states, numbers = ("m", "v"), dict(b1=0.9, b2=0.99, eps=1e-8, wd=0.1)

    def loop(self, k: Any, p: Any, g: Any, m: Any, v: Any, t: Any) -> None:
        p.mul_(1 - k["lr"] * k["wd"])
        m.mul_(k["b1"]).add_(g, alpha=1 - k["b1"])
        v.mul_(k["b2"]).addcmul_(g, g, value=1 - k["b2"])
        mask = (m * g > 0).to(g.dtype)
        mask.div_(mask.mean().clamp_(min=1e-3))
        root = (v.sqrt() / torch.sqrt(1 - k["b2"] ** t)).add_(k["eps"])
        p.sub_(m * mask / root * (k["lr"] / (1 - k["b1"] ** t)))

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, vs: Any, ts: Any) -> None:
        torch._foreach_mul_(ps, 1 - k["lr"] * k["wd"])
        torch._foreach_mul_(ms, k["b1"])
        torch._foreach_add_(ms, gs, alpha=1 - k["b1"])
        torch._foreach_mul_(vs, k["b2"])
        torch._foreach_addcmul_(vs, gs, gs, value=1 - k["b2"])
        masks = [(x > 0).to(x.dtype) for x in torch._foreach_mul(ms, gs)]
        torch._foreach_div_(masks, [mask.mean().clamp(min=1e-3) for mask in masks])
        roots = torch._foreach_div(torch._foreach_sqrt(vs), [torch.sqrt(1 - k["b2"] ** t) for t in ts])
        torch._foreach_add_(roots, k["eps"])
        torch._foreach_mul_(masks, ms)
        torch._foreach_mul_(masks, [k["lr"] / (1 - k["b1"] ** t) for t in ts])
        torch._foreach_sub_(ps, torch._foreach_div(masks, roots))


class InlineSignum(Optimizer):
    """Signum without `_init_group`: the state is created where it is first needed."""

    def __init__(self, params: Any, foreach: bool = False) -> None:
        super().__init__(params, dict(lr=0.01, b=0.9, wd=0.01))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "m" not in state:
                    state["m"] = torch.zeros_like(p)
                state["m"].mul_(group["b"]).add_(p.grad.add(p, alpha=group["wd"]), alpha=1 - group["b"])
                p.add_(torch.sign(state["m"]), alpha=-group["lr"])


class InlineAdaBelief(Optimizer):
    """AdaBelief without `_init_group`, its counter a Python number."""

    def __init__(self, params: Any, foreach: bool = False) -> None:
        super().__init__(params, dict(lr=0.01, b1=0.9, b2=0.999, eps=1e-8))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            b1, b2 = group["b1"], group["b2"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["m"], state["s"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - b1)
                surprise = p.grad - state["m"]
                state["s"].mul_(b2).addcmul_(surprise, surprise, value=1 - b2).add_(group["eps"])
                root = (state["s"] / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(state["m"], root, value=-group["lr"] / (1 - b1 ** state["step"]))


class CountingScheduleFree(Optimizer):
    """Schedule-free SGD as its authors' package writes it: the counter and the sum of weights are in the group."""

    def __init__(self, params: Any, foreach: bool = False) -> None:
        super().__init__(params, dict(lr=0.01, b1=0.9, k=0, weight_sum=0.0))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            weight = group["lr"] ** 2
            group["weight_sum"] += weight
            c = weight / group["weight_sum"]
            for p in group["params"]:
                state = self.state[p]
                if "z" not in state:
                    state["z"] = torch.clone(p)
                p.lerp_(state["z"], c).add_(p.grad, alpha=group["lr"] * (group["b1"] * (1 - c) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


WITH_LISTS = (
    Lion, Adan, Tiger, AdaBelief, ScheduleFreeAdamW, Signum, Lamb, ClippedSGD, NovoGrad, DiffGrad, Yogi, CautiousAdamW
)  # fmt: skip
INLINE = (InlineSignum, InlineAdaBelief, CountingScheduleFree)
