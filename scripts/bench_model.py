"""`scripts/bench.py --model npu`: launches, bytes and modelled times of a step on an NPU, ours and the peers'.

Ours come from GE graphs that the real torchair made, torch_npu.optim's and torch's from their own code; the times are
the arithmetic of npu_model.py. Nothing of it has run on an NPU.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import npu_peers
import torch
from bench_cases import WORKLOADS, Workload
from bench_measure import table
from npu_graphs import NoTorchNpu, emitted, host_of_kernels, lane
from npu_kernels_table import BLOCK, grouped, kernels_of
from npu_model import CONSTANTS, Work, compare, device_seconds, eager, host_seconds, nominal, seconds, static_graph

import optimizers

APART, ADJACENT, FEWEST = "ours", "ours, adjacent", 'ours, adjacent, kernels="dedicated"'
GENERATED, GENERATED_NODE = "ours, generated kernels", "ours, generated kernels, a GE node"
GENERATED_MOVING = "ours, generated kernels, gradients move"
STOCK, STOCK_ADJACENT = "torch.optim, compiled by ours", "torch.optim, compiled by ours, adjacent"
FOREACH, FUSED = "torch.optim, foreach", "torch.optim, fused=True"
CORES = 40
"""Vector cores of most A2 and A3."""
_TRACED = 200  # parameters: with more, Dynamo takes a minute for one of torch.optim's steps


@dataclasses.dataclass(frozen=True)
class Family:
    """One algorithm: our class, torch_npu's of the same name, and torch's."""

    name: str
    ours: str
    stock: str | None
    options: dict[str, Any]


FAMILIES = [
    Family("Adam", "NpuFusedAdam", "Adam", dict(lr=1e-3)),
    Family("AdamW", "NpuFusedAdamW", "AdamW", dict(lr=1e-3)),
    Family("SGD momentum", "NpuFusedSGD", "SGD", dict(lr=1e-2, momentum=0.9)),
    Family("RMSpropTF", "NpuFusedRMSpropTF", None, dict(lr=1e-3, momentum=0.9)),
    Family("LAMB", "NpuFusedLamb", None, dict(lr=1e-3)),
]


def variants(family: Family, workload: Workload) -> dict[str, tuple[Callable[[Any], Any], bool, dict[str, Any]]]:
    """What of ours is modelled: how the optimizer is made, whether tensors are adjacent, options of the backend."""

    def ours(params: Any) -> Any:
        return getattr(optimizers, family.ours)(params, **family.options)

    def stock(params: Any) -> Any:
        return getattr(torch.optim, str(family.stock))(params, foreach=True, **family.options)

    found: dict[str, tuple[Callable[[Any], Any], bool, dict[str, Any]]] = {
        APART: (ours, False, {}),
        ADJACENT: (ours, True, {}),
        FEWEST: (ours, True, {"kernels": "dedicated"}),
    }
    if family.stock is not None and len(workload.shapes) <= _TRACED:
        found |= {STOCK: (stock, False, {}), STOCK_ADJACENT: (stock, True, {})}
    return found


def kernels(family: Family, workload: Workload, node: bool, moving: bool) -> Work:
    """Generated kernels: their launches, the transfer of numbers, and that of the table where addresses have changed.

    Args:
        node: GE calls them from a graph; otherwise the step launches them itself.
        moving: gradients are new tensors at every step.
    """

    def make(params: Any) -> Any:
        return getattr(optimizers, family.ours)(params, **family.options)

    counts = [-(-torch.Size(s).numel() // BLOCK) for s in workload.shapes]
    chunks = sum(counts)
    # neighbouring chunks go to a core: how often a member's partial sums are read
    cores = [min(count, 1 + -(-count * CORES // chunks)) for count in counts]
    combined = sum(count * times for count, times in zip(counts, cores, strict=True))
    sizes, tables = [], 0
    for made in kernels_of(grouped(make)):
        row = 8 * (2 + len(made.kernels.slots))
        spans = 16 * len(workload.shapes) if made.kernels.sums else 0
        tables += chunks * row + spans
        sizes.append(4 * max(1, made.kernels.numbers) * len(workload.shapes))
        for k in made.kernels.launches:
            kinds = {p.kind: p.written for p in k.pointers if p.kind in ("partial", "terms")}
            read = {"partial": combined * made.kernels.sums, "terms": chunks * CORES}
            sums = sum(chunks * made.kernels.sums if written else read[kind] for kind, written in kinds.items())
            sizes.append(k.bytes_per_element * workload.elements + chunks * row + spans + 4 * sums)
    work = eager([*sizes, *([tables] if moving else [])])
    return dataclasses.replace(
        work,
        launches=work.launches + node,
        graph=node,
        host=host_of_kernels(make, workload.shapes, adjacent=not moving),
    )


def contestants(family: Family, workload: Workload) -> tuple[dict[str, Work], dict[str, dict[str, int]]]:
    """Work of ours by variant, and the nodes of our graphs by type."""
    found, kinds = {}, {}
    for name, (make, adjacent, options) in variants(family, workload).items():
        nodes, host = emitted(make, workload.shapes, adjacent, **options)
        found[name] = static_graph([size for _, size in nodes], host)
        kinds[name] = dict(collections.Counter(kind for kind, _ in nodes))
    found[GENERATED] = kernels(family, workload, node=False, moving=False)
    found[GENERATED_MOVING] = kernels(family, workload, node=False, moving=True)
    found[GENERATED_NODE] = kernels(family, workload, node=True, moving=False)
    return found, kinds


def peers(family: Family, workload: Workload) -> dict[str, Work]:
    """torch_npu.optim's class, and torch.optim's foreach and fused."""
    found = {
        f"torch_npu.optim.{family.ours}": npu_peers.torch_npu_optim(family.ours, workload.shapes, **family.options)
    }
    if family.stock is not None:
        found[FOREACH] = npu_peers.foreach(family.stock, workload.shapes, **family.options)
        fused = npu_peers.FUSED[family.stock][0]
        if fused is not None:
            found[FUSED] = fused(workload.shapes)
    return found


def cell(family: Family, workload: Workload) -> dict[str, Any]:
    """Numbers of one algorithm on one workload, for the tables and for JSON."""
    ours, kinds = contestants(family, workload)
    rivals = peers(family, workload)
    c = nominal()
    rows = {
        name: {
            "launches": w.launches,
            "nodes": w.nodes,
            "bytes/element": w.moved / workload.elements,
            "syncs": w.syncs,
            "modelled us": {
                "host": 1e6 * host_seconds(w, c),
                "device": 1e6 * device_seconds(w, c),
                "step": 1e6 * seconds(w, c),
                "step without our Python": 1e6 * seconds(dataclasses.replace(w, host=0.0), c),
            },
            **({"node types": kinds[name]} if name in kinds else {}),
        }
        for name, w in (ours | rivals).items()
    }
    verdicts = {}
    for name, work in ours.items():
        verdicts[name] = dataclasses.asdict(compare(dataclasses.replace(work, host=0.0), rivals))
        verdicts[name]["with our Python"] = dataclasses.asdict(compare(work, rivals))
    return {"workload": workload.name, "optimizer": family.name, "contestants": rows, "verdict": verdicts}


def print_constants() -> None:
    """With sources."""
    rows: list[list[object]] = []
    for name, c in CONSTANTS.items():
        spread = "" if c.low is None else f"{c.low:g} to {c.high:g}"
        rows.append([name, f"{c.value:g}", spread, c.source])
    table("constant | value, SI | range | source", rows)
    table("fused=True | source", [[f"torch.optim.{name}", source] for name, (_, source) in npu_peers.FUSED.items()])


def print_cells(cells: list[dict[str, Any]]) -> None:
    """Everybody's work and modelled time, then how ours stands."""
    rows: list[list[object]] = []
    verdicts: list[list[object]] = []
    for found in cells:
        head = [found["workload"], found["optimizer"]]
        for name, r in found["contestants"].items():
            us = r["modelled us"]
            numbers = [r["launches"], r["nodes"], f"{r['bytes/element']:.0f}", r["syncs"], f"{us['device']:.0f}"]
            rows.append([*head, name, *numbers, f"{us['step without our Python']:.0f}", f"{us['step']:.0f}"])
        for name, v in found["verdict"].items():
            full = v["with our Python"]
            ratios = [f"{v['ratio']:.2f}x", f"{v['worst']:.2f}x", f"{full['ratio']:.2f}x"]
            verdicts.append([*head, name, v["peer"], *ratios, v["why"] or full["why"]])
    columns = "launches | nodes | bytes/element | syncs | device, us | step, us | step with our Python, us"
    table(f"workload | optimizer | modelled | {columns}", rows)
    ratios_of = "as fast (modelled) | at worst over the ranges | with our Python"
    table(f"workload | optimizer | modelled | best peer | {ratios_of} | where ours is slower: why", verdicts)


def print_page(cells: list[dict[str, Any]]) -> None:
    """The two tables of docs/npu.md: microseconds of a step without anybody's Python (launches, bytes per element)."""
    operations: list[list[object]] = []
    generated: list[list[object]] = []
    for found in cells:
        made, verdicts = found["contestants"], found["verdict"]
        npu = next(name for name in made if name.startswith("torch_npu.optim."))
        head = [found["workload"], found["optimizer"]]
        apart, adjacent = made[APART], made[ADJACENT]
        ours = [_step(apart), "the same" if apart["nodes"] == adjacent["nodes"] else _step(adjacent)]
        rivals = [_step(made.get(name)) for name in (npu, FOREACH, FUSED)]
        ratio, fewest = (_times(verdicts[name]["ratio"]) for name in (ADJACENT, FEWEST))
        operations.append([*head, *ours, *rivals, ratio if ratio == fewest else f"{ratio}; dedicated {fewest}"])
        names = (GENERATED, GENERATED_MOVING, GENERATED_NODE)
        steps = [_step(made[name], "launches", 1) for name in names]
        peer = verdicts[GENERATED]["peer"]
        best = f"{peer} {made[peer]['modelled us']['step without our Python']:.0f}"
        generated.append([*head, *steps, best, ", ".join(_times(verdicts[name]["ratio"]) for name in names)])
    columns = "ours | ours, adjacent | torch_npu.optim | foreach | fused=True | adjacent against the best peer"
    table(f"workload | optimizer | {columns}", operations)
    table("workload | optimizer | by itself | gradients move | a GE node | best peer | against it", generated)


def _step(found: dict[str, Any] | None, counted: str = "nodes", digits: int = 0) -> str:
    if found is None:
        return "–"
    step, size = found["modelled us"]["step without our Python"], found["bytes/element"]
    return f"{step:.0f} ({found[counted]}, {size:.{digits}f})"


def _times(ratio: float) -> str:
    text = f"{ratio:.2f}x"
    return text if float(text[:-1]) >= 1 else f"**{text}**"


def main(only: str, out: pathlib.Path) -> int:
    """Print the model and write it as JSON.

    Args:
        only: cells whose workload or optimizer contains this.
        out: the folder.

    Returns:
        The exit status: 1 where torch_npu is missing.
    """
    try:
        lane()
    except NoTorchNpu as e:
        print(e, file=sys.stderr)
        return 1
    chosen = [(w, f) for w in WORKLOADS if w.dtype == torch.float32 for f in FAMILIES]
    chosen = [(w, f) for w, f in chosen if only.lower() in f"{w.name} {f.name}".lower()]
    cells = []
    for i, (workload, family) in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {family.name}, {workload.name}", file=sys.stderr, flush=True)
        cells.append(cell(family, workload))
    print("MODELLED, not measured: nothing here has run on an NPU. Times are scripts/npu_model.py's formula.")
    print('Adjacent: parameters and gradients are views of two buffers (flatten="params", DDP\'s buckets, shards).')
    print("Our Python is measured here, in the last columns only; that of the peers is not counted, in their favour.")
    print_constants()
    print_cells(cells)
    print_page(cells)
    out.mkdir(exist_ok=True)
    constants = {name: dataclasses.asdict(c) for name, c in CONSTANTS.items()}
    (out / "model.json").write_text(json.dumps({"modelled": True, "constants": constants, "cells": cells}, indent=2))
    print(f"\nwrote {out / 'model.json'}")
    return 0
