"""Run a training script for a few steps and observe the optimizers that it builds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from npu_fuse_pass.profiling import profiling
from npu_fuse_pass.tools.compile_step import CompiledStep

# operations that create a tensor or a view: no kernel runs for them
_NO_KERNEL = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "item"),
    *(
        "lift_fresh",
        "_local_scalar_dense",
        "narrow",
        "_reshape_alias",
        "resize_",
        "resolve_conj",
        "resolve_neg",
        "result_type",
    ),
    *("select", "set_", "slice", "split", "t", "to", "transpose", "unbind"),
    *("unsqueeze", "view"),
}


@dataclasses.dataclass
class Measured:
    """Cost of one step: operations that ran a kernel, and peak bytes beyond those allocated before."""

    calls: int
    peak_bytes: int


@dataclasses.dataclass
class Observed:
    """An optimizer of the script, and observations of its steps.

    Attributes:
        steps: number of observed steps.
        closures: True if a step got a closure.
        changed: keys of Python numbers in its groups that changed.
        gradients: distinct patterns of parameters with gradients.
        by_us: True if steps were made by what `compile_step` or `compile_optimizer_` has made.
        measured: the last step, as the script runs it, or why it was not measured.
    """

    optimizer: torch.optim.Optimizer
    steps: int = 0
    closures: bool = False
    changed: set[str] = dataclasses.field(default_factory=set)
    gradients: set[tuple[bool, ...]] = dataclasses.field(default_factory=set)
    by_us: bool = False
    measured: Measured | str = "it made fewer steps than were asked for"
    _numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def note(self, closure: bool) -> None:
        """Observe the optimizer right before a step."""
        self.steps += 1
        self.closures |= closure
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.gradients.add(tuple(p.grad is not None for p in params))
        for i, group in enumerate(self.optimizer.param_groups):
            for name, value in group.items():
                numbers = value if isinstance(value, tuple) else (value,)
                if name == "params" or not all(type(n) in (int, float) for n in numbers):
                    continue
                if self._numbers.setdefault(f"{i}.{name}", value) != value:
                    self.changed.add(name)


class _Enough(BaseException):
    """Ends a script from inside a step; not an Exception, so that scripts do not catch it."""


def observe(path: str, arguments: Sequence[str], steps: int) -> list[Observed]:
    """Run a script, eagerly, until its optimizers have made `steps` steps; nothing after that runs.

    One that steps more rarely than others is not waited for: where one of them is about to make another step, all end.

    Returns:
        The optimizers that stepped, in the order of their first steps. They keep parameters, states and gradients.
    """
    seen: dict[int, Observed] = {}
    record: list[profile] = []

    def before(opt: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = seen.setdefault(id(opt), Observed(opt))
        if found.steps == steps:
            raise _Enough
        given = [value for value in (*args, *kwargs.values()) if value is not opt and value is not None]
        found.note(closure=bool(given))
        found.by_us |= any(f.f_code is CompiledStep.__call__.__code__ for f, _ in traceback.walk_stack(sys._getframe()))
        if found.steps == steps and profiling():
            found.measured = "a profiler of the script was active"
        elif found.steps == steps:
            record.append(_memory_profile())
            record[-1].__enter__()

    def after(opt: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = seen[id(opt)]
        if found.steps == steps:
            if record:
                record[-1].__exit__(None, None, None)
                found.measured = _read(record.pop())
            if all(other.steps >= steps for other in seen.values()):
                raise _Enough

    hooks = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    try:
        with as_main(path, arguments), torch.compiler.set_stance("force_eager"), contextlib.suppress(_Enough):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        if e.code not in (None, 0) and not seen:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.values())


def measure(step: Callable[[], Any]) -> Measured:
    """Measure one call of a step."""
    with _memory_profile() as record:
        step()
    return _read(record)


def _memory_profile() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _read(record: profile) -> Measured:
    calls = 0
    for event in record.events() or ():
        name = event.name.removeprefix("aten::")
        inner = any(child.name.startswith("aten::") for child in event.cpu_children)
        calls += event.name.startswith("update_") or (name != event.name and name not in _NO_KERNEL and not inner)
    live = peak = 0
    results: Any = record.profiler.kineto_results if record.profiler is not None else None
    for raw in results.events() if results is not None else ():
        if raw.name() == "[memory]":
            live += raw.nbytes()
            peak = max(peak, live)
    return Measured(calls, peak)


@contextlib.contextmanager
def as_main(path: str, arguments: Sequence[str]) -> Iterator[None]:
    """Set sys.argv and sys.path as `python path arguments` does, inside the block."""
    argv, search = sys.argv, sys.path.copy()
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, search
