"""`compile_step`: torch.compile of an optimizer's step, with what a backend cannot set or notice."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass import backend
from npu_fuse_pass.errors import NotCapturedError
from npu_fuse_pass.report.causes import graph_break
from npu_fuse_pass.run import torch_class
from npu_fuse_pass.run.check_numerics import names_of
from npu_fuse_pass.tools.hidden import hidden, uses_fused
from npu_fuse_pass.tools.twin import twin
from npu_fuse_pass.user_warnings import warn


def compile_step(opt: torch.optim.Optimizer, **options: Any) -> CompiledStep:
    """A compiled step of `opt`: call it instead of `opt.step`, with or without a closure.

    It has recompiles of its own (instances of one class otherwise share torch's limit of 8), switches fused=True off
    with a warning, and notices what a backend cannot: steps that never reach it.

    Args:
        opt: any torch.optim.Optimizer.
        options: those of the backend: `platform`, `strict`, `check_numerics`, `torchair_config`, `layout`.

    Raises:
        OptionError: an unknown option or value.
    """
    if uses_fused(opt):
        _switch_fused_off(opt)
    return CompiledStep(opt, options)


class CompiledStep:
    """What `compile_step` gives.

    Raises:
        UnfusedError: `strict`, and something is left unfused; nothing was changed.
        NumericsError: `check_numerics`, and a fused update differs; the original's values are in place.
        NotCapturedError: when called for the second time, if no update reached the backend; names reason and remedy.
            Both steps were done, eagerly.
    """

    def __init__(self, opt: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        self._opt = opt
        self._watched = backend.Watched(options)
        self._breaks = backend.break_counts()
        self._step = backend.isolated(opt.step, self._watched)
        self._steps = 0
        self._compiled = False
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._watched.ran.clear()
        torch_step = None
        if self._watched.options["check_numerics"] and not (args or kwargs):  # a closure makes gradients in the step
            torch_step = torch_class.of_stock(self._opt, functools.partial(twin, missing_gradients=False))
        try:
            result = self._step(*args, **kwargs)
        except Exception as e:
            own = backend.own_error(e)
            if own is None or own is e:
                raise
            raise own from e
        if self._watched.ran:
            self._compiled = True
            if torch_step is not None:
                report = self._watched.ran[-1]
                report.checked_against[1:] = [torch_step.name]
                steps = report.checked_steps
                torch_step.compare(self._opt.state, names_of([self._opt]), steps, rounds_once=False)
        elif backend.compiling() and has_gradients(self._opt):
            self._missed()
        return result

    def _missed(self) -> None:
        """A step that updated parameters, but not in a compiled graph."""
        self._steps += 1
        name = type(self._opt).__name__
        if self._compiled and not self._warned:
            self._warned = True
            warn(
                f"npu_fused: a step of {name} ran eagerly: torch compiles no further variant of it. What changes "
                "between steps costs variants: make lr a tensor, keep gradients from becoming None (set_to_none=False)"
            )
        if not self._compiled and self._steps >= 2:
            broken = graph_break(backend.last_break(self._breaks) or "TORCH_LOGS=graph_breaks says why")
            why = (hidden(self._opt) or broken.led_by("Dynamo broke or skipped every graph")).advised
            done = f"two steps of {name} ran, both eagerly, and torch handed no update to the backend"
            raise NotCapturedError(f"{done}. {why}")


def has_gradients(opt: torch.optim.Optimizer) -> bool:
    """Whether a step of `opt` has anything to do."""
    return any(p.grad is not None for group in opt.param_groups for p in group["params"])


def _switch_fused_off(opt: torch.optim.Optimizer) -> None:
    warn(
        f"npu_fused: {type(opt).__name__} was constructed with fused=True, which torch hides from every backend; "
        "compile_step has switched it off. Construct the optimizer without it to avoid this warning"
    )
    for settings in (opt.defaults, *opt.param_groups):
        if settings.get("fused"):
            settings["fused"] = False
    opt._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # GradScaler then unscales before the step
    for entry in opt.state.values():
        step = entry.get("step")
        if isinstance(step, Tensor):  # fused kernels keep counters on the device
            entry["step"] = step.cpu()
