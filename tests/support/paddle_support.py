"""What the tests of optimizers.paddle share: the oracle of a parameter group, and steps compared with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from optimizers.paddle import RMSProp
from tests.support import oracles
from tests.support.training import MODES, Step, assert_close, gradients, set_gradients

BOUNDARIES, VALUES = [2, 4, 6, 8], [0.2, 0.4, 0.6, 0.8, 1.0]

both_modes = pytest.mark.parametrize("mode", MODES)


def stable(value: Any) -> str:
    """A parameter's id without addresses: those differ between pytest-xdist's workers."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Loop:
    """What one group of parameters should do, in float64: clipping and regularisation, then the oracle's update.

    Args:
        decay: ("l1" | "l2" | None, coefficient) for each parameter, or one for all.
        clip: None, ("global", c), ("norm", c) or ("value", low, high).
        spared: the parameters that are not clipped.
    """

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        self.values = [p.detach().double().clone() for p in params]
        self.states: list[dict[str, Tensor]] = [{} for _ in params]
        self.grads: list[Tensor | None] = [None for _ in params]
        self.options = dict(lr=0.02, rho=0.95, epsilon=1e-6, momentum=0.0, centered=False, clip=None)
        self.options |= {"decay": (None, 0.0), "spared": (), **options}

    def step(self, grads: Sequence[Tensor | None]) -> None:
        o = self.options
        update = {"learning_rate": o["lr"], **{k: o[k] for k in ("rho", "epsilon", "momentum", "centered")}}
        decays = o["decay"] if isinstance(o["decay"], list) else [o["decay"]] * len(self.values)
        clipped = self.clipped([None if g is None else g.detach().double() for g in grads])
        for i, g in enumerate(clipped):
            if g is None:
                continue
            kind, c = decays[i]
            if kind == "l1":
                g = g + c * torch.sign(self.values[i])
            if kind == "l2":
                g = g + c * self.values[i]
            self.values[i] = oracles.paddle_rmsprop(self.values[i], g, self.states[i], 0, **update)

    def clipped(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The clipped gradients; `self.grads` are what p.grad should hold after the step."""
        clip, self.grads = self.options["clip"], list(grads)
        mine = [i for i, g in enumerate(grads) if g is not None and i not in self.options["spared"]]
        if clip is None:
            return grads
        new = list(grads)
        norms = {i: math.sqrt(sum(x * x for x in grads[i].flatten().tolist())) for i in mine}
        for i in mine:
            if clip[0] == "global":
                new[i] = grads[i] * (clip[1] / max(math.sqrt(sum(n * n for n in norms.values())), clip[1]))
                self.grads[i] = new[i]
            elif clip[0] == "norm" and norms[i] > clip[1]:
                new[i] = grads[i] * clip[1] / norms[i]
            elif clip[0] == "value":
                new[i] = torch.clamp(grads[i], clip[1], clip[2])
        return new


def check(
    params: Sequence[torch.nn.Parameter],
    opt: RMSProp,
    loops: Sequence[Loop],
    mode: str,
    *,
    steps: int = 5,
    missing: Callable[[int, int], bool] = lambda i, t: False,
    between: Callable[[int], None] = lambda t: None,
) -> None:
    """Step `opt` and the loops (one per group, in order); compare parameters and gradients after each step.

    Args:
        missing: (parameter, step) -> whether its gradient is None.
        between: called with the number of a step before it.
    """
    step = Step(opt, mode)
    for t in range(steps):
        between(t)
        grads = [None if missing(i, t) else g for i, g in enumerate(gradients(params, t))]
        set_gradients(params, grads)
        step()
        left = list(grads)
        for loop in loops:
            loop.step([left.pop(0) for _ in loop.values])
        assert_close(params, [v for loop in loops for v in loop.values])
        wanted = [g for loop in loops for g in loop.grads]
        for p, g in zip(params, wanted, strict=True):
            assert (p.grad is None) == (g is None)
        assert_close([p.grad for p in params if p.grad is not None], [g for g in wanted if g is not None])
    step.check(len(params))
    assert mode == "eager" or len(npu_fuse_pass.reports()) == 1
