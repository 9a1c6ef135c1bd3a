"""Step hooks: torch calls them around a class's `step`, and a rule optimizer calls them itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Hook = Callable[..., Any]


def before(opt: torch.optim.Optimizer) -> list[Hook]:
    """The hooks that run before the steps of one optimizer."""
    own: Mapping[int, Hook] | None = getattr(opt, "_optimizer_step_pre_hooks", None)
    return list((_kept(opt.register_step_pre_hook) if own is None else own).values())


def after(opt: torch.optim.Optimizer) -> list[Hook]:
    """The hooks that run after the steps of one optimizer."""
    own: Mapping[int, Hook] | None = getattr(opt, "_optimizer_step_post_hooks", None)
    return list((_kept(opt.register_step_post_hook) if own is None else own).values())


def _kept(register: Callable[..., Any]) -> Mapping[int, Hook]:
    """The dict in which a torch function keeps the hooks that it registers, found through a hook's handle."""
    handle = register(lambda *_: None)
    kept: Mapping[int, Hook] = handle.hooks_dict_ref()
    handle.remove()
    return kept


BEFORE_ALL = _kept(register_optimizer_step_pre_hook)
AFTER_ALL = _kept(register_optimizer_step_post_hook)
"""The hooks for the steps of all optimizers, now and later."""
