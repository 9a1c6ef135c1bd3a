"""Updates that differ from one that a kernel computes in one place: no kernel computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.spellings import MODES, Spelling

Part = Callable[..., Any]


def adam(**parts: Part) -> Callable[..., None]:
    """AdamW with some of its parts replaced."""
    chosen = {**PARTS, **parts}

    def step(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
        t.add_(1)
        old = (m.clone(), v.clone())
        first = chosen["first"](m, chosen["grad1"](g, p, h), h)
        second = chosen["second"](v, chosen["grad2"](g, p, h), h, m, first)
        chosen["store"](m, v, first, second)
        top = chosen["correct1"](chosen["use1"](first, old[0], g, h), t, h)
        root = chosen["root"](chosen["use2"](second, old[1]), t, h)
        decayed = chosen["decay"](p, h)
        p.copy_(chosen["update"](decayed, top, root, h))

    return step


PARTS: dict[str, Part] = dict(
    grad1=lambda g, p, h: g,
    grad2=lambda g, p, h: g,
    first=lambda m, g, h: h.b1 * m + (1 - h.b1) * g,
    second=lambda v, g, h, m, first: h.b2 * v + (1 - h.b2) * g * g,
    store=lambda m, v, first, second: (m.copy_(first), v.copy_(second)),
    use1=lambda first, old, g, h: first,
    use2=lambda second, old: second,
    correct1=lambda x, t, h: x / (1 - h.b1**t),
    root=lambda x, t, h: (x / (1 - h.b2**t)).sqrt() + h.eps,
    decay=lambda p, h: p * (1 - h.lr * h.wd),
    update=lambda p, top, root, h: p - h.lr * top / root,
)

ADAM_MISSES: dict[str, dict[str, Part]] = {
    "epsilon inside the root": dict(root=lambda x, t, h: (x / (1 - h.b2**t) + h.eps).sqrt()),
    "epsilon squared inside and outside": dict(root=lambda x, t, h: (x / (1 - h.b2**t) + h.eps**2).sqrt() + h.eps),
    "no bias correction": dict(correct1=lambda x, t, h: x, root=lambda x, t, h: x.sqrt() + h.eps),
    "no correction of m": dict(correct1=lambda x, t, h: x),
    "no correction of v": dict(root=lambda x, t, h: x.sqrt() + h.eps),
    "corrections swapped": dict(
        correct1=lambda x, t, h: x / (1 - h.b2**t), root=lambda x, t, h: (x / (1 - h.b1**t)).sqrt() + h.eps
    ),
    "correction of m by beta2": dict(correct1=lambda x, t, h: x / (1 - h.b2**t)),
    "correction outside the root": dict(root=lambda x, t, h: x.sqrt() / (1 - h.b2**t) + h.eps),
    "correction multiplied": dict(correct1=lambda x, t, h: x * (1 - h.b1**t)),
    "correction by a product": dict(correct1=lambda x, t, h: x / (1 - h.b1 * t)),
    "correction without the step": dict(correct1=lambda x, t, h: x / (1 - h.b1)),
    "epsilon corrected, too": dict(root=lambda x, t, h: (x.sqrt() + h.eps) / (1 - h.b2**t)),
    "epsilon multiplied": dict(root=lambda x, t, h: (x / (1 - h.b2**t)).sqrt() * h.eps),
    "no root": dict(root=lambda x, t, h: x / (1 - h.b2**t) + h.eps),
    "another root": dict(root=lambda x, t, h: (x / (1 - h.b2**t)) ** 0.25 + h.eps),
    "decay of the wrong sign": dict(decay=lambda p, h: p * (1 + h.lr * h.wd)),
    "decay of the updated parameter": dict(
        decay=lambda p, h: p, update=lambda p, top, root, h: (p - h.lr * top / root) * (1 - h.lr * h.wd)
    ),
    "decay without the learning rate": dict(decay=lambda p, h: p * (1 - h.wd)),
    "decay squared": dict(decay=lambda p, h: p - h.lr * h.wd * p * p),
    "penalty in m only": dict(grad1=lambda g, p, h: g + h.wd * p),
    "penalty in v only": dict(grad2=lambda g, p, h: g + h.wd * p),
    "m and v swapped": dict(store=lambda m, v, first, second: (m.copy_(second), v.copy_(first))),
    "m not stored": dict(store=lambda m, v, first, second: (m.copy_(m * 1), v.copy_(second))),
    "old m used": dict(use1=lambda first, old, g, h: old),
    "old v used": dict(use2=lambda second, old: old),
    "gradient used for m": dict(use1=lambda first, old, g, h: g),
    "nesterov": dict(use1=lambda first, old, g, h: h.b1 * first + (1 - h.b1) * g),
    "sign of m used": dict(use1=lambda first, old, g, h: first.sign()),
    "update of the wrong sign": dict(update=lambda p, top, root, h: p + h.lr * top / root),
    "parameter of the wrong sign": dict(update=lambda p, top, root, h: -p - h.lr * top / root),
    "v of the wrong sign": dict(second=lambda v, g, h, m, first: h.b2 * v - (1 - h.b2) * g * g),
    "m not averaged": dict(first=lambda m, g, h: h.b1 * m + g),
    "v not averaged": dict(second=lambda v, g, h, m, first: h.b2 * v + g * g),
    "m averaged by beta2": dict(first=lambda m, g, h: h.b1 * m + (1 - h.b2) * g),
    "betas swapped": dict(
        first=lambda m, g, h: h.b2 * m + (1 - h.b2) * g, second=lambda v, g, h, m, first: h.b1 * v + (1 - h.b1) * g * g,
        root=lambda x, t, h: x.sqrt() + h.eps, correct1=lambda x, t, h: x / (1 - h.b1**t),
    ),
    "gradient not squared": dict(second=lambda v, g, h, m, first: h.b2 * v + (1 - h.b2) * g),
    "gradient's size": dict(second=lambda v, g, h, m, first: h.b2 * v + (1 - h.b2) * g.abs()),
    "gradient cubed": dict(second=lambda v, g, h, m, first: h.b2 * v + (1 - h.b2) * g * g * g),
    "largest instead of average": dict(second=lambda v, g, h, m, first: torch.maximum(h.b2 * v, g * g)),
    "variance": dict(second=lambda v, g, h, m, first: h.b2 * v + (1 - h.b2) * (g - first) ** 2),
    "v of m": dict(second=lambda v, g, h, m, first: h.b2 * v + (1 - h.b2) * first * first),
    "clipped": dict(update=lambda p, top, root, h: p - h.lr * (top / root).clamp(-1, 1)),
    "inverted": dict(update=lambda p, top, root, h: p - h.lr * root / top),
}  # fmt: skip

# With constants, factors are one number, and of numbers any can be divided by any: AdamW with another rate or decay.
FOLDED = (
    "epsilon multiplied",
    "decay without the learning rate",
    "decay of the updated parameter",
    "parameter of the wrong sign",
)


def amsgrad_after_correction(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    w.copy_(torch.maximum(w, v / (1 - h.b2**t)))
    p.sub_(h.lr / (1 - h.b1**t) * m / (w.sqrt() + h.eps))


def amsgrad_unused(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    w.copy_(torch.maximum(w, v))
    p.sub_(h.lr / (1 - h.b1**t) * m / ((v / (1 - h.b2**t)).sqrt() + h.eps))


def amsgrad_of_the_smallest(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    t.add_(1)
    m.lerp_(g, 1 - h.b1)
    v.lerp_(g * g, 1 - h.b2)
    w.copy_(torch.minimum(w, v))
    p.sub_(h.lr / (1 - h.b1**t) * m / ((w / (1 - h.b2**t)).sqrt() + h.eps))


def gradient_zeroed(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    adam()(p, g, m, v, t, h)
    g.zero_()


def keras_momentum(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.mul_(h.b1).sub_(h.lr * g)
    p.add_(m)


def dampened_nesterov(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.mul_(h.b1).add_((1 - h.b2) * g)
    p.sub_(h.lr * (g + h.b1 * m))


def old_momentum(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    p.sub_(h.lr * m)
    m.mul_(h.b1).add_(g)


def lion(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    p.sub_(h.lr * (h.b1 * m + (1 - h.b1) * g).sign())
    m.lerp_(g, 1 - h.b2)


def rmsprop_of_torch(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    m.mul_(h.b1).addcdiv_(g, v.sqrt() + h.eps)
    p.sub_(h.lr * m)


def rmsprop_with_epsilon_outside(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    m.mul_(h.b1).add_(h.lr * g / (v.sqrt() + h.eps))
    p.sub_(m)


def rmsprop_with_the_old_average(p: Any, g: Any, m: Any, v: Any, t: Any, h: Any) -> None:
    m.mul_(h.b1).add_(h.lr * g / (v + h.eps).sqrt())
    v.mul_(h.b2).addcmul_(g, g, value=1 - h.b2)
    p.sub_(m)


def centered_by_the_old_average(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    w.lerp_(g * g, 1 - h.b2)
    v.mul_(h.b1).add_(h.lr * g / (w - m * m + h.eps).sqrt())
    m.lerp_(g, 1 - h.b2)
    p.sub_(v)


def centered_with_two_factors(p: Any, g: Any, m: Any, v: Any, w: Any, t: Any, h: Any) -> None:
    m.lerp_(g, 1 - h.b1)
    w.lerp_(g * g, 1 - h.b2)
    v.mul_(h.b1).add_(h.lr * g / (w - m * m + h.eps).sqrt())
    p.sub_(v)


_FOUR: list[Part] = [amsgrad_after_correction, amsgrad_unused, amsgrad_of_the_smallest]
_FOUR += [centered_by_the_old_average, centered_with_two_factors]
_REST: list[Part] = [gradient_zeroed, keras_momentum, dampened_nesterov, old_momentum, lion]
_REST += [rmsprop_of_torch, rmsprop_with_epsilon_outside, rmsprop_with_the_old_average]

WHOLE = Spelling("the parts as they are", adam(), "adamw", decay="decoupled")
NEAR_MISSES = [
    *(
        Spelling(name, adam(**parts), "", modes=("inputs",) if name in FOLDED else MODES)
        for name, parts in ADAM_MISSES.items()
    ),
    *(Spelling(f.__name__, f, "", extra=f in _FOUR) for f in (*_FOUR, *_REST)),
]
