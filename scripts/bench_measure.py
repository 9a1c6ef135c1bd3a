"""How scripts/bench.py measures: steps that take turns, bandwidth, cost of the stages, extra memory."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bench_cases import Params, Step
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.lowerings.cpu import build as cpu_build
from npu_fuse_pass.lowerings.cpu import input_check
from npu_fuse_pass.tools import observe

HEAT = 5
"""Rounds that everybody takes part in."""
NEAR = 1.3
"""Times of the best peer within which a peer goes on."""


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


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(header: str, rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, unless it is empty."""
    if not rows:
        return
    print(f"\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def fresh_gradients(params: Params, gradients: list[Tensor]) -> None:
    """New tensors, as a backward pass leaves them; their making is not part of a step's time."""
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds of steps that took turns, and what one large tensor's in-place multiply moved beside them.

    Attributes:
        first: seconds of every contestant's first call.
        steps: seconds of every contestant's steps, in the order of the rounds; some leave after the heat.
        inplace: GB/s of the multiply, one for each round.
    """

    first: dict[str, float]
    steps: dict[str, list[float]]
    inplace: list[float]

    def median(self, name: str) -> float:
        return statistics.median(self.steps[name])

    def best_peer(self) -> str:
        """Among those in all rounds: the machine may have been faster when the others left."""
        whole = [name for name, steps in self.steps.items() if name != "ours" and len(steps) == len(self.inplace)]
        return min(whole, key=self.median)

    def ratio(self, peer: str) -> float:
        """How often ours goes into the peer's time: the median over rounds, as the machine changes between rounds."""
        return statistics.median(
            theirs / ours for theirs, ours in zip(self.steps[peer], self.steps["ours"], strict=False)
        )

    def share(self, moved: float) -> float:
        """Of the in-place bandwidth, for a step that moves so many bytes; the median over rounds, too."""
        return statistics.median(moved / t / 1e9 / b for t, b in zip(self.steps["ours"], self.inplace, strict=True))


def race(contestants: dict[str, tuple[Params, Step]], seconds: float, multiplied: int = 64 * 1024 * 1024) -> Race:
    """Rounds in which every contestant steps once, in changing order, so that noise meets all alike.

    After the heat only ours and the peers that may yet be the best take part, which leaves them more rounds.
    Every round ends with a multiply of so many float32, which empties the caches, as a forward and backward pass do.
    """
    params = next(iter(contestants.values()))[0]
    gradients = [torch.randn_like(p) * 0.01 for p in params]
    large = torch.ones(multiplied)
    found = Race({}, {name: [] for name in contestants}, [])

    def turn(name: str) -> float:
        own, step = contestants[name]
        fresh_gradients(own, gradients)
        return timed(step)

    for name in contestants:
        found.first[name] = turn(name)
        for _ in range(2):
            turn(name)

    def round_of(running: Sequence[str]) -> None:
        for name in running:
            found.steps[name].append(turn(name))
        found.inplace.append(2 * 4 * large.numel() / timed(lambda: large.mul_(1.0001)) / 1e9)

    running = list(contestants)
    for k in range(HEAT):
        round_of([*running[k:], *running[:k]])
    close = NEAR * found.median(found.best_peer())
    running = [name for name in running if name == "ours" or found.median(name) <= close]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        round_of(running)
        running.reverse()
    return found


@contextmanager
def cold_kernels(look: bool = True) -> Iterator[None]:
    """No kernel on disk or loaded, so that C++ is compiled; with `look` the library for `input_check` too."""
    cpu_build._loaded.clear()
    if look:
        input_check.forget()
    before = os.environ.get("NPU_FUSE_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NPU_FUSE_CACHE_DIR"] = folder
        try:
            yield
        finally:
            input_check.wait()  # it may be compiling into this folder
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
                found["first call, cold"] = timed(step)
        else:
            found["first call, warm"] = timed(step)
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
        return timed(torch.compile(torch.optim.Adam(params, foreach=True).step, backend="inductor"))


def extra_memory(params: Params, step: Step) -> float:
    """Peak bytes that a step allocates beyond what lives before it, as a share of the parameters' bytes."""
    fresh_gradients(params, [torch.randn_like(p) for p in params])
    return observe.measure(step).peak_bytes / sum(p.numel() * p.element_size() for p in params)
