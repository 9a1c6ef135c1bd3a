"""Steps that `torch.compile(opt.step, backend="npu_fused")` is given where torch never asks the backend.

torch tells a backend neither which step it is for, nor that it hides the step, nor that a scheduler takes the compiled
step for a method. So this looks where torch can be asked: where a compile begins, and where a scheduler is made.
"""

from __future__ import annotations

import functools
import sys
import traceback
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from npu_fuse_pass.private_torch import find
from npu_fuse_pass.rules.hidden import hidden
from npu_fuse_pass.user_warnings import is_users, warn

_warned: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def look_after_compiled_steps() -> None:
    """Install both checks, until `torch._dynamo.reset()` removes that of compiles."""
    _let_schedulers_take_functions()
    handler = find("torch._dynamo.callback.callback_handler")
    if handler is not None and _warn_hidden not in handler.start_callbacks:
        handler.register_start_callback(_warn_hidden)


@functools.cache
def _let_schedulers_take_functions() -> None:
    made = LRScheduler.__init__

    @functools.wraps(made)
    def begin(self: LRScheduler, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        _make_method(optimizer)
        made(self, optimizer, *args, **kwargs)

    LRScheduler.__init__ = begin  # type: ignore[method-assign]


def _make_method(opt: Any) -> None:
    """`opt.step = torch.compile(opt.step)` puts a function where a scheduler reads `__func__`: bind one."""
    step = vars(opt).get("step") if isinstance(opt, torch.optim.Optimizer) else None
    original = getattr(step, "_torchdynamo_orig_callable", None)
    if not isinstance(step, types.FunctionType) or getattr(original, "__self__", None) is not opt:
        return
    compiled: Any = step

    @functools.wraps(compiled)
    def bound(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    vars(opt)["step"] = types.MethodType(bound, opt)


def _warn_hidden(*_: Any) -> None:
    """One warning for an optimizer whose step Dynamo breaks up, or passes by, without a call of the backend."""
    for frame in _compiling():
        for opt in _optimizers(frame.f_locals):
            reason = None if opt in _warned else hidden(opt)
            if reason is not None:
                _warned.add(opt)
                warn(f"npu_fused: nothing is compiled of {type(opt).__name__}.step: {reason.advised}")


def _compiling() -> Iterator[Any]:
    """The frame that Dynamo compiles now for this backend; none where torch keeps it elsewhere.

    A user's frames are not read: to ask for their variables keeps these alive as long as the frame.
    """
    for caller, _ in traceback.walk_stack(sys._getframe(1)):
        if is_users(caller.f_code):
            return
        converter, frame = caller.f_locals.get("self"), caller.f_locals.get("frame")
        if hasattr(converter, "_torchdynamo_orig_backend") and hasattr(frame, "f_locals"):
            if is_ours(innermost(converter)):
                yield frame
            return


def innermost(backend: Any) -> Any:
    """A backend without what torch wraps it in."""
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def is_ours(backend: Any) -> bool:
    """True for the backend as a user names it."""
    return getattr(backend, "compiler_name", getattr(backend, "__name__", "")) in ("npu_fused", "_npu_fused")


def _optimizers(found: dict[str, Any]) -> Iterator[torch.optim.Optimizer]:
    """Of a step's frame: `self`, or the first of `args`."""
    args = found.get("args")
    for value in (found.get("self"), args[0] if isinstance(args, tuple) and args else None):
        if isinstance(value, torch.optim.Optimizer) and hasattr(value, "param_groups"):  # else it is being made
            yield value
