"""`compile_optimizer_`: replace an optimizer's step by a compiled one, for all callers of `opt.step`."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from npu_fuse_pass import backend
from npu_fuse_pass.errors import NotCapturedError
from npu_fuse_pass.report.logs import switched_off
from npu_fuse_pass.rules.hidden import hidden, uses_fused
from npu_fuse_pass.tools.compile_step import CompiledStep
from npu_fuse_pass.tools.plain_step import PATCHED, check_optimizer, function_of, plain_step
from npu_fuse_pass.user_warnings import warn

_STEP, _GETSTATE, _PATCH = PATCHED
_WRAPPERS = ("accelerate.", "lightning.", "pytorch_lightning.")  # optimizers that call the step of another one
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741


def compile_optimizer_(opt: O, **options: Any) -> O:
    """Compile the step of `opt` in place: from now on `opt.step` runs the compiled step.

    `opt.step` stays a bound method, may be patched before or after schedulers are made, and does what
    `npu_fuse_pass.compile_step` does. Copies (`copy.deepcopy`, pickle, `torch.save` of the optimizer) are compiled as
    well; loading such a pickle needs this package. A bound `opt.step` saved before this call runs the
    original; the first such step warns. `restore_optimizer_` undoes all this.

    Args:
        opt: any torch.optim.Optimizer, of torch, of this project or another one. Wrappers of accelerate and Lightning
            are unwrapped.
        options: those of the backend, which `npu_fused` lists.

    Returns:
        `opt` itself. Where torch never shows its step to a backend (LBFGS, SparseAdam, Adafactor), it is unchanged, and
        a warning says why. A second call replaces the options of the first.

    Raises:
        TypeError: `opt` is no torch.optim.Optimizer.
        OptionError: an unknown option or value. Nothing is changed.
        NotCapturedError: `strict`, and torch never shows this step to a backend. Nothing is changed.
    """
    check_optimizer(opt, "compile_optimizer_")
    tracked = backend.TrackedBackend(options)
    if switched_off():
        return opt
    inner = _innermost(opt)
    reason = None if uses_fused(inner) else hidden(inner)
    if reason is not None:
        text = f"{type(inner).__name__} was not compiled: {reason.advised}"
        if tracked.options["strict"]:
            raise NotCapturedError(text)
        backend.isolated(inner.step, tracked)  # for those who follow torch.compile, as `dump --check` does
        warn(f"npu_fused: {text}")
        return opt
    restore_optimizer_(inner)
    Patch(inner, options).install()
    return opt


def restore_optimizer_(opt: O) -> O:
    """Undo `compile_optimizer_`: `opt.step` is as before, and a saved compiled one runs the original.

    Returns:
        `opt` itself; unchanged where it was not compiled.

    Raises:
        TypeError: `opt` is no optimizer.
    """
    check_optimizer(opt, "restore_optimizer_")
    inner = _innermost(opt)
    patch = vars(inner).get(_PATCH)
    if patch is not None and patch.optimizer is inner:  # copy.copy takes the fields of the other one along
        patch.remove()
    return opt


class Patch:
    """The compiled step in the fields of an optimizer; every copy of the optimizer gets its own."""

    def __init__(self, opt: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        self.optimizer, self._options = opt, options
        self._previous = vars(opt).get(_STEP)
        self._warned = False
        self._watching: RemovableHandle | None = None
        self._original = plain_step(opt)
        self._function = function_of(self._original, self._run)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Dynamo is not to follow how the compiled step of a copy is made
        step = self._original if torch.compiler.is_dynamo_compiling() else self.compiled
        return step(*args, **kwargs)

    @functools.cached_property
    def compiled(self) -> CompiledStep:
        """The compiled step; a copy of an optimizer has no parameters yet while its patch is made."""
        return CompiledStep(self.optimizer, self._options, by="compile_optimizer_")

    def __reduce__(self) -> tuple[Any, ...]:
        return _patched_copy, (self.optimizer, self._options)

    def install(self) -> None:
        """Replace `step`, and watch for calls of the original."""
        self.take_place()
        # a wrapper whose __init__ leaves out torch's has no hooks, or plain dicts, in which torch registers none
        with contextlib.suppress(AttributeError, TypeError):
            self._watching = self.optimizer.register_step_pre_hook(self.watch)
        self.compiled.fused_option.switch_off()

    def take_place(self) -> None:
        """Replace `step` and `__getstate__`: torch's keeps no fields, so copies would be eager."""
        opt = self.optimizer
        step, getstate = types.MethodType(self._function, opt), types.MethodType(_fields_of_a_copy, opt)
        vars(opt).update({_STEP: step, _GETSTATE: getstate, _PATCH: self})

    def remove(self) -> None:
        """Undo `install`. A wrapper put around the step since then stays, and runs it eagerly."""
        fields = vars(self.optimizer)
        ours = getattr(fields.get(_STEP), "__func__", None) is self._function
        for name in PATCHED if ours else (_GETSTATE, _PATCH):
            fields.pop(name, None)
        if ours and self._previous is not None:
            fields[_STEP] = self._previous
        if self._watching is not None:
            self._watching.remove()
        self.compiled.release()

    def watch(self, opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Warn if the original runs beside the compiled step: a step hook."""
        if torch.compiler.is_compiling() or self._warned or self.compiled.running or not backend.compiling():
            return
        self._warned = True
        warn(
            f"npu_fused: nothing was compiled for this step of {type(opt).__name__}: something took opt.step before "
            "compile_optimizer_ and kept it (accelerate does, with a GradScaler). Call compile_optimizer_ first: ahead "
            "of accelerator.prepare, and of whatever else is given the optimizer"
        )

    watch.only_watches = True  # type: ignore[attr-defined]  # it does nothing that a compiled function would have to do


def _patched_copy(opt: torch.optim.Optimizer, options: dict[str, Any]) -> Patch:
    """The patch of a copied optimizer, which may have no other fields yet."""
    patch = Patch(opt, options)
    patch.take_place()
    return patch


def _fields_of_a_copy(opt: torch.optim.Optimizer) -> dict[str, Any]:
    fields = dict(type(opt).__getstate__(opt))
    return {**{k: v for k, v in fields.items() if k not in PATCHED}, _PATCH: vars(opt)[_PATCH]}


def _innermost(opt: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of wrappers."""
    while type(opt).__module__.startswith(_WRAPPERS):
        inside = getattr(opt, "optimizer", None)
        if not isinstance(inside, torch.optim.Optimizer):
            break
        opt = inside
    return opt
