"""Times of whole steps on a device: this package's, torch_npu.optim's and torch.optim's forms, interleaved."""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.tools.compile_step import compile_step
from npu_fuse_pass.tools.selftest.private import first_line

StepCall = Callable[[], Any]
Make = Callable[[Sequence[Tensor]], tuple[Any, StepCall]]
"""Parameters -> an optimizer, and its step."""

WORKLOADS: dict[str, list[tuple[int, ...]]] = {
    "1000 x 1024": [(1024,)] * 1000,
    "100 x 256x256": [(256, 256)] * 100,
    "8 x 2048x2048": [(2048, 2048)] * 8,
}
QUICK_WORKLOADS: dict[str, list[tuple[int, ...]]] = {"20 x 1024": [(1024,)] * 20, "8 x 256x256": [(256, 256)] * 8}
_WARMUP = 3
_ROUNDS = 30
_QUICK_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Family:
    """One algorithm: this package's class, torch_npu's of the same name, and torch's, with one set of options."""

    name: str
    ours: str
    stock: str | None
    options: dict[str, Any]


FAMILIES = [
    Family("Adam", "NpuFusedAdam", "Adam", dict(lr=1e-3)),
    Family("AdamW", "NpuFusedAdamW", "AdamW", dict(lr=1e-3)),
    Family("SGD, momentum", "NpuFusedSGD", "SGD", dict(lr=1e-2, momentum=0.9)),
    Family("RMSpropTF, momentum", "NpuFusedRMSpropTF", None, dict(lr=1e-3, momentum=0.9)),
    Family("LAMB", "NpuFusedLamb", None, dict(lr=1e-3)),
]
_QUICK_FAMILIES = ("Adam", "SGD, momentum")


@dataclasses.dataclass
class Timing:
    """One algorithm on one workload: milliseconds of a step and of the first call, by contestant.

    `failed`: contestants that do not run here, with the reason.
    """

    family: str
    workload: str
    milliseconds: dict[str, float]
    first_call: dict[str, float]
    failed: dict[str, str]

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {ms:.3f}" for name, ms in self.milliseconds.items())
        failed = "".join(f"\n          not run: {name}: {why}" for name, why in self.failed.items())
        return f"{self.family}, {self.workload}: ms per step: {listed}{failed}"


def plan(quick: bool) -> list[tuple[Family, str]]:
    """The pairs of family and workload to time."""
    workloads = QUICK_WORKLOADS if quick else WORKLOADS
    return [(f, w) for w in workloads for f in FAMILIES if not quick or f.name in _QUICK_FAMILIES]


def measure(family: Family, workload: str, platform: str, device: str) -> Timing:
    """Medians of interleaved steps with new gradients, synchronised."""
    found = Timing(family.name, workload, {}, {}, {})
    quick = workload in QUICK_WORKLOADS
    shapes: list[tuple[int, ...]] = (QUICK_WORKLOADS | WORKLOADS)[workload]
    gradients = [torch.randn(s).mul_(0.01).to(device) for s in shapes]
    running: dict[str, _Contestant] = {}
    torch.compiler.reset()
    for name, make in _makers(family, platform).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                contestant = _Contestant(make, shapes, device, keeps_gradients=name.startswith("torch_npu"))
                found.first_call[name] = 1e3 * contestant.timed(gradients)
                for _ in range(_WARMUP):
                    contestant.timed(gradients)
        except Exception as e:  # one contestant less
            found.failed[name] = first_line(e)
        else:
            running[name] = contestant
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(_QUICK_ROUNDS if quick else _ROUNDS):
        for name, contestant in running.items():
            times[name].append(contestant.timed(gradients))
    found.milliseconds = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return found


def _makers(family: Family, platform: str) -> dict[str, Make]:
    """Contestants by name."""

    def ours(params: Sequence[Tensor]) -> tuple[Any, StepCall]:
        opt = getattr(importlib.import_module("optimizers"), family.ours)(params, **family.options)
        return opt, compile_step(opt, platform=platform, strict=True)

    def theirs(params: Sequence[Tensor]) -> tuple[Any, StepCall]:
        opt = getattr(importlib.import_module("torch_npu.optim"), family.ours)(params, **family.options)
        return opt, opt.step

    def stock(**form: bool) -> Make:
        def make(params: Sequence[Tensor]) -> tuple[Any, StepCall]:
            opt = getattr(torch.optim, str(family.stock))(params, **family.options, **form)
            return opt, opt.step

        return make

    makers: dict[str, Make] = {"ours": ours}
    if platform == "npu":
        makers[f"torch_npu.optim.{family.ours}"] = theirs
    if family.stock is not None:
        makers |= {f"torch.optim.{family.stock}, {f}": stock(**{f: True}) for f in ("foreach", "fused")}
    return makers


class _Contestant:
    """An optimizer with its own parameters.

    `keeps_gradients`: torch_npu.optim's classes keep reading the gradient tensors of their first step, so new
    gradients are copied into those; all others get new tensors, as from a backward pass.
    """

    def __init__(self, make: Make, shapes: Sequence[tuple[int, ...]], device: str, keeps_gradients: bool) -> None:
        self._params = [torch.nn.Parameter(torch.full(s, 0.5, device=device)) for s in shapes]
        self._device = device
        self._keeps = keeps_gradients
        self._opt, self._step = make(self._params)

    def timed(self, gradients: Sequence[Tensor]) -> float:
        """Seconds of one step, from an idle device until it is idle again."""
        for p, g in zip(self._params, gradients, strict=True):
            if self._keeps and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g.clone()
        return _until_done(self._step, self._device)


def _until_done(call: StepCall, device: str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def constants(device: str, quick: bool) -> dict[str, float]:
    """The constants of this device for a model of step times.

    GB/s that an in-place multiply of one large tensor reads and writes; microseconds that the host takes for one
    operation of many on one element, and for one that is waited for.
    """
    large = torch.ones((16 if quick else 64) * 2**20, device=device)
    tiny = torch.ones(1, device=device)
    _until_done(lambda: large.mul_(1.0001), device)
    best = min(_until_done(lambda: large.mul_(1.0001), device) for _ in range(10))
    count = 100 if quick else 1000

    def many() -> None:
        for _ in range(count):
            tiny.mul_(1.0001)

    many()
    wait(device)
    start = time.perf_counter()
    many()
    enqueued = time.perf_counter() - start
    waited = statistics.median(_until_done(lambda: tiny.mul_(1.0001), device) for _ in range(20))
    return {
        "in-place GB/s": 2 * large.numel() * large.itemsize / best / 1e9,
        "us per operation, enqueued": 1e6 * enqueued / count,
        "us per operation, waited for": 1e6 * waited,
    }
