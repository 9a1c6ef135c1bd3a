"""Where the time of a compiled call goes beside its kernels, for scripts/bench.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from bench_cases import Family, Step, Workload, parameters
from bench_measure import fresh_gradients

from npu_fuse_pass.lowerings.cpu import kernel as cpu_kernel
from npu_fuse_pass.lowerings.cpu import program as cpu
from npu_fuse_pass.rules.prelude import Prelude

_STEPS = 100
_LOOK = "look: gradients, whether all tensors are as they were, addresses"
_PRELUDE = "prelude: parameter groups, hyperparameters"
_REST = "the rest: Dynamo's wrapper and guards, Python code that is no longer in a cache"
# Parts of a call: what it is, and the function that does it. The first is a part of the second; stock steps lack both.
_PARTS: dict[str, tuple[Any, str]] = {
    _LOOK: (cpu.Program, "same"),
    _PRELUDE: (Prelude, "prepare"),
    "the look at a stock step's tensors, their addresses": (cpu_kernel.Kernel, "bind"),
    "memory that is written and shared": (cpu.Program, "_check_memory"),
    "kernels": (cpu_kernel.Kernel, "call"),
    "version counters for autograd": (cpu_kernel.Kernel, "write"),
}


def call_cost(family: Family, workload: Workload) -> dict[str, float]:
    """Median microseconds of a step: its parts, the rest, all."""
    params = parameters(workload)
    gradients = [torch.randn_like(p) for p in params]
    step: Step = torch.compile(family.ours(params).step, backend="npu_fused")
    times: dict[str, list[float]] = {name: [] for name in _PARTS}
    with _timed(times):
        for _ in range(_STEPS):
            fresh_gradients(params, gradients)
            start = time.perf_counter()
            step()
            times.setdefault("all", []).append(time.perf_counter() - start)
    medians = {name: 1e6 * statistics.median(t[3:] or [0.0]) for name, t in times.items()}
    medians[_PRELUDE] -= medians[_LOOK]
    rest = medians["all"] - sum(medians[name] for name in _PARTS)
    return {**{name: medians[name] for name in _PARTS}, _REST: rest, "all": medians["all"]}


@contextmanager
def _timed(times: dict[str, list[float]]) -> Iterator[None]:
    patches = [mock.patch.object(*place, _noting(getattr(*place), times, name)) for name, place in _PARTS.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _noting(function: Callable[..., Any], times: dict[str, list[float]], name: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times[name].append(time.perf_counter() - start)
        return result

    return timed
