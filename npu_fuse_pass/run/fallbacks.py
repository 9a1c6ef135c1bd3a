"""Steps that run as the original: one warning, and an entry in the report."""

from __future__ import annotations

from collections.abc import Iterable

from npu_fuse_pass.errors import GraphRefused, Mismatch, UnfusedError, internal, is_internal
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.logs import trace, warn_unfused
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules.core_op import Stepping
from npu_fuse_pass.run.variants import Variant
from npu_fuse_pass.tensors.memory import lie_apart


def refusal(mismatch: Mismatch, optimizers: Iterable[Stepping]) -> Reason:
    """The reason for a refused step. Where states share memory, it says that eager steps are wrong as well."""
    states = [view for o in optimizers for b in o._prelude.batches for views in b.views.values() for view in views]
    if mismatch.reason.code is Code.SHARED_MEMORY and not lie_apart(states):
        return Code.STATES("states of this optimizer share memory, so that eager steps are wrong as well")
    return mismatch.reason


def refused(report: CompileReport, reason: Reason, strict: bool) -> None:
    """Report a step that runs unfused because of its tensors: one warning for each reason.

    Raises:
        UnfusedError: `strict`; nothing was changed.
    """
    if strict:
        raise UnfusedError(f"strict=True and this step cannot run fused: {reason}")
    if (noted := reason.led_by("at some steps")) not in report.fallbacks:
        report.fallbacks.append(noted)
        warn_unfused([reason])


def falls_back(variant: Variant, refusal: GraphRefused, strict: bool) -> None:
    """Report that the device refused the program, in all of its forms, before it changed anything.

    The original runs from now on.

    Raises:
        UnfusedError: `strict`.
    """
    if strict:
        raise UnfusedError(f"strict=True and this step cannot run fused: {refusal}") from refusal
    _runs_the_original(variant, refusal.reason)


def given_up(variant: Variant, error: Exception, strict: bool) -> bool:
    """Report an internal error of a step; the original makes this step and all later ones.

    Returns:
        False if the error has to be raised: it is not internal, the program may have written something, or `strict`.
    """
    begun = variant.program is not None and variant.program.begun
    if strict or begun or not is_internal(error):
        return False
    _runs_the_original(variant, internal(error))
    return True


def _runs_the_original(variant: Variant, reason: Reason) -> None:
    variant.program = variant.input_check = None
    variant.report.fall_back(reason)
    trace(variant.report)
    warn_unfused([reason])
