"""The time of a captured step beside that of the eager one: where it takes longer, that is said.

Guards, and memory that is gone over once for each piece where Dynamo captures a step in pieces, may take longer than
kernels save. Which form runs from then on is left to the user: the bits of a training would depend on a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from npu_fuse_pass import backend
from npu_fuse_pass.user_warnings import warn

FIRST, COMPILED, EAGER = 10, 5, 3
"""Compiled steps that are not timed, those that are, and the eager steps that follow them."""
ALL = FIRST + COMPILED + EAGER
RATIO, MORE = 1.2, 1e-3
"""A step is slower that takes so many times as long, and so many seconds longer."""

clock = time.perf_counter


def beside_eager(
    opt: torch.optim.Optimizer, step: Callable[..., Any], compiled: Callable[..., Any], tracked: backend.TrackedBackend
) -> Callable[..., Any]:
    """Wrap `compiled`: a few of its steps are timed, and as many of `step`; a report says if it is the slower one.

    Only on CPUs, where a call ends when its work is done, and without a closure, which runs a model.
    """
    times: list[float] = []
    ran = list(tracked.ran)

    def run(*args: Any, **kwargs: Any) -> Any:
        eagerly = len(times) >= ALL - EAGER
        if args or kwargs or len(times) == ALL or not (eagerly or _may_be_timed(opt, tracked)):
            return compiled(*args, **kwargs)
        begin = clock()
        result = (step if eagerly else compiled)()
        seconds = clock() - begin
        if eagerly:
            tracked.ran += ran  # no step that was missed
        if tracked.ran:
            times.append(seconds)
            ran[:] = tracked.ran
        if len(times) == ALL:
            _say(opt, min(times[FIRST:-EAGER]), min(times[-EAGER:]), tracked)  # others may have compiled
        return result

    return run


def _may_be_timed(opt: torch.optim.Optimizer, tracked: backend.TrackedBackend) -> bool:
    params = (p for group in opt.param_groups for p in group["params"])
    return not tracked.options["check_numerics"] and all(p.device.type == "cpu" for p in params)


def _say(opt: torch.optim.Optimizer, compiled: float, eager: float, tracked: backend.TrackedBackend) -> None:
    if compiled < RATIO * eager or compiled < eager + MORE:
        return
    took = f"a step takes {1e3 * compiled:.1f} ms compiled and {1e3 * eager:.1f} ms eagerly"
    for report in tracked.ran:
        report.slower = took
    warn(
        f"npu_fused: {type(opt).__name__} is faster uncompiled: {took} (the fastest of {COMPILED} and {EAGER}). "
        "npu_fuse_pass.explain(opt) says what of it is not fused; npu_fuse_pass.rule captures all of a step"
    )
