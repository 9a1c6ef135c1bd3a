"""torch.optim's own classes under `compile_step`, beside ours of the same algorithm: the first call and later steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_measure import cold_kernels

import npu_fuse_pass
import optimizers
from npu_fuse_pass.lowerings.cpu import native_look

Step = Callable[[], Any]
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "Adam": (optimizers.NpuFusedAdam, torch.optim.Adam, dict(lr=1e-3)),
    "AdamW": (optimizers.NpuFusedAdamW, torch.optim.AdamW, dict(lr=1e-3)),
    "SGD momentum": (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.9)),
}
WARM, SHORTEST = 8, 40  # rounds before the timed ones, and how many of these there are at least


def stock_cost(name: str, shape: tuple[int, ...], count: int, seconds: float) -> dict[str, Any]:
    """Both contestants in turns, on fresh gradients, with another lr at every step.

    Returns:
        "first call": seconds of each with an empty kernel cache; "step": their medians; "ratio": stock's time over
        ours, the median over rounds.
    """
    ours, stock, options = PAIRS[name]
    made = {label: _made(make, shape, count, options) for label, make in (("ours", ours), ("stock", stock))}
    first = {}
    for label, (params, _, step) in made.items():
        torch._dynamo.reset()
        _fresh(params)
        with cold_kernels():
            first[label] = _timed(step)
    native_look.wait()
    times: dict[str, list[float]] = {label: [] for label in made}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < WARM + SHORTEST or time.perf_counter() < end:
        k = len(times["ours"])
        for label in ("ours", "stock") if k % 2 else ("stock", "ours"):
            params, opt, step = made[label]
            opt.param_groups[0]["lr"] = options["lr"] / (1 + k)
            _fresh(params)
            times[label].append(_timed(step))
    timed = {label: values[WARM:] for label, values in times.items()}
    ratio = statistics.median(b / a for a, b in zip(timed["ours"], timed["stock"], strict=True))
    return {
        "optimizer": f"{name}, {count} x {'x'.join(map(str, shape))}",
        "first call": first,
        "step": {label: statistics.median(values) for label, values in timed.items()},
        "ratio": ratio,
    }


def stock_pairs(seconds: float, only: str = "") -> list[dict[str, Any]]:
    """All pairs on 1000 tensors of 1024 and on 100 of 256 x 256."""
    cells = [(name, *sizes) for sizes in (((1024,), 1000), ((256, 256), 100)) for name in PAIRS]
    return [stock_cost(name, shape, count, seconds) for name, shape, count in cells if only.lower() in name.lower()]


def _made(
    make: Callable[..., Any], shape: tuple[int, ...], count: int, options: dict[str, Any]
) -> tuple[Any, Any, Step]:
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]
    opt = make(params, **options)
    return params, opt, npu_fuse_pass.compile_step(opt)


def _fresh(params: Sequence[torch.nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
