"""Step hooks: torch calls them around a class's `step`, and a rule optimizer calls them itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Hook = Callable[..., Any]


def before(opt: torch.optim.Optimizer) -> Mapping[int, Hook]:
    """The hooks that run before the steps of one optimizer."""
    own: Mapping[int, Hook] | None = getattr(opt, "_optimizer_step_pre_hooks", None)
    return _kept(opt.register_step_pre_hook) if own is None else own


def after(opt: torch.optim.Optimizer) -> Mapping[int, Hook]:
    """The hooks that run after the steps of one optimizer."""
    own: Mapping[int, Hook] | None = getattr(opt, "_optimizer_step_post_hooks", None)
    return _kept(opt.register_step_post_hook) if own is None else own


def _kept(register: Callable[..., Any]) -> MutableMapping[int, Hook]:
    """The dict in which a torch function keeps the hooks that it registers, found through a hook's handle."""
    handle = register(lambda *_: None)
    kept: MutableMapping[int, Hook] = handle.hooks_dict_ref()
    handle.remove()
    return kept


BEFORE_ALL = _kept(register_optimizer_step_pre_hook)
AFTER_ALL = _kept(register_optimizer_step_post_hook)
"""The hooks for the steps of all optimizers, now and later."""


def around(opt: torch.optim.Optimizer) -> Sequence[Mapping[int, Hook]]:
    """All hooks that run before or after the steps of an optimizer, kind by kind."""
    return before(opt), after(opt), BEFORE_ALL, AFTER_ALL


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """The hooks for all optimizers do not run: a step of a copy is none that they should see."""
    kept = [(hooks, dict(hooks)) for hooks in (BEFORE_ALL, AFTER_ALL)]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)
