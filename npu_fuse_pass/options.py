"""The options of the backend."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from typing import Any

_log = logging.getLogger(__name__)

PLATFORMS = ("auto", "cpu", "npu", "eager")


LAYOUTS = ("auto", "flat", "list")


KERNELS = ("auto", "generated", "operations", "dedicated", "elementwise")


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform that a step runs on, and the form in which. Chosen once for a compile.

    Attributes:
        platform: "cpu", "npu" or "eager" (the original graph).
        form: "program" (called by the compiled step), or what another compiler takes over: "nodes" (fused nodes as they
            are) or "kernel nodes" (fused nodes that run kernels generated for the platform).
    """

    platform: str
    form: str = "program"

    @property
    def matches_first(self) -> bool:
        """True if groups are matched before they are lowered: dedicated operations are chosen by the match.

        Elsewhere a match is text for the report: it is made when that is read, and no compile takes longer for it.
        """
        return self == Target("npu")

    @property
    def specialises(self) -> bool:
        """True if tests of numbers against 0 are decided before lowering, because each costs a sweep over memory.

        In a generated kernel it costs nothing, and one kernel serves all numbers.
        """
        return self == Target("npu")

    def __str__(self) -> str:
        return {"nodes": "graph", "kernel nodes": f"graph {self.platform}"}.get(self.form, self.platform)


def disabled() -> bool:
    """True if NPU_FUSE_DISABLE=1 switches everything off: original steps run, and nothing is compiled or fused."""
    return _is_on("NPU_FUSE_DISABLE")


def _is_on(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        _say_unread(variable, value)
    return value == "1"


@functools.cache
def _say_unread(variable: str, value: str) -> None:
    _log.warning("npu_fused: %s=%s switches nothing on: write %s=1", variable, value, variable)


def _switch(variable: str) -> Any:
    """A bool that an environment variable sets to 1."""
    return dataclasses.field(default_factory=lambda: _is_on(variable))


@dataclasses.dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` may set, with the defaults.

    Attributes:
        platform: "auto" (by the tensors' device), "cpu", "npu" or "eager" (the original graph).
        strict: raise UnfusedError if anything is left unfused.
        kernels: on an NPU: "auto" (generated kernels where the self-test has proved them on this machine, otherwise as
            "operations"), "generated" (wherever they can be compiled and launched), "operations" (GE operations,
            dedicated ones where they are as exact as eager), "dedicated" (the fewest operations; the report says what
            is less exact) or "elementwise".
        check_numerics: run every step fused and as the original, and raise NumericsError at the first difference.
        torchair_config: a torchair.CompilerConfig, which torchair's compiler gets as it is; None is its default.
        layout: how an NPU graph takes a group's tensors: "auto" (flat where they are adjacent in memory), "flat" (the
            same, even where concatenating large gradients takes longer) or "list" (one by one).
        dump: a folder that gets one folder with files for every compile and rank; None: NPU_FUSE_DUMP, or nothing.
        verify: check what every stage of a compile promises, and raise internal errors instead of running unfused
            (otherwise NPU_FUSE_VERIFY=1): for those who report a fault.
    """

    platform: str = "auto"
    strict: bool = False
    kernels: str = "auto"
    check_numerics: bool = _switch("NPU_FUSE_CHECK_NUMERICS")
    torchair_config: Any = None
    layout: str = "auto"
    dump: str | os.PathLike[str] | None = None
    verify: bool = _switch("NPU_FUSE_VERIFY")
