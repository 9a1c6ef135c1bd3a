"""Spellings of the other kernels' updates, as in spellings.py."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.spellings import SPELLINGS, spelling

__all__ = ["SPELLINGS"]


@spelling("epsilon as it is beside the root", kernel="adam")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    p.sub_(h.lr * (1 - h.b2**t).sqrt() / (1 - h.b1**t) * m / (v.sqrt() + h.eps))


@spelling("amsgrad", kernel="adam_amsgrad", extra=True)
def _(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    w.copy_(torch.maximum(w, v))
    p.sub_(h.lr / (1 - h.b1**t) * m / (w.sqrt() / (1 - h.b2**t).sqrt() + h.eps))


@spelling("amsgrad with decay", kernel="adam_amsgrad", extra=True, decay="decoupled")
def _(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    t.add_(1)
    p.mul_(1 - h.lr * h.wd)
    m.mul_(h.b1).add_(g, alpha=1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    torch._foreach_maximum_([w], [v])
    p.sub_(h.lr / (1 - h.b1**t) * m / ((w / (1 - h.b2**t)).sqrt() + h.eps))


@spelling("momentum", kernel="momentum")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.mul_(h.b1).add_(g)
    p.add_(m * -h.lr)


@spelling("momentum with a penalty", kernel="momentum", decay="l2")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.copy_(h.b1 * m + g + h.wd * p)
    p.sub_(m, alpha=h.lr)


@spelling("nesterov", kernel="nesterov")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.mul_(h.b1).add_(g)
    p.sub_(h.lr * (g + h.b1 * m))


@spelling("rmsprop", kernel="rmsprop")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    v.add_((1 - h.b2) * (g * g - v))
    m.mul_(h.b1).add_(h.lr * g / (v + h.eps).sqrt())
    p.sub_(m)


@spelling("rmsprop with a penalty", kernel="rmsprop", decay="l2")
def _(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    g = g + h.wd * p
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    m.copy_(h.b1 * m + h.lr * (g * torch.rsqrt(v + h.eps)))
    p.copy_(p - m)


@spelling("centered", kernel="centered_rmsprop", extra=True)
def _(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    m.lerp_(g, 1 - h.b2)
    w.lerp_(g * g, 1 - h.b2)
    v.mul_(h.b1).addcdiv_(g * h.lr, (w - m * m + h.eps).sqrt())
    p.sub_(v)
