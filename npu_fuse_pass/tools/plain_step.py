"""An optimizer's step without the wrappers of torch and of this package."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler

from npu_fuse_pass.private_torch import find

# fields of an optimizer whose step was replaced; `compile_optimizer_` sets all three
PATCHED = ("step", "__getstate__", "_npu_fused")
ORIGINAL = "_npu_fused_original"  # attribute of a compiled step: the original step


def check_optimizer(opt: object, by: str) -> None:
    """Refuse what is no optimizer.

    Raises:
        TypeError: says what `by` takes.
    """
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(f"{by}({type(opt).__name__}): allowed are instances of torch.optim.Optimizer")


def plain_step(opt: torch.optim.Optimizer) -> Callable[..., Any]:
    """`opt.step` without the wrappers of torch's schedulers, of torch.compile and of this package; others stay."""
    step: Any = opt.step
    while isinstance(step, types.FunctionType):
        if _is_of(step, lr_scheduler) and hasattr(step, "__wrapped__"):
            step = types.MethodType(step.__wrapped__, opt)
        elif _is_of(step, find("torch._dynamo.eval_frame")) and hasattr(step, "_torchdynamo_orig_callable"):
            step = step._torchdynamo_orig_callable
        else:
            break
    return getattr(step, ORIGINAL, step)  # type: ignore[no-any-return]


def function_of(original: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` as the function of a method in place of `original`; schedulers do not wrap it again."""

    def step(opt: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    functools.update_wrapper(step, getattr(original, "__func__", original))
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    setattr(step, ORIGINAL, original)
    return step


def is_hooked(step: Callable[..., Any]) -> bool:
    """True if a step is a class's method with torch's hooks around it, and nothing else."""
    return getattr(step, "__code__", None) is _HOOKED


def _is_of(function: types.FunctionType, module: types.ModuleType | None) -> bool:
    return module is not None and function.__code__.co_filename == module.__file__


_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__
