"""A step that runs as the original: said once, and in the report."""

from __future__ import annotations

from collections.abc import Iterable

from npu_fuse_pass.errors import GraphRefused, Mismatch, UnfusedError
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.logs import trace, warn_unfused
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules.batch import Batch
from npu_fuse_pass.rules.core_op import Stepping
from npu_fuse_pass.tensors.memory import check_apart


def refusal(mismatch: Mismatch, optimizers: Iterable[Stepping]) -> Reason:
    """Why a step is refused. Where states share memory, eager steps are as wrong, and that has to be said."""
    batches = [b for o in optimizers for b in o._prelude.batches]
    if mismatch.reason.code is Code.SHARED_MEMORY and not _states_apart(batches):
        return Code.STATES("states of this optimizer share memory, so that eager steps are wrong as well")
    return mismatch.reason


def _states_apart(batches: Iterable[Batch]) -> bool:
    """Whether every state of these batches has memory of its own."""
    try:
        check_apart([view for b in batches for views in b.views.values() for view in views], [])
    except Mismatch:
        return False
    return True


def refused(report: CompileReport, reason: Reason, strict: bool) -> None:
    """A step that runs unfused because of its tensors: said once for each reason, and in the report.

    Raises:
        UnfusedError: `strict`; nothing was changed.
    """
    if strict:
        raise UnfusedError(f"strict=True and this step cannot run fused: {reason}")
    if (noted := reason.led_by("at some steps")) not in report.fallbacks:
        report.fallbacks.append(noted)
        warn_unfused([reason])


def falls_back(report: CompileReport, refusal: GraphRefused, strict: bool) -> None:
    """The device refused the program before it changed anything: said once; the original runs from now on.

    An NPU program has been tried in all of its forms by then.

    Raises:
        UnfusedError: `strict`.
    """
    if strict:
        raise UnfusedError(f"strict=True and this step cannot run fused: {refusal}") from refusal
    report.fall_back(refusal.reason)
    trace(report)
    warn_unfused([refusal.reason])
