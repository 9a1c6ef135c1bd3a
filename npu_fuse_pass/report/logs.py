"""Messages of a compile: a log line per stage, one warning for a fallback, recompiles, torch's trace log."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from npu_fuse_pass.options import disabled
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.reasons import Reason, advised
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.user_warnings import warn

log = logging.getLogger("npu_fuse_pass")


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[list[str]]:
    """Time a stage into `seconds`; entries of the yielded list are logged as its result."""
    start = time.perf_counter()
    result: list[str] = []
    try:
        yield result
    finally:
        seconds[stage] = time.perf_counter() - start
        log.debug("%s: %.3f s: %s", stage, seconds[stage], "; ".join(result) or "stopped")


def announce(report: CompileReport) -> None:
    """Log a finished compile: its cause if it is not the first, the report, and an entry in torch's trace log."""
    if report.cause != "compile":
        level = logging.WARNING if report.cause_remedy else logging.INFO
        log.log(level, "npu_fused compiled again: %s", advised(report.cause, report.cause_remedy))
    log.info("%s", report)
    trace(report)


def trace(report: CompileReport) -> None:
    """Write the report and the fused graph to torch's trace log for tlparse; no cost unless TORCH_TRACE is set."""
    torch_logging = find("torch._logging._internal")
    if torch_logging is None or torch_logging.LOG_TRACE_HANDLER not in torch_logging.trace_log.handlers:
        return  # torch's handler removes itself where no folder is set; other handlers are not this package's
    artifacts = {
        "npu_fuse_pass_report": ("json", lambda: json.dumps(report.to_json())),
        "npu_fuse_pass_table": ("string", lambda: str(report)),
        "npu_fuse_pass_fused_graph": ("string", lambda: _graph_text(report)),
    }
    for name, (encoding, text) in artifacts.items():
        torch_logging.trace_structured(
            "artifact",
            metadata_fn=lambda name=name, encoding=encoding: {"name": name, "encoding": encoding},
            payload_fn=text,
            expect_trace_id=False,  # a rule optimizer plans anew outside of Dynamo's compiles
        )


def _graph_text(report: CompileReport) -> str:
    graph = report.fused_graph
    return "" if graph is None else graph.print_readable(print_output=False)


def warn_unfused(reasons: Sequence[Reason], interpreted: bool = False) -> None:
    """Warn once that a compile, or a kind of step, runs unfused: why, and what to do."""
    runs = "" if interpreted else ", the original step runs"  # the reason itself says what is interpreted
    warn(f"npu_fused: not fused{runs}: {'; '.join(reason.advised for reason in reasons)}")


def switched_off() -> bool:
    """True if NPU_FUSE_DISABLE=1 switches everything off; logs that once."""
    if disabled():
        _say_disabled()
    return disabled()


@functools.cache
def _say_disabled() -> None:
    log.warning("npu_fused: NPU_FUSE_DISABLE=1 switches everything off: the original steps run")
