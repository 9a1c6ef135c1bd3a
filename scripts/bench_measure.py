"""How scripts/bench.py measures: medians of interleaved steps, bandwidth, cost of the stages, extra memory."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_cases import Params, Step
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.lowerings import cpu_build, cpu_look

_BANDWIDTH_ELEMENTS = 64 * 1024 * 1024


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": list(os.getloadavg()),
    }


def bandwidth() -> float:
    """GB/s that an in-place multiply of one large float32 tensor reads and writes, the median of some."""
    x = torch.ones(_BANDWIDTH_ELEMENTS)
    middle = statistics.median(_timed(lambda: x.mul_(1.0001)) for _ in range(12))
    return 2 * 4 * _BANDWIDTH_ELEMENTS / middle / 1e9


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fresh_gradients(params: Params, gradients: list[Tensor]) -> None:
    """New tensors, as a backward pass leaves them; their making is not part of a step's time."""
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


def medians(contestants: dict[str, tuple[Params, Step]], seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step and of the first call for every contestant; steps take turns, so that noise meets all alike."""
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    params = next(iter(contestants.values()))[0]
    gradients = [torch.randn_like(p) * 0.01 for p in params]
    for name, (own, step) in contestants.items():
        fresh_gradients(own, gradients)
        first[name] = _timed(step)
        for _ in range(2):
            fresh_gradients(own, gradients)
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, (own, step) in contestants.items():
            fresh_gradients(own, gradients)
            times[name].append(_timed(step))
    return {name: statistics.median(t) for name, t in times.items()}, first


@contextmanager
def cold_kernels() -> Iterator[None]:
    """No kernel on disk or loaded, so that C++ is compiled; the library for `cpu_look` too, in the background."""
    cpu_build._loaded.clear()
    cpu_look.forget()
    before = os.environ.get("NPU_FUSE_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NPU_FUSE_CACHE_DIR"] = folder
        try:
            yield
        finally:
            cpu_look.wait()  # it may be compiling into this folder
            os.environ.pop("NPU_FUSE_CACHE_DIR")
            if before is not None:
                os.environ["NPU_FUSE_CACHE_DIR"] = before


def compile_cost(make: Callable[[Params], Any], n: int) -> dict[str, float]:
    """Seconds of the first compiled call with a cold kernel cache, and of our stages in it; then with a warm one."""
    found: dict[str, float] = {}
    for state in ("cold", "warm"):
        torch._dynamo.reset()
        npu_fuse_pass.clear_reports()
        params = [torch.nn.Parameter(torch.randn(16)) for _ in range(n)]
        for p in params:
            p.grad = torch.randn_like(p)
        step = torch.compile(make(params).step, backend="npu_fused")
        if state == "cold":
            with cold_kernels():
                found["first call, cold"] = _timed(step)
        else:
            found["first call, warm"] = _timed(step)
        stages = npu_fuse_pass.reports()[-1].seconds
        found |= {f"{name}, {state}": seconds for name, seconds in stages.items()}
        found[f"our stages, {state}"] = sum(stages.values())
    return found


def inductor_cost(n: int) -> float:
    """Seconds of the first call of stock foreach Adam compiled by Inductor, without its caches."""
    from torch._inductor import config

    torch._dynamo.reset()
    params = [torch.nn.Parameter(torch.randn(16)) for _ in range(n)]
    fresh_gradients(params, [torch.randn_like(p) for p in params])
    with config.patch(force_disable_caches=True):
        return _timed(torch.compile(torch.optim.Adam(params, foreach=True).step, backend="inductor"))


def extra_memory(params: Params, step: Step) -> float:
    """Peak bytes that a step allocates beyond what lives before it, as a share of the parameters' bytes."""
    from torch.profiler import ProfilerActivity, profile

    fresh_gradients(params, [torch.randn_like(p) for p in params])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / sum(p.numel() * p.element_size() for p in params)
