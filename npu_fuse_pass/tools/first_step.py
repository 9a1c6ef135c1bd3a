"""The first step of an optimizer that nobody here knows: it runs as it is, and what is compiled finds its states made.

Dynamo would compile the first step as a graph of its own. Where states are copies of tensors, or are made behind a
branch that it cannot follow, it would skip that code for good, though no later step runs it. And the first step shows
which Python numbers change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def first_eagerly(
    opt: torch.optim.Optimizer, step: Callable[..., Any], compiled: Callable[..., Any], changing: set[str]
) -> Callable[..., Any]:
    """`compiled`, except that a first step which makes states is `step` itself.

    States that are there (a checkpoint was loaded, eager steps were made) leave nothing to wait for. Dynamo makes the
    states of torch's own classes while it captures, so that their first steps are compiled.

    Args:
        changing: gets the keys in groups and states whose Python numbers change: lr, and what the first step changed.
    """
    if getattr(step, "__module__", "").startswith("torch.optim."):
        return compiled
    changing.add("lr")
    waits = True

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal waits
        first, waits = waits, False
        if not first or _has_states(opt):
            return compiled(*args, **kwargs)
        before = _numbers(opt)
        try:
            return step(*args, **kwargs)
        finally:
            changing.update(key for key, values in _numbers(opt).items() if before.get(key) != values)

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
    """Whether every parameter that is trained has a state; without any, the first step is eager, too."""
    trained = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    return bool(trained) and all(opt.state.get(p) for p in trained)
