"""The first hundred steps of a new process: ours and torch's own, with nothing compiled yet and with all of it kept.

scripts/bench.py --first runs this file as a program for each of the two; it prints the seconds of its steps as JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import npu_fuse_pass
import optimizers

STEPS, COUNT, ELEMENTS = 100, 1000, 1024
SPANS = ((2, 2), (3, 3), (4, 4), (5, 10), (11, 50), (51, 100))
Step = Callable[[], Any]
CONTESTANTS: dict[str, Callable[[Any], Step]] = {
    "NpuFusedAdam": lambda p: npu_fuse_pass.compile_step(optimizers.NpuFusedAdam(p, lr=1e-3)),
    "torch.optim.Adam, compile_step": lambda p: npu_fuse_pass.compile_step(torch.optim.Adam(p, lr=1e-3)),
    "foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True).step,
    "fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True).step,
}


def first_steps() -> list[dict[str, Any]]:
    """A process with an empty kernel cache, then one with what that has left.

    Returns:
        For each: "kernels", how the cache was, and "seconds" of every step, by contestant.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kernels in ("compiled now", "kept"):
            environment = {**os.environ, "NPU_FUSE_CACHE_DIR": folder}
            command = [sys.executable, "-W", "ignore", str(pathlib.Path(__file__))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append({"kernels": kernels, "seconds": json.loads(done.stdout.splitlines()[-1])})
    return found


def rows_of(found: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of a table: seconds of the first step, milliseconds of later ones (medians of several), seconds of all."""
    rows = []
    for run in found:
        for name, seconds in run["seconds"].items():
            later = [f"{1e3 * statistics.median(seconds[a - 1 : b]):.2f}" for a, b in SPANS]
            rows.append([run["kernels"], name, f"{seconds[0]:.2f}", *later, f"{sum(seconds):.2f}"])
    return rows


def _steps() -> dict[str, list[float]]:
    """Seconds of steps that take turns, each on parameters of its own with new gradients."""
    made, seconds = {}, {name: [] for name in CONTESTANTS}  # type: dict[str, Any], dict[str, list[float]]
    for name, make in CONTESTANTS.items():
        params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(COUNT)]
        made[name] = params, make(params)
    for _ in range(STEPS):
        for name, (params, step) in made.items():
            for p in params:
                p.grad = torch.full_like(p, 0.01)
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    print(json.dumps(_steps()))
