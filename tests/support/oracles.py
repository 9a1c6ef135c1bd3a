"""The formulas of the originals written again by hand, in float64, one parameter at a time: the oracles.

Nothing here uses the code under test. A formula gets the parameter, its gradient, its state (a dict that it
fills), the number of the update from 1, and the options; it returns the new parameter. One that takes
`global_norm` gets the norm of all gradients. `Case.formula` finds it by the name of the rule.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., Tensor]


def sgd(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    momentum, dampening, wd = o.get("momentum", 0.0), o.get("dampening", 0.0), o.get("weight_decay", 0.0)
    if wd:
        g = g + wd * p
    if momentum:
        old = s.get("momentum_buffer")
        b = s["momentum_buffer"] = g if t == 1 else momentum * old + (1 - dampening) * g
        g = g + momentum * b if o.get("nesterov") else b
    return p - o["lr"] * g


def _adam(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, o: dict[str, Any]) -> Tensor:
    (beta1, beta2), lr, eps = o.get("betas", (0.9, 0.999)), o.get("lr", 1e-3), o.get("eps", 1e-8)
    m = s["exp_avg"] = beta1 * s.get("exp_avg", torch.zeros_like(p)) + (1 - beta1) * g
    v = s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", torch.zeros_like(p)) + (1 - beta2) * g**2
    if o.get("amsgrad"):
        v = s["max_exp_avg_sq"] = torch.maximum(s.get("max_exp_avg_sq", torch.zeros_like(p)), v)
    return p - lr / (1 - beta1**t) * m / (v.sqrt() / math.sqrt(1 - beta2**t) + eps)


def adam(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    wd = o.get("weight_decay", 0.0)
    return _adam(p, g + wd * p if wd else g, s, t, o)


def adamw(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    return _adam(p * (1 - o.get("lr", 1e-3) * o.get("weight_decay", 1e-2)), g, s, t, o)


def lamb(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, *, global_norm: float, **o: Any) -> Tensor:
    (beta1, beta2), lr, eps = o.get("betas", (0.9, 0.999)), o.get("lr", 1e-3), o.get("eps", 1e-6)
    wd = o.get("weight_decay", 0.0)
    if o.get("use_global_grad_norm") and not global_norm <= 1:  # a NaN reaches every parameter
        g = g / global_norm
    m = s["exp_avg"] = beta1 * s.get("exp_avg", torch.zeros_like(p)) + (1 - beta1) * g
    v = s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", torch.zeros_like(p)) + (1 - beta2) * g**2
    u = m / (v.sqrt() + eps)
    if wd:
        u = u + wd * p
    p_norm, u_norm = min(math.sqrt(float((p * p).sum())), 10.0), math.sqrt(float((u * u).sum()))
    ratio = 1.0 if o.get("adam") or p_norm == 0 or u_norm == 0 else p_norm / u_norm
    return p - lr * ratio * u


def rmsprop_tf(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    lr, alpha, eps = o.get("lr", 1e-2), o.get("alpha", 0.9), o.get("eps", 1e-10)
    wd, momentum = o.get("weight_decay", 0.0), o.get("momentum", 0.0)
    if wd and o.get("decoupled_decay"):
        p = p - wd * p
    elif wd:
        g = g + wd * p
    sq = s.get("square_avg", torch.ones_like(p))
    sq = s["square_avg"] = sq + (1 - alpha) * (g**2 - sq)
    if o.get("centered"):
        ga = s.get("grad_avg", torch.zeros_like(p))
        ga = s["grad_avg"] = ga + (1 - alpha) * (g - ga)
        sq = sq - ga**2
    avg = (sq + eps).sqrt()
    if momentum <= 0:
        return p - lr * g / avg
    b = momentum * s.get("momentum_buffer", torch.zeros_like(p))
    if o.get("lr_in_momentum", True):
        s["momentum_buffer"] = b = b + lr * g / avg
        return p - b
    s["momentum_buffer"] = b = b + g / avg
    return p - lr * b


def paddle_rmsprop(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    rho, eps, momentum = (float32(o.get(k, d)) for k, d in (("rho", 0.95), ("epsilon", 1e-6), ("momentum", 0.0)))
    g = g + o.get("weight_decay", 0.0) * p
    ms = s["square_avg"] = rho * s.get("square_avg", torch.zeros_like(p)) + (1 - rho) * g**2
    d = ms + eps
    if o.get("centered"):
        mg = s["grad_avg"] = rho * s.get("grad_avg", torch.zeros_like(p)) + (1 - rho) * g
        d = ms - mg**2 + eps
    mom = momentum * s.get("momentum_buffer", torch.zeros_like(p)) + o["learning_rate"] * g / d.sqrt()
    s["momentum_buffer"] = mom
    return p - mom


def lion(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    beta1, beta2, lr, wd = (o.get("beta1", 0.9), o.get("beta2", 0.99), o.get("lr", 1e-4), o.get("weight_decay", 0.0))
    m = s.get("exp_avg", torch.zeros_like(p))
    s["exp_avg"] = beta2 * m + (1 - beta2) * g
    return p - lr * (torch.sign(beta1 * m + (1 - beta1) * g) + wd * p)


def float32(value: float) -> float:
    """Paddle's kernels hold these options in float32."""
    return float(torch.tensor(value, dtype=torch.float32))


class Oracle:
    """An optimizer made of a formula; it rounds parameters to their dtype after each step."""

    def __init__(self, formula: Formula, params: Sequence[Tensor], options: dict[str, Any]) -> None:
        self.formula, self.dtypes = formula, [p.dtype for p in params]
        self.values = [p.detach().double().clone() for p in params]
        self.options = [dict(options) for _ in params]
        self.states: list[dict[str, Tensor]] = [{} for _ in params]
        self.counts = [0 for _ in params]

    def add(self, params: Sequence[Tensor], options: dict[str, Any]) -> None:
        """More parameters."""
        other = Oracle(self.formula, params, options)
        for name in ("dtypes", "values", "options", "states", "counts"):
            getattr(self, name).extend(getattr(other, name))

    def set(self, **options: Any) -> None:
        """Change options of all parameters."""
        for mine in self.options:
            mine.update(options)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One update; None skips a parameter."""
        squares = [float(g.double().square().sum()) for g in grads if g is not None]
        wants_norm = "global_norm" in inspect.signature(self.formula).parameters
        extra = {"global_norm": math.sqrt(sum(squares))} if wants_norm else {}
        for i, grad in enumerate(grads):
            if grad is not None:
                self.counts[i] += 1
                args = (self.values[i], grad.detach().double(), self.states[i], self.counts[i])
                self.values[i] = self.formula(*args, **extra, **self.options[i]).to(self.dtypes[i]).double()
