"""The two ways to compile a step: torch.optim classes as update rules where that is proved, others by Dynamo.

All entry points make the compiled step of an optimizer here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass import backend
from npu_fuse_pass.private_torch import storage_key
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.rules.hidden import hidden_class
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.rules.tracing import calling
from npu_fuse_pass.stock.binding import Binding
from npu_fuse_pass.stock.classes import stock_class
from npu_fuse_pass.stock.prelude import Refused
from npu_fuse_pass.tools.first_step import first_eagerly
from npu_fuse_pass.tools.not_begun import is_dynamos
from npu_fuse_pass.tools.pace import beside_eager


def road(
    opt: torch.optim.Optimizer, step: Callable[..., Any], tracked: backend.TrackedBackend, foreach: bool = False
) -> Callable[..., Any]:
    """The function that makes the updates of a step.

    Args:
        opt: the optimizer.
        step: the class's method as torch wraps it, with its arguments; hooks run around the result.
        tracked: the backend, which sees all compiles.
        foreach: Dynamo captures the foreach form of a torch.optim class where neither was asked for.
    """
    known = stock_class(opt, step)
    if isinstance(known, Reason):
        return captured(opt, step, tracked, known, foreach)
    return StockRoad(Binding(opt, known), step, tracked, foreach)


def captured(
    opt: torch.optim.Optimizer,
    step: Callable[..., Any],
    tracked: backend.TrackedBackend,
    reason: Reason | None = None,
    foreach: bool = False,
) -> Callable[..., Any]:
    """A step that Dynamo captures. `reason`: why it is not run as a rule, for the report."""
    if isinstance(opt, RuleOptimizer) and getattr(step, "__func__", None) is RuleOptimizer.step:
        return functools.partial(opt._step_with, backend.rule_core(tracked, f"{type(opt).__name__}.step"))
    replaced = Code.NO_RULE(f"another function has taken the place of this {type(opt).__name__}'s step")
    tracked.no_rule = None if isinstance(opt, RuleOptimizer) else reason or replaced
    compiled = {False: backend.isolated(step, tracked)}
    if backend.isolates():  # otherwise another optimizer may run these graphs
        weakref.finalize(opt, tracked.release).atexit = False
    if hidden_class(opt) is not None:
        return step
    of_rules = isinstance(opt, RuleOptimizer)  # its numbers are no part of the graph
    changing: set[str] = set()
    in_form = _Form(opt, tracked, foreach)

    def run(*args: Any, **kwargs: Any) -> Any:
        # by themselves: at its limit of compiles Dynamo runs what it has compiled for a closure without one
        with_closure = any(map(callable, (*args, *kwargs.values())))
        if with_closure not in compiled:
            compiled[with_closure] = backend.isolated(step, tracked)
        with calling(tracked, changing, reads=not of_rules):
            return in_form(functools.partial(compiled[with_closure], *args, **kwargs))

    return run if of_rules else beside_eager(opt, step, first_eagerly(opt, step, run, changing), tracked)


class _Form:
    """Runs steps, and lets Adam take its foreach form in them where neither was asked for, if `foreach`.

    Its for-loop form, while it is compiled, divides by lr: at 0 that is NaN where the captured step runs unfused. Torch
    fails on the foreach form where it compiles only what the step calls, as it does once a step with fused=True was
    compiled: then the form stays torch's choice.
    """

    def __init__(self, opt: torch.optim.Optimizer, tracked: backend.TrackedBackend, foreach: bool) -> None:
        self._opt, self._tracked, self._foreach = opt, tracked, foreach

    def __call__(self, step: Callable[[], Any]) -> Any:
        groups = [g for g in self._opt.param_groups if _may_be_foreach(g)] if self._foreach else []
        for group in groups:
            group["foreach"] = True
        try:
            return step()
        except Exception as e:
            begun = self._tracked.ran or len(groups) < len(self._opt.param_groups)  # another form may have run
            if begun or not is_dynamos(e):
                raise
            self._foreach = False
        finally:
            for group in groups:
                group["foreach"] = None
        return step()


def _may_be_foreach(group: dict[str, Any]) -> bool:
    """True if a group of torch's Adam leaves its form open and the foreach form supports its settings and dtype."""
    params = group["params"]
    if group.get("foreach", False) is not None or group.get("fused") or group.get("differentiable"):
        return False
    # it updates all before it writes any, and rounds elsewhere in half precision
    apart = len({storage_key(p.untyped_storage()) for p in params}) == len(params)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in params)
    return apart and not half and not isinstance(group.get("lr"), torch.Tensor)


class StockRoad:
    """The updates of an optimizer of torch.optim, by its rule as long as that applies."""

    def __init__(
        self, binding: Binding, step: Callable[..., Any], tracked: backend.TrackedBackend, foreach: bool
    ) -> None:
        self._binding, self._step, self._tracked, self._foreach = binding, step, tracked, foreach
        binding.core = backend.rule_core(tracked, f"{type(binding.optimizer).__name__}.step")
        self._captured: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            reason: Reason | None = Code.NO_RULE("its step has arguments that a rule does not have")
        else:
            reason = self._binding.why_not()
        if reason is None:
            try:
                return self._binding.update()
            except Refused as e:
                reason = e.reason
        if self._captured is None:
            self._captured = captured(self._binding.optimizer, self._step, self._tracked, reason, self._foreach)
        self._tracked.no_rule = reason
        return self._captured(*args, **kwargs)
