"""What tests of rules share: a rule gives the same eagerly and compiled."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tolerances import RULE
from tests.support.training import (
    assert_close,
    assert_one_fused_step,
    clones,
    compiled,
    gradients,
    parameters,
    set_gradients,
    train,
)

SHAPES = [(3, 4), (4, 3), (30, 4), (2, 3), (5,), (100,), (2, 3, 4), (40, 50), (), (5,)]


def same_compiled(made: Any, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, fused: bool = True) -> Any:
    """A rule gives the same parameters and states eagerly and compiled, for every shape; returns the parameters."""
    params = parameters(shapes, dtype)
    others = clones(params)
    opt, eager = made(params), made(others)
    step = compiled(opt)
    train(params, step)
    train(others, eager.step)
    assert_close(params, others, RULE[dtype])
    for p, other in zip(params, others, strict=True):
        assert_close(list(opt.state[p].values()), list(eager.state[other].values()), RULE[dtype])
    if fused:
        step.check(len(params))
        set_gradients(params, gradients(params, 9))
        assert_one_fused_step(step)
    return params
