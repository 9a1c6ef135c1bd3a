"""`explain`: what the pass would do with an optimizer, tried on a copy."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass import backend
from npu_fuse_pass.errors import FuseError
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.causes import graph_break
from npu_fuse_pass.report.logs import switched_off
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules.hidden import hidden
from npu_fuse_pass.rules.hooks import silenced
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.tools.compile_step import has_gradients
from npu_fuse_pass.tools.plain_step import check_optimizer
from npu_fuse_pass.tools.roads import road
from npu_fuse_pass.tools.twin import twin as _twin

_STEPS, _MOST_STEPS = 4, 6


def explain(opt: torch.optim.Optimizer, **options: Any) -> CompileReport:
    """Compile and run steps of a copy of `opt`, and return the report of the last one.

    There are four steps, and up to six where the fourth is compiled anew: by then torch has made changing numbers
    symbolic, and what is still compiled will be at every step (`RECOMPILES` in the report).

    Values, states and gradients of `opt` do not change, and no hooks are called. Parameters that require a
    gradient and have none get one of zeros, on the copy. Needs memory for one more copy of parameters and states.

    Args:
        opt: any torch.optim.Optimizer.
        options: those of the backend, which `npu_fused` lists.

    Returns:
        The report. Where torch never shows the step to a backend, its `reasons` say why, and what to do.

    Raises:
        TypeError: `opt` is no torch.optim.Optimizer.
        OptionError: an unknown option or value.
        UnfusedError: `strict`, and something of what reaches the backend is left unfused.
        NumericsError: `check_numerics`, and a fused update of the copy differs from the original's.
        FuseError: a step of the copy fails; the message says why.
    """
    check_optimizer(opt, "explain")
    return try_on_copy(opt, options).report


@dataclasses.dataclass(frozen=True)
class Trial:
    """The outcome of compiled steps of a copy; `step` does another one, if the copy could be compiled."""

    report: CompileReport
    step: Callable[[], Any] | None = None


def try_on_copy(opt: torch.optim.Optimizer, options: dict[str, Any]) -> Trial:
    """`explain`, with the copy's compiled step."""
    tracked = backend.TrackedBackend(options)
    reason = why_nothing_is_compiled() or hidden(opt)
    if reason is not None:
        return Trial(CompileReport(tracked.options["platform"], fallbacks=[reason]))
    twin, breaks = _twin(opt), backend.NewBreaks()
    step = road(twin, twin.step, tracked)
    try:
        with warnings.catch_warnings(), silenced():
            warnings.filterwarnings("ignore", message="npu_fused")  # the report says it
            anew = _steps(step, tracked)
    except Exception as e:
        own = backend.own_error(e)
        if own is e:
            raise
        name = type(opt).__name__
        raise own or FuseError(f"explain cannot run a step of {name}: {type(e).__name__}: {e}") from e
    if not breaks.leave_an_update(tracked.ran):
        missed = Code.NOT_CAPTURED("no parameter requires a gradient", remedy="give it parameters that do")
        if has_gradients(twin):
            why = breaks.reason() or "Dynamo skips it (TORCH_LOGS=graph_breaks says why)"
            missed = graph_break(why, isinstance(twin, RuleOptimizer))
        missed = missed.led_by("no update reached the backend")
        return Trial(CompileReport(tracked.options["platform"], fallbacks=[missed]))
    report = _joined(tracked.ran)
    if anew:
        text = f"every step is compiled anew, until torch stops: {report.cause}"
        report = dataclasses.replace(
            report, fallbacks=[*report.fallbacks, Code.RECOMPILES(text, remedy=report.cause_remedy)]
        )
    return Trial(report, step)


def why_nothing_is_compiled() -> Reason | None:
    """What switches this package or torch.compile off, if something does."""
    if switched_off():
        return Code.DISABLED("NPU_FUSE_DISABLE=1 is set")
    if not backend.compiling():
        how = "TORCHDYNAMO_DISABLE=1, TORCH_COMPILE_DISABLE=1, torch.compiler.set_stance or a TorchDispatchMode"
        return Code.NOT_CAPTURED(f"torch.compile is switched off by {how}", remedy="leave it out")
    return None


def _steps(step: Callable[[], Any], tracked: backend.TrackedBackend) -> bool:
    """Make steps until one does not compile. Returns True if the last one still compiled."""
    seen: list[CompileReport] = []
    for i in range(_MOST_STEPS):
        tracked.ran.clear()
        step()
        anew = any(all(report is not s for s in seen) for report in tracked.ran)
        if i + 1 >= _STEPS and not anew:
            break
        seen += tracked.ran
    return anew


def _joined(reports: list[CompileReport]) -> CompileReport:
    """Join the reports of a step that torch broke into several graphs."""
    if len(reports) == 1:
        return reports[0]
    return dataclasses.replace(
        reports[0],
        groups=[g for r in reports for g in r.groups],
        unfused=[u for r in reports for u in r.unfused],
        fallbacks=list(dict.fromkeys(reason for r in reports for reason in r.fallbacks)),
    )
