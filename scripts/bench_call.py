"""Where the time of a compiled call goes beside its kernels, for scripts/bench.py: microseconds for each parameter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from bench_measure import fresh_gradients

import optimizers
from npu_fuse_pass.lowerings import cpu, cpu_kernel
from npu_fuse_pass.prelude import Prelude

_STEPS = 100
_LOOK = "look: gradients, whether all tensors are as they were, addresses"
_PRELUDE = "prelude: parameter groups, hyperparameters"
# Parts of a call: what it is, and the function that does it. The look is a part of the prelude.
_PARTS: dict[str, tuple[Any, str]] = {
    _LOOK: (cpu.Program, "same"),
    _PRELUDE: (Prelude, "prepare"),
    "memory that is written and shared": (cpu.Program, "_check_memory"),
    "kernels": (cpu_kernel.Kernel, "call"),
    "version counters for autograd": (cpu_kernel.Kernel, "write"),
}


def call_cost(n: int) -> dict[str, float]:
    """Median microseconds for each parameter of a step of NpuFusedAdam on `n` tensors of 1024, by part; "all" too."""
    params = [torch.nn.Parameter(torch.randn(1024)) for _ in range(n)]
    gradients = [torch.randn_like(p) for p in params]
    step = torch.compile(optimizers.NpuFusedAdam(params).step, backend="npu_fused")
    times: dict[str, list[float]] = {}
    with _timed(times):
        for _ in range(_STEPS):
            fresh_gradients(params, gradients)
            start = time.perf_counter()
            step()
            times.setdefault("all", []).append(time.perf_counter() - start)
    medians = {name: 1e6 * statistics.median(t[3:]) / n for name, t in times.items()}
    medians[_PRELUDE] -= medians[_LOOK]
    return {name: medians[name] for name in (*_PARTS, "all")}


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
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    return timed
