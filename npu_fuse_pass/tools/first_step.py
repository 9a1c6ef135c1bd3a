"""The first step of an optimizer that nobody here knows: it runs as it is, and what is compiled finds its states made.

Dynamo would compile the first step as a graph of its own. Where states are copies of tensors, or are made behind a
branch that it cannot follow, it would skip that code for good, though no later step runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def first_eagerly(
    opt: torch.optim.Optimizer, step: Callable[..., Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """`compiled`, except that a first step which makes states is `step` itself.

    States that are there (a checkpoint was loaded, eager steps were made) leave nothing to wait for. Dynamo makes the
    states of torch's own classes while it captures, so that their first steps are compiled.
    """
    if getattr(step, "__module__", "").startswith("torch.optim."):
        return compiled
    waits = True

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal waits
        first, waits = waits, False
        return (step if first and not _has_states(opt) else compiled)(*args, **kwargs)

    return run


def _has_states(opt: torch.optim.Optimizer) -> bool:
    """Whether every parameter that is trained has a state; without any, the first step is eager, too."""
    trained = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    return bool(trained) and all(opt.state.get(p) for p in trained)
