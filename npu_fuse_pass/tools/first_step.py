"""The first step of a third-party optimizer: it runs eagerly, so that states exist when a step is compiled.

Dynamo would compile the first step as a separate graph. Where states are copies of tensors, or are made behind a
branch that it cannot follow, it would skip that code for good, though no later step runs it. The first step also shows
which Python numbers change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.tensors.same import same_objects


def first_eagerly(
    opt: torch.optim.Optimizer, step: Callable[..., Any], compiled: Callable[..., Any], changing: set[str]
) -> Callable[..., Any]:
    """Wrap `compiled` so that a first step which makes states runs `step`.

    With existing states (from a checkpoint or eager steps) every step is compiled. So are first steps of torch's own
    classes, whose states Dynamo makes while it captures.

    Args:
        changing: filled with keys in groups and states whose Python numbers change: lr, and those that the first step
            wrote.
    """
    if (getattr(step, "__module__", None) or "").startswith("torch.optim."):
        return compiled
    changing.add("lr")
    waits = True

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal waits
        if not waits or _has_states(opt):
            waits = False
            return compiled(*args, **kwargs)
        before = _numbers(opt)
        try:
            result = step(*args, **kwargs)
        finally:
            # one that was computed anew will change, though its value is still the same
            changing.update(k for k, values in _numbers(opt).items() if not same_objects(before.get(k, []), values))
        waits = False  # last: what ends a first step early leaves it to the next one
        return result

    return run


def _numbers(opt: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Python numbers in groups and states, by key."""
    found: dict[str, list[float]] = {}
    for values in (*opt.param_groups, *opt.state.values()):
        for key, value in values.items() if isinstance(values, dict) else ():
            if type(value) in (int, float) and isinstance(key, str):
                found.setdefault(key, []).append(value)
    return found


def _has_states(opt: torch.optim.Optimizer) -> bool:
    """True if there are trained parameters and all of them have states."""
    trained = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    return bool(trained) and all(opt.state.get(p) for p in trained)
