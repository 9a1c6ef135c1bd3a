"""Whether a step that torch failed to compile has begun: if not, the original can run in its place."""

from __future__ import annotations

import pathlib
import traceback
import types
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass.private_torch import find
from npu_fuse_pass.tools.plain_step import is_hooked

_TORCH = f"{pathlib.Path(torch.__file__).parent}/"


def is_dynamos(error: Exception) -> bool:
    """True for an error that Dynamo makes of one that it meets while it compiles."""
    kinds = find("torch._dynamo.exc.InternalTorchDynamoError"), find("torch._dynamo.exc.TorchRuntimeError")
    return isinstance(error, tuple(kind for kind in kinds if kind is not None))


def failed_before(step: Callable[..., Any], error: Exception) -> bool:
    """True if Dynamo itself failed, on the outermost code of `step`: nothing of it has run.

    Args:
        step: what was compiled.
        error: what the call has raised.
    """
    # the latter two Dynamo lets through as they are, and other kinds are those that somebody has asked for
    if not (is_dynamos(error) or isinstance(error, (AssertionError, IndexError))):
        return False
    entry, compiler = (getattr(find(f"torch._dynamo.{name}"), "__file__", None) for name in _DYNAMO)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    called = next((i for i, code in enumerate(frames) if code.co_filename == entry), len(frames))
    passed = _wrappers(step)
    inside = next((c for c in frames[called:] if c.co_filename != entry and c not in passed), None)
    return inside is not None and inside.co_filename == compiler


_DYNAMO = ("eval_frame", "convert_frame")


def _wrappers(step: Callable[..., Any]) -> set[types.CodeType]:
    """The code of torch's wrappers of a step (no_grad) that do nothing which may not be done twice, as hooks may."""
    found = set()
    function: Any = getattr(step, "__func__", step)
    while hasattr(function, "__wrapped__"):
        if function.__code__.co_filename.startswith(_TORCH) and not is_hooked(function):
            found.add(function.__code__)
        function = function.__wrapped__
    return found
