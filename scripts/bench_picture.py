"""The picture of scripts/bench.py: step times for each workload, compile time against the number of parameters."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure


def draw(
    cells: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], grown: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
    """Write the picture; ratios above the line are in our favour."""
    workloads = list(dict.fromkeys(c["workload"] for c in cells))
    figure = Figure(figsize=(11, 3 * (len(workloads) + 2)), layout="constrained")
    axes = figure.subplots(len(workloads) + 2, 1, squeeze=False)[:, 0]
    for axis, workload in zip(axes, workloads, strict=False):
        own = [c for c in cells if c["workload"] == workload]
        peers = list(dict.fromkeys(name for c in own for name in c["milliseconds"]))
        width = 0.8 / len(peers)
        for k, name in enumerate(peers):
            places = [i + k * width for i, c in enumerate(own) if name in c["milliseconds"]]
            axis.bar(places, [c["milliseconds"][name] for c in own if name in c["milliseconds"]], width, label=name)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(own))], [c["optimizer"] for c in own], rotation=15)
        axis.set_title(workload)
        axis.set_ylabel("ms per step")
        axis.set_yscale("log")
        axis.legend(fontsize="small", ncols=len(peers))
    _draw_growth(axes[-2], grown)
    last = axes[-1]
    for name in dict.fromkeys(r["optimizer"] for r in rows):
        own = [r for r in rows if r["optimizer"] == name and "our stages, warm" in r]
        counts = [r["parameters"] for r in own]
        last.plot(counts, [r["first call, cold"] for r in own], "o-", label=f"{name}: first call, cold")
        last.plot(counts, [r["our stages, warm"] for r in own], "o--", label=f"{name}: our stages, warm")
    last.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds", title="compile time")
    if rows:
        last.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_growth(axis: Any, grown: Sequence[dict[str, Any]]) -> None:
    for name in grown[0]["milliseconds"] if grown else ():
        axis.plot([r["parameters"] for r in grown], [r["milliseconds"][name] for r in grown], "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tensors of 1024", ylabel="ms per step", title="Adam, step time")
    axis.legend(fontsize="small")
