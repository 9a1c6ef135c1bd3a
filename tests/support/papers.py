"""Optimizers that torch does not have, as somebody would write them from their papers: a loop and a foreach form each.

States are created in `_init_group`, as torch's own classes do it. Counters are float64, so that the bias corrections
of an eager step are as exact as those of a fused one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Lists = list[list[Tensor]]


class Paper(Optimizer):
    """What they share. `loop` and `many` get the group and lists: params, grads, states, counters if any."""

    states: tuple[str, ...] = ()
    numbers: ClassVar[dict[str, float]] = {}
    counts = True  # has a counter of steps

    def __init__(self, params: Any, foreach: bool = False, **numbers: float) -> None:
        super().__init__(params, {"lr": 0.01, **self.numbers, **numbers, "foreach": foreach})

    def start(self, name: str, p: Tensor) -> Tensor:
        return torch.zeros_like(p)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                if self.counts:
                    state["step"] = torch.zeros((), dtype=torch.float64)
                for name in self.states:
                    state[name] = self.start(name, p)
            names = [*self.states, *(["step"] if self.counts else [])]
            for to, what in zip(lists, (p, p.grad, *(state[n] for n in names)), strict=True):
                to.append(what)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lists: Lists = [[] for _ in range(2 + len(self.states) + self.counts)]
            self._init_group(group, *lists)
            if not lists[0]:
                continue
            if group["foreach"]:
                if self.counts:
                    torch._foreach_add_(lists[-1], 1)
                self.many(group, *lists)
            else:
                for each in zip(*lists, strict=True):
                    if self.counts:
                        each[-1].add_(1)
                    self.loop(group, *each)

    def loop(self, k: dict[str, Any], *each: Tensor) -> None:
        raise NotImplementedError

    def many(self, k: dict[str, Any], *lists: list[Tensor]) -> None:
        raise NotImplementedError


class Lion(Paper):
    """Chen et al. 2023, Symbolic discovery of optimization algorithms (arXiv 2302.06675), algorithm 2."""

    states, numbers = ("m",), dict(b1=0.9, b2=0.99, wd=0.1)
    counts = False

    def loop(self, k: Any, p: Any, g: Any, m: Any) -> None:
        update = m.mul(k["b1"]).add_(g, alpha=1 - k["b1"]).sign_()
        p.mul_(1 - k["lr"] * k["wd"]).add_(update, alpha=-k["lr"])
        m.lerp_(g, 1 - k["b2"])

    def many(self, k: Any, ps: Any, gs: Any, ms: Any) -> None:
        updates = torch._foreach_mul(ms, k["b1"])
        torch._foreach_add_(updates, gs, alpha=1 - k["b1"])
        torch._foreach_sign_(updates)
        torch._foreach_mul_(ps, 1 - k["lr"] * k["wd"])
        torch._foreach_add_(ps, updates, alpha=-k["lr"])
        torch._foreach_lerp_(ms, gs, 1 - k["b2"])


class Adan(Paper):
    """Xie et al. 2022, Adaptive Nesterov momentum (arXiv 2208.06677), algorithm 1 with decoupled decay."""

    states, numbers = ("m", "v", "n", "previous"), dict(b1=0.02, b2=0.08, b3=0.01, eps=1e-8, wd=0.02)
    counts = False

    def start(self, name: str, p: Tensor) -> Tensor:
        return p.grad.clone() if name == "previous" and p.grad is not None else torch.zeros_like(p)

    def loop(self, k: Any, p: Any, g: Any, m: Any, v: Any, n: Any, previous: Any) -> None:
        change = g - previous
        m.mul_(1 - k["b1"]).add_(g, alpha=k["b1"])
        v.mul_(1 - k["b2"]).add_(change, alpha=k["b2"])
        ahead = g + (1 - k["b2"]) * change
        n.mul_(1 - k["b3"]).addcmul_(ahead, ahead, value=k["b3"])
        p.sub_(k["lr"] * (m + (1 - k["b2"]) * v) / (n.sqrt() + k["eps"])).div_(1 + k["lr"] * k["wd"])
        previous.copy_(g)

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, vs: Any, ns: Any, previous: Any) -> None:
        changes = torch._foreach_sub(gs, previous)
        torch._foreach_mul_(ms, 1 - k["b1"])
        torch._foreach_add_(ms, gs, alpha=k["b1"])
        torch._foreach_mul_(vs, 1 - k["b2"])
        torch._foreach_add_(vs, changes, alpha=k["b2"])
        ahead = torch._foreach_add(gs, changes, alpha=1 - k["b2"])
        torch._foreach_mul_(ns, 1 - k["b3"])
        torch._foreach_addcmul_(ns, ahead, ahead, value=k["b3"])
        roots = torch._foreach_sqrt(ns)
        torch._foreach_add_(roots, k["eps"])
        moves = torch._foreach_add(ms, vs, alpha=1 - k["b2"])
        torch._foreach_addcdiv_(ps, moves, roots, value=-k["lr"])
        torch._foreach_div_(ps, 1 + k["lr"] * k["wd"])
        torch._foreach_copy_(previous, gs)


class Tiger(Paper):
    """Su 2023, Tiger, a tight-fisted optimizer (github.com/bojone/tiger): sign of momentum, scaled by RMS(param)."""

    states, numbers = ("m",), dict(b=0.965, wd=0.01)
    counts = False

    def loop(self, k: Any, p: Any, g: Any, m: Any) -> None:
        m.mul_(k["b"]).add_(g, alpha=1 - k["b"])
        scale = p.square().mean().sqrt().clamp(min=1e-3) * k["lr"]
        p.sub_((torch.sign(m) + k["wd"] * p) * scale)

    def many(self, k: Any, ps: Any, gs: Any, ms: Any) -> None:
        torch._foreach_mul_(ms, k["b"])
        torch._foreach_add_(ms, gs, alpha=1 - k["b"])
        scales = [p.square().mean().sqrt().clamp(min=1e-3) * k["lr"] for p in ps]
        moves = torch._foreach_sign(ms)
        torch._foreach_add_(moves, ps, alpha=k["wd"])
        torch._foreach_mul_(moves, scales)
        torch._foreach_sub_(ps, moves)


class AdaBelief(Paper):
    """Zhuang et al. 2020, Adapting stepsizes by the belief in observed gradients (arXiv 2010.07468), algorithm 2."""

    states, numbers = ("m", "s"), dict(b1=0.9, b2=0.999, eps=1e-8)

    def loop(self, k: Any, p: Any, g: Any, m: Any, s: Any, t: Any) -> None:
        m.lerp_(g, 1 - k["b1"])
        surprise = g - m
        s.mul_(k["b2"]).addcmul_(surprise, surprise, value=1 - k["b2"]).add_(k["eps"])
        root = (s / (1 - k["b2"] ** t)).sqrt_().add_(k["eps"])
        p.sub_(m / root * (k["lr"] / (1 - k["b1"] ** t)))

    def many(self, k: Any, ps: Any, gs: Any, ms: Any, ss: Any, ts: Any) -> None:
        torch._foreach_lerp_(ms, gs, 1 - k["b1"])
        surprises = torch._foreach_sub(gs, ms)
        torch._foreach_mul_(ss, k["b2"])
        torch._foreach_addcmul_(ss, surprises, surprises, value=1 - k["b2"])
        torch._foreach_add_(ss, k["eps"])
        roots = torch._foreach_div(ss, [1 - k["b2"] ** t for t in ts])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, k["eps"])
        moves = torch._foreach_div(ms, roots)
        torch._foreach_mul_(moves, [k["lr"] / (1 - k["b1"] ** t) for t in ts])
        torch._foreach_sub_(ps, moves)


class ScheduleFreeAdamW(Paper):
    """Defazio et al. 2024, The road less scheduled (arXiv 2405.15682): the parameter holds y, the state z; c = 1/t."""

    states, numbers = ("z", "v"), dict(b1=0.9, b2=0.999, eps=1e-8, wd=0.05)

    def start(self, name: str, p: Tensor) -> Tensor:
        return p.detach().clone() if name == "z" else torch.zeros_like(p)

    def loop(self, k: Any, y: Any, g: Any, z: Any, v: Any, t: Any) -> None:
        v.mul_(k["b2"]).addcmul_(g, g, value=1 - k["b2"])
        move = g / (v / (1 - k["b2"] ** t)).sqrt_().add_(k["eps"]) + k["wd"] * y
        c = 1 / t
        y.lerp_(z, c)
        y.sub_(k["lr"] * (1 - k["b1"] * (1 - c)) * move)
        z.sub_(k["lr"] * move)

    def many(self, k: Any, ys: Any, gs: Any, zs: Any, vs: Any, ts: Any) -> None:
        torch._foreach_mul_(vs, k["b2"])
        torch._foreach_addcmul_(vs, gs, gs, 1 - k["b2"])
        roots = torch._foreach_div(vs, [1 - k["b2"] ** t for t in ts])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, k["eps"])
        moves = torch._foreach_div(gs, roots)
        torch._foreach_add_(moves, ys, alpha=k["wd"])
        cs = [1 / t for t in ts]
        for y, z, c in zip(ys, zs, cs, strict=True):
            y.lerp_(z, c)
        torch._foreach_sub_(ys, torch._foreach_mul(moves, [k["lr"] * (1 - k["b1"] * (1 - c)) for c in cs]))
        torch._foreach_sub_(zs, moves, alpha=k["lr"])


class Signum(Paper):
    """Bernstein et al. 2018, signSGD (arXiv 1802.04434), algorithm 2, with coupled decay."""

    states, numbers = ("m",), dict(b=0.9, wd=0.01)
    counts = False

    def loop(self, k: Any, p: Any, g: Any, m: Any) -> None:
        m.mul_(k["b"]).add_(g.add(p, alpha=k["wd"]), alpha=1 - k["b"])
        p.add_(torch.sign(m), alpha=-k["lr"])

    def many(self, k: Any, ps: Any, gs: Any, ms: Any) -> None:
        gs = torch._foreach_add(gs, ps, alpha=k["wd"])
        torch._foreach_mul_(ms, k["b"])
        torch._foreach_add_(ms, gs, alpha=1 - k["b"])
        torch._foreach_add_(ps, torch._foreach_sign(ms), alpha=-k["lr"])
