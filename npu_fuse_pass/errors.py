"""Every error that this package raises on purpose, one class each, and what to make of others."""

from __future__ import annotations

import dataclasses
import logging
import os
import traceback

from npu_fuse_pass.reasons import Code, Reason


class FuseError(Exception):
    """Base of all errors of npu_fuse_pass."""


class RuleError(FuseError, ValueError):
    """An update rule is declared or written in a way that cannot work; the message says what to write instead."""


class OptionError(FuseError, ValueError):
    """An option has an unknown name or a value outside what is allowed."""


class UnfusedError(FuseError, RuntimeError):
    """Something was left unfused, under `strict=True` or for `raise_if_unfused()`; the message lists all of it."""


class NotCapturedError(FuseError, RuntimeError):
    """torch hands nothing of this optimizer's step to a backend; the message says why and what to do instead."""


class _ReasonedError(FuseError):
    """An error with a reason as a value, of the class's code unless another one is given."""

    _code: Code

    def __init__(self, text: str, code: Code | None = None, remedy: str | None = None) -> None:
        super().__init__(text)
        self.reason = (code or self._code)(text, remedy=remedy)


class PlatformError(_ReasonedError, RuntimeError):
    """The platform that was asked for cannot be used here; the message names what to install.

    Attributes:
        reason: the same as a value.
    """

    _code = Code.PLATFORM


class GradientError(FuseError, RuntimeError):
    """A gradient is of a kind that no update rule takes (sparse, complex, another shape or device)."""


class StepFailedError(FuseError, RuntimeError):
    """A step failed on the device after it may have begun to write: parameters and states may be partly updated."""


class NumericsError(FuseError, RuntimeError):
    """`check_numerics` found a fused update that differs from the original's; tensors hold the original's values.

    Attributes:
        group: the group's name, as in reports and profiles.
        parameter: the parameter's name or place in the optimizer, and its shape.
        tensor: what of the update differs ("param", "exp_avg", ...).
        error: the largest relative error of an element.
        step: how many steps had been checked, this one included.
    """

    def __init__(self, text: str, group: str, parameter: str, tensor: str, error: float, step: int) -> None:
        super().__init__(text)
        self.group = group
        self.parameter = parameter
        self.tensor = tensor
        self.error = error
        self.step = step


class GraphRefused(_ReasonedError):  # noqa: N818 - raised by a lowering for its caller, not for the user
    """The device's graph compiler refused a step's graph, or its first run failed; nothing was changed."""

    _code = Code.GE_REFUSED


class Mismatch(_ReasonedError):  # noqa: N818 - raised by kernels for their caller, not for the user
    """The tensors of this call are not what the kernels were made for; nothing was changed."""

    _code = Code.CHANGED


class Declined(Mismatch):
    """Another process, which holds parts of the same tensors, does not run this step; nothing was changed."""

    _code = Code.SHARDED


class Unsupported(FuseError):  # noqa: N818 - a value that stages pass on, not an accident
    """This part of a graph cannot become part of a fused kernel. Carried into the report, never to the user."""

    def __init__(self, op: str, text: str, code: Code, remedy: str | None = None) -> None:
        super().__init__(f"{op}: {text}")
        self.reason = code(text, op, remedy)

    @classmethod
    def of(cls, reason: Reason) -> Unsupported:
        """The error that carries this reason."""
        error = cls(reason.op, reason.text, reason.code)
        error.reason = reason
        return error

    def at(self, node: str | None, source: str | None) -> Unsupported:
        """Itself, with the place in the graph and in the source; the first that is told counts."""
        if self.reason.node is None and self.reason.source is None:
            self.reason = dataclasses.replace(self.reason, node=node, source=source)
        return self


_FOR_THIS_PACKAGE = (GraphRefused, Mismatch, Unsupported)  # internal: one that reaches this point is a fault, too
_HERE = os.path.dirname(__file__) + os.sep
_log = logging.getLogger("npu_fuse_pass")


def is_internal(error: Exception) -> bool:
    """True if this package raised the error, or a C function that it called: it is a fault, and not for users.

    What users' code raises while a step runs (a rule, a signal's handler) is theirs.
    """
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(files) and files[-1].startswith(_HERE) and not is_for_users(error)


def internal(error: Exception) -> Reason:
    """The reason for what an internal error leaves unfused."""
    _log.debug("internal error", exc_info=error)
    first = next(iter(str(error).splitlines()), "")
    return Code.INTERNAL(f"internal error: {type(error).__name__}: {first}")


def is_for_users(error: Exception) -> bool:
    """True if the error is one of this package's that users are to see."""
    return isinstance(error, FuseError) and not isinstance(error, _FOR_THIS_PACKAGE)
