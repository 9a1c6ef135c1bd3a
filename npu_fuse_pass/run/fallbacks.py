"""A step that runs as the original: said once, and in the report."""

from __future__ import annotations

from npu_fuse_pass.errors import GraphRefused, UnfusedError
from npu_fuse_pass.reasons import Reason
from npu_fuse_pass.report.logs import trace, warn_unfused
from npu_fuse_pass.report.report import CompileReport


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
