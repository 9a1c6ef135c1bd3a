"""`compile_step`: torch.compile of an optimizer's step, beyond what a backend can set or notice."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass import backend
from npu_fuse_pass.errors import NotCapturedError
from npu_fuse_pass.profiling import profiling
from npu_fuse_pass.reasons import Reason, advised
from npu_fuse_pass.report.causes import FIRST, graph_break
from npu_fuse_pass.report.logs import switched_off
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules import hooks
from npu_fuse_pass.rules.core_op import under_dispatch_mode
from npu_fuse_pass.rules.hidden import hidden
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.run import torch_class
from npu_fuse_pass.tensors.sharded import is_dtensor
from npu_fuse_pass.tools.fused_option import FusedOption
from npu_fuse_pass.tools.not_begun import failed_before
from npu_fuse_pass.tools.plain_step import ORIGINAL, check_optimizer, function_of, is_hooked, plain_step
from npu_fuse_pass.tools.roads import captured, road
from npu_fuse_pass.tools.twin import twin
from npu_fuse_pass.user_warnings import warn


def compile_step(opt: torch.optim.Optimizer, **options: Any) -> CompiledStep:
    """Compile the step of `opt`: call the result instead of `opt.step`, with or without a closure.

    It has its own limit of recompiles (instances of one class otherwise share torch's limit of 8), switches fused=True
    off with a warning, and notices steps that never reach the backend. The first step of a third-party class is eager
    where it makes states, and so are the 16th to 18th of what Dynamo captures, for a warning if they are faster. Step
    hooks and closures run outside of the compiled function. It may replace `opt.step`, before or after schedulers;
    `compile_optimizer_` does that, and more.

    Args:
        opt: any torch.optim.Optimizer.
        options: those of the backend, which `npu_fused` lists.

    Raises:
        TypeError: `opt` is no torch.optim.Optimizer.
        OptionError: an unknown option or value.
    """
    check_optimizer(opt, "compile_step")
    step = CompiledStep(opt, options)
    if not switched_off():
        step.fused_option.switch_off()
    return step


class CompiledStep:
    """The result of `compile_step`.

    Attributes:
        running: True during a step.
        fused_option: the optimizer's fused=True, which is off during steps.

    Raises:
        UnfusedError: `strict`, and something is left unfused; this step has changed nothing.
        PlatformError: the platform that was asked for cannot be used here; this step has changed nothing.
        NumericsError: `check_numerics`, and a fused update differs; the original's values are in place.
        Exception: torch failed to compile a step of which a part has run, or `strict`; otherwise the original runs.
        NotCapturedError: when called for the second time, if no update reached the backend; names reason and remedy.
            Both steps were done, eagerly. `compile_optimizer_` warns instead, unless `strict`.
    """

    _wrapped_by_lr_sched = True  # torch's schedulers would wrap it in a function that sets what `__call__` sets

    def __init__(self, opt: torch.optim.Optimizer, options: dict[str, Any], by: str = "compile_step") -> None:
        self._opt = opt
        self._by = by
        self._tracked = backend.TrackedBackend(options)
        self._breaks = backend.NewBreaks()
        backend.let_torch_hide_steps()
        self._original = plain_step(opt)
        self._calls_closure_first = False
        if is_hooked(self._original):
            inner = self._original.__wrapped__  # type: ignore[attr-defined]
            module = inner.__module__ or ""  # None in code that exec runs without a __name__
            self._calls_closure_first = module.startswith("torch.optim.") and module != "torch.optim.lbfgs"
            foreach = by == "compile_optimizer_" and module in ("torch.optim.adam", "torch.optim.adamw")
            self._between_hooks: Callable[..., Any] = types.MethodType(inner, opt)
            compiled = road(opt, self._between_hooks, self._tracked, foreach)
            self._compiled_update = self._unless_torch_fails(compiled, self._between_hooks)
            hooked = torch.optim.Optimizer.profile_hook_step(self._closure_then_update)
            self._with_hooks: Callable[..., Any] = types.MethodType(hooked, opt)
            self._step: Callable[..., Any] = self._hooked
        else:
            self._step = self._unless_torch_fails(captured(opt, self._original, self._tracked), self._original)
        self.fused_option = FusedOption(opt, by)
        self._steps = 0
        self._compiled: CompileReport | None = None
        self._warned = False
        self._failed = False
        self._released = switched_off()
        self.running = False
        setattr(self, ORIGINAL, self._original)

    @property
    def __self__(self) -> torch.optim.Optimizer:
        """The optimizer, as for its own methods."""
        return self._opt

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function behind the method: it takes the optimizer first."""
        return function_of(self._original, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # inlined into a larger graph, whose backend compiles it
            return self._original(*args, **kwargs)
        vars(self._opt)["_opt_called"] = True  # for schedulers, which ask whether a step was done
        running, self.running = self.running, True
        try:
            if self._released:
                return self._original(*args, **kwargs)
            self.fused_option.switch_off()
            return self._checked(*args, **kwargs)
        finally:
            self.running = running

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        self._tracked.ran.clear()
        try:
            result = self._step(*args, **kwargs)
        except Exception as e:
            own = backend.own_error(e)
            if own is None or own is e:
                raise
            raise own from e
        compiled = self._last_compiled()
        if compiled is not None:
            self._compiled = compiled
        elif not self._failed and backend.compiling() and has_gradients(self._opt) and not _skips(self._opt):
            self._missed()
        return result

    def _last_compiled(self) -> CompileReport | None:
        """The report of the last graph that ran in this step, if an update did."""
        ran = self._tracked.ran
        updated = bool(ran) and (self._compiled is not None or self._breaks.leave_an_update(ran))
        return ran[-1] if updated else None

    def _hooked(self, *args: Any, **kwargs: Any) -> Any:
        """A step with hooks, and in a range for profilers where one is active: that takes as long as many a step."""
        opt = self._opt
        if any(hooks.around(opt)) or profiling():
            return self._with_hooks(*args, **kwargs)
        return self._closure_then_update(opt, *args, **kwargs)

    def _closure_then_update(self, opt: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """The step between the hooks. A closure runs uncompiled: it runs a model."""
        closure = args[0] if args else kwargs.get("closure")
        alone = self._calls_closure_first and len(args) + len(kwargs) == 1
        if not callable(closure):
            none = closure is None and (args or "closure" in kwargs)  # what wrappers, accelerate's too, hand on
            return self._update() if alone and none else self._update(*args, **kwargs)
        if alone:
            with torch.enable_grad():
                loss = closure()
            self._update()
            return loss
        apart = backend.uncompiled(closure)
        if args:
            return self._compiled_update(apart, *args[1:], **kwargs)
        return self._compiled_update(**{**kwargs, "closure": apart})

    def _update(self, *args: Any, **kwargs: Any) -> Any:
        """The step without a closure. Skip empty ones: Dynamo would cache them as doing nothing."""
        if not (has_gradients(self._opt) or is_spread(self._opt)):  # other processes may have gradients
            return self._between_hooks(*args, **kwargs)
        if not self._tracked.options["check_numerics"]:
            return self._compiled_update(*args, **kwargs)
        torch_step = torch_class.of_stock(self._opt, functools.partial(twin, missing_gradients=False))
        result = self._compiled_update(*args, **kwargs)
        report = self._last_compiled()
        if torch_step is not None and report is not None:
            torch_step.compare(report)
        return result

    def _unless_torch_fails(self, compiled: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, until torch fails to compile it before anything of a step has run: from then on `original`.

        Under a dispatch mode it is `original` as well: Dynamo would skip the step's code from then on.
        """
        if isinstance(self._opt, RuleOptimizer):  # what surrounds its core has run
            return compiled

        def step(*args: Any, **kwargs: Any) -> Any:
            if not (self._failed or under_dispatch_mode()):
                try:
                    return compiled(*args, **kwargs)
                except Exception as e:
                    if self._tracked.options["strict"] or not failed_before(original, e):
                        raise
                    said = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
                self._failed = True
                name = type(self._opt).__name__
                warn(f"npu_fused: steps of {name} run eagerly from now on, because torch failed to compile one: {said}")
            return original(*args, **kwargs)

        return step

    def _missed(self) -> None:
        """Handle a step that updated parameters, but not in a compiled graph."""
        self._steps += 1
        name = type(self._opt).__name__
        if self._compiled is not None and not self._warned:
            self._warned = True
            warn(f"npu_fused: a step of {name} ran eagerly: {self._why_no_further(self._compiled)}")
        if self._compiled is None and self._steps >= 2:
            broken = self._broken("TORCH_LOGS=graph_breaks says why")
            why = (hidden(self._opt) or broken.led_by("Dynamo broke or skipped every graph")).advised
            done = f"two steps of {name} ran, both eagerly, and torch handed no update to the backend"
            error = NotCapturedError(f"{done}. {why}")
            if self._by == "compile_step" or self._tracked.options["strict"]:
                raise error
            if not self._warned:
                self._warned = True
                warn(f"npu_fused: nothing was compiled: {error}")

    def _why_no_further(self, last: CompileReport) -> str:
        """Why a step is not compiled though an earlier one was. `last`: the report of that."""
        if last.cause != FIRST.text:
            last_cause = advised(last.cause, last.cause_remedy)
            return f"torch compiles no further variant of it, after one because of this: {last_cause}"
        return self._broken("TORCH_LOGS=graph_breaks,recompiles says why").advised

    def _broken(self, otherwise: str) -> Reason:
        return graph_break(self._breaks.reason() or otherwise, isinstance(self._opt, RuleOptimizer))

    def release(self) -> None:
        """Run the original from now on, with fused=True where it was."""
        self._released = True
        self.fused_option.restore()


def has_gradients(opt: torch.optim.Optimizer) -> bool:
    """True if a parameter of `opt` has a gradient."""
    return any(p.grad is not None for group in opt.param_groups for p in group["params"])


def _skips(opt: torch.optim.Optimizer) -> bool:
    """True if the step of a rule optimizer is to do nothing: its `found_inf` says that gradients are not finite."""
    return isinstance(opt, RuleOptimizer) and opt.found_inf is not None and bool(opt.found_inf)


def is_spread(opt: torch.optim.Optimizer) -> bool:
    """True if a rule optimizer has parameters sharded over processes, which step together."""
    return isinstance(opt, RuleOptimizer) and any(is_dtensor(p) for group in opt.param_groups for p in group["params"])
