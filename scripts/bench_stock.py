"""torch.optim's own classes under `compile_step`, beside ours of the same algorithm: the first call and later steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_cases import Step
from bench_measure import cold_kernels, timed

import npu_fuse_pass
import optimizers
from npu_fuse_pass.algorithms.adadelta import adadelta
from npu_fuse_pass.algorithms.adagrad import adagrad
from npu_fuse_pass.algorithms.adamax import adamax
from npu_fuse_pass.algorithms.radam import radam
from npu_fuse_pass.algorithms.rmsprop import rmsprop
from npu_fuse_pass.algorithms.rprop import rprop
from npu_fuse_pass.lowerings.cpu import input_check


def _sgd(params: Any, lr: float) -> Any:
    return optimizers.NpuFusedSGD(params, lr=lr, momentum=0.9)


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "Adam": (optimizers.NpuFusedAdam, torch.optim.Adam, dict(lr=1e-3)),
    "AdamW": (optimizers.NpuFusedAdamW, torch.optim.AdamW, dict(lr=1e-3)),
    "SGD momentum": (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.9)),
    "RMSprop": (rmsprop, torch.optim.RMSprop, dict(lr=1e-3, momentum=0.9)),
    "Adagrad": (adagrad, torch.optim.Adagrad, dict(lr=1e-2)),
    "Adadelta": (adadelta, torch.optim.Adadelta, dict(lr=1.0)),
    "Adamax": (adamax, torch.optim.Adamax, dict(lr=1e-3)),
    "RAdam": (radam, torch.optim.RAdam, dict(lr=1e-3)),
    "Rprop": (lambda p, lr: rprop(p), torch.optim.Rprop, dict(lr=1e-3)),
    # no optimizer of ours can have their rules: beside them is one that moves as many bytes
    "NAdam (beside NpuFusedAdam)": (optimizers.NpuFusedAdam, torch.optim.NAdam, dict(lr=1e-3)),
    "ASGD (beside NpuFusedSGD, momentum)": (_sgd, torch.optim.ASGD, dict(lr=1e-2)),
}
SOME = list(PAIRS)[:3]  # also on fewer and larger tensors
FIRST_AT_MOST, STEP_AT_MOST = 2.0, 1.1
"""Times of ours that a class of torch's may take."""
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
        with cold_kernels(look=False):
            first[label] = timed(step)
    input_check.wait()
    times: dict[str, list[float]] = {label: [] for label in made}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < WARM + SHORTEST or time.perf_counter() < end:
        k = len(times["ours"])
        for label in ("ours", "stock") if k % 2 else ("stock", "ours"):
            params, opt, step = made[label]
            opt.param_groups[0]["lr"] = options["lr"] / (1 + k)
            _fresh(params)
            times[label].append(timed(step))
    later = {label: values[WARM:] for label, values in times.items()}
    ratio = statistics.median(b / a for a, b in zip(later["ours"], later["stock"], strict=True))
    return {
        "optimizer": f"{name}, {count} x {'x'.join(map(str, shape))}",
        "first call": first,
        "step": {label: statistics.median(values) for label, values in later.items()},
        "ratio": ratio,
    }


def stock_pairs(seconds: float, only: str = "") -> list[dict[str, Any]]:
    """All pairs on 1000 tensors of 1024, some on 100 of 256 x 256 and on 1000 of 16384, as large models have."""
    input_check.wait()
    cells: list[tuple[str, tuple[int, ...], int]] = [(name, (1024,), 1000) for name in PAIRS]
    cells += [(name, shape, count) for shape, count in (((256, 256), 100), ((16384,), 1000)) for name in SOME]
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
