"""Tracing in one thread while others train."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from npu_fuse_pass.private_torch import find

T = TypeVar("T")


def while_compiling(work: Callable[[], T]) -> T:
    """Run `work`, which traces with torch.fx, inside of a Dynamo compile, and return its result.

    A trace sets process-wide flags under which compiled functions of other threads refuse to run. While Dynamo
    compiles, they ignore these, and Dynamo compiles in one thread at a time.
    """
    context = find("torch._guards.TracingContext")
    if context is not None and context.try_get() is not None:
        return work()
    asked, done, errors = [work], [], []  # Dynamo keeps the backend for good, so these are emptied

    def backend(gm: Any, example_inputs: Any) -> Callable[..., Any]:
        try:
            done.append(asked.pop()())
        except Exception as e:  # Dynamo would wrap it
            errors.append(e)
        return lambda x: (x,)

    def anything(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    code = anything.__code__.replace(co_name="npu_fused_while_compiling")  # its own: torch counts compiles of one
    function = types.FunctionType(code, globals(), code.co_name)
    _compile(function, backend=backend)(torch.zeros(1, device="cpu"))
    forget = find("torch._dynamo.reset_code")  # what Dynamo has made, which it would keep
    if forget is not None:
        forget(code)
    if errors:
        raise errors.pop()
    return done.pop() if done else asked.pop()()  # torch.compiler.set_stance may forbid compiles


_compile = torch.compile
