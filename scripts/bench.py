"""Step and compile times against torch.optim, in one run: python scripts/bench.py [--quick] (or scripts/bench.sh).

Every contestant has its own parameters and gets fresh gradient tensors before every step. Steps take turns; times are
medians, ratios medians over rounds. "ours" is the compiled call with everything in it: prelude, guards, pointers,
kernels. Tables go to the terminal, numbers to bench-output/bench.json and a picture to bench-output/bench.png. Cells
that miss what bench_cases.py aims at are listed, with the ratio that their bytes at the in-place bandwidth would give.

--first prints the first hundred steps of a new process, and nothing else.
--stock compares torch.optim's own classes under compile_step with ours of the same algorithm, and nothing else.
--model npu measures nothing: it prints launches, bytes and modelled times of steps on an NPU (bench_model.py). It needs
the environment of the NPU lane, so run it as: bash scripts/bench.sh --model npu [--only adamw]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bench_call import call_cost
from bench_cases import FAMILIES, WORKLOADS, Family, Workload, peers
from bench_first import COUNT, ELEMENTS, SPANS, first_steps, rows_of
from bench_measure import compile_cost, extra_memory, inductor_cost, machine, race, table
from bench_stock import FIRST_AT_MOST, STEP_AT_MOST, stock_pairs

import npu_fuse_pass
import optimizers
from npu_fuse_pass.lowerings.cpu import input_check

QUICK = {
    "1000 x 1024": ("Adam", "AdamW", "SGD momentum", "RMSpropTF", "LAMB", "own rule"),
    "100 x 256x256": ("Adam", "SGD momentum", "RMSpropTF", "LAMB"),
    "8 x 2048x2048": ("Adam", "SGD momentum"),
}
STAGE_COUNTS = (10, 100, 300, 1000, 3000)
INDUCTOR_COUNT = 300
CALLS = (("Adam", "1000 x 1024"), ("SGD momentum", "100 x 256x256"), ("RMSprop, stock", "100 x 256x256 bf16"))
GROWTH_COUNTS = (1, 3, 10, 30, 100, 300, 1000, 3000)


def progress(items: Sequence[Any], **text: str) -> Any:
    """A progress bar over items."""
    from tqdm import tqdm  # the NPU lane's environment has none

    return tqdm(items, **text)


def chosen(quick: bool, only: str) -> list[tuple[Workload, Family]]:
    """The cells of the table. Stock classes take Dynamo a minute at 1000 parameters, so --quick leaves them out."""
    cells = [(w, f) for w in WORKLOADS for f in FAMILIES if only.lower() in f"{w.name} {f.name}".lower()]
    return [(w, f) for w, f in cells if not quick or f.name in QUICK.get(w.name, ())]


def measure(workload: Workload, family: Family, seconds: float, inductor: bool) -> dict[str, Any]:
    """One cell: medians of all contestants, and what follows."""
    torch._dynamo.reset()
    contestants = peers(family, workload, inductor)
    run = race(contestants, seconds)
    best, ours = run.best_peer(), run.median("ours")
    moved = family.bytes_per_element * workload.dtype.itemsize / 4 * workload.elements
    cell = {
        "workload": workload.name,
        "optimizer": family.name,
        "milliseconds": {name: 1e3 * run.median(name) for name in contestants},
        "first call": run.first,
        "best peer": best,
        "ratio": run.ratio(best),
        "GB/s": moved / ours / 1e9,
        "in-place GB/s": statistics.median(run.inplace),
        "share of bandwidth": run.share(moved),
        "rounds": len(run.inplace),
        "aim": 0.0 if "inductor" in contestants else family.aim(workload),  # aims are against what needs no compiler
        "aim, bandwidth": family.aim_bandwidth if workload.large else 0.0,
        "extra memory": extra_memory(*contestants["ours"]),
    }
    del contestants
    gc.collect()
    return cell


def print_cells(cells: Sequence[dict[str, Any]]) -> None:
    """The table of step times, ratios above 1 in our favour."""
    rows = []
    for c in cells:
        times, best = c["milliseconds"], c["best peer"]
        speed = (f"{c['ratio']:.2f}x", f"{c['GB/s']:.1f}", f"{c['share of bandwidth']:.0%}", f"{c['extra memory']:.2%}")
        rows.append([c["workload"], c["optimizer"], f"{times['ours']:.2f}", f"{times[best]:.2f} ({best})", *speed])
    table("workload | optimizer | ours, ms | best peer, ms | as fast | GB/s | of in-place | extra memory", rows)


def print_missed(cells: Sequence[dict[str, Any]]) -> None:
    """Cells below their aims, and what memory alone would allow: the best peer's time over that of the bytes moved."""
    rows = []
    for c in cells:
        cell = [c["workload"], c["optimizer"]]
        if c["ratio"] < c["aim"]:
            possible = c["ratio"] / c["share of bandwidth"]
            rows.append([*cell, f"{c['aim']:.2f}x", f"{c['ratio']:.2f}x", f"{possible:.2f}x"])
        if c["share of bandwidth"] < c["aim, bandwidth"]:
            rows.append([*cell, f"{c['aim, bandwidth']:.0%}", f"{c['share of bandwidth']:.0%}", "–"])
    table("below its aim: workload | optimizer | aim | reached | at all of the in-place bandwidth", rows)


def print_overview(cells: Sequence[dict[str, Any]]) -> None:
    """Workloads beside each other: ours in ms, how much faster than the best peer, share of the in-place bandwidth."""
    workloads = list(dict.fromkeys(c["workload"] for c in cells))
    found = {(c["optimizer"], c["workload"]): c for c in cells}
    rows = []
    for name in dict.fromkeys(c["optimizer"] for c in cells):
        here = [found.get((name, w)) for w in workloads]
        texts = (
            f"{c['milliseconds']['ours']:.1f} ms, {c['ratio']:.1f}x, {c['share of bandwidth']:.0%}" if c else "–"
            for c in here
        )
        rows.append([name, *texts])
    table(" | ".join(["optimizer", *workloads]), rows)


def growth(counts: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Step times of Adam on 1 to 3000 tensors of 1024 elements."""
    adam = next(f for f in FAMILIES if f.name == "Adam")
    found = []
    for n in progress(counts, desc="step time against N", unit="N"):
        torch._dynamo.reset()
        contestants = peers(adam, Workload(f"{n} x 1024", [(1024,)] * n, large=False), inductor=False)
        run = race(contestants, seconds, multiplied=1)  # in caches that stay full
        found.append({"parameters": n, "milliseconds": {name: 1e3 * run.median(name) for name in run.steps}})
    return found


def calls() -> dict[str, dict[str, float]]:
    """Where the time of a call goes, for some cells."""
    families, workloads = {f.name: f for f in FAMILIES}, {w.name: w for w in WORKLOADS}
    return {f"{f}, {w}": call_cost(families[f], workloads[w]) for f, w in CALLS}


def print_calls(found: Mapping[str, Mapping[str, float]]) -> None:
    """The parts of these calls."""
    names = next(iter(found.values()), {})
    rows = [[name, *(f"{parts[name]:.0f}" for parts in found.values())] for name in names]
    table(" | ".join(["us of a step", *found]), rows)


def print_growth(rows: Sequence[dict[str, Any]]) -> None:
    """The table of step times against the number of parameters."""
    names = list(rows[0]["milliseconds"]) if rows else []
    cells = [[r["parameters"], *(f"{r['milliseconds'][name]:.3f}" for name in names)] for r in rows]
    table(" | ".join(["tensors of 1024, Adam, ms of a step:", *names]), cells)


def stages(counts: Sequence[int], inductor: bool) -> list[dict[str, Any]]:
    """Cost of compiling our Adam and stock Adam at several numbers of parameters; at one of them with Inductor too."""
    found = []
    makers = [("NpuFusedAdam", optimizers.NpuFusedAdam), ("torch.optim.Adam, foreach", torch.optim.Adam)]
    bar = progress([(n, name, make) for n in counts for name, make in makers], desc="compile time", unit="compile")
    for n, name, make in bar:
        bar.set_postfix_str(f"{name}, {n}")
        found.append({"parameters": n, "optimizer": name, **compile_cost(make, n)})
    if inductor:
        cost = {"first call, cold": inductor_cost(INDUCTOR_COUNT)}
        found.append({"parameters": INDUCTOR_COUNT, "optimizer": "torch.optim.Adam, foreach, Inductor", **cost})
    return found


def print_stages(rows: Sequence[dict[str, Any]]) -> None:
    """The table of compile times in seconds."""
    columns = ["first call, cold", "first call, warm", "our stages, cold", "our stages, warm"]
    columns += [f"{stage}, warm" for stage in ("capture", "group", "lower")]
    cells = [[r["parameters"], r["optimizer"], *(f"{r[c]:.2f}" if c in r else "–" for c in columns)] for r in rows]
    table(" | ".join(["parameters", "optimizer, seconds of:", *columns]), cells)


def print_many(count: int = 60) -> None:
    """The first steps of many optimizers of one kind, one for each parameter, as optimizer-in-backward has them."""
    rows = []
    for name, make in (("NpuFusedAdamW", optimizers.NpuFusedAdamW), ("torch.optim.AdamW", torch.optim.AdamW)):
        for how in ("compile_step", "torch.compile"):
            params = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(count)]
            for p in params:
                p.grad = torch.ones_like(p)
            opts = [make([p], lr=0.1) for p in params]
            npu_fuse_pass.clear_reports()
            torch._dynamo.reset()
            start = time.perf_counter()
            for opt in opts:
                step = (
                    npu_fuse_pass.compile_step(opt)
                    if how == "compile_step"
                    else torch.compile(opt.step, backend="npu_fused")
                )
                step()
            taken = time.perf_counter() - start
            fused = sum(bool(r.groups) for r in npu_fuse_pass.reports())
            rows.append([name, how, fused, f"{taken:.1f} s"])
    table(f"{count} optimizers of one kind | compiled by | reports | first steps", rows)


def print_first() -> None:
    """The table of a new process's first steps."""
    spans = [f"{a} to {b}" if b > a else f"{a}" for a, b in SPANS]
    columns = [f"kernels | Adam, {COUNT} x {ELEMENTS} | first step, s", f"ms of step {spans[0]}", *spans[1:], "all, s"]
    table(" | ".join(columns), rows_of(first_steps()))


def print_stock(rows: Sequence[dict[str, Any]]) -> None:
    """The table of torch.optim's classes beside ours."""
    columns = ["optimizer", "first call: ours, s", "stock", "ratio", "step with another lr: ours, ms", "stock", "ratio"]
    cells = []
    missed = []
    for r in rows:
        first, step = r["first call"], r["step"]
        beyond = r["ratio"] > STEP_AT_MOST or first["stock"] > FIRST_AT_MOST * first["ours"]
        missed += [r["optimizer"]] if beyond else []
        calls = [f"{first['ours']:.2f}", f"{first['stock']:.2f}", f"{first['stock'] / first['ours']:.2f}x"]
        steps = [f"{1e3 * step['ours']:.2f}", f"{1e3 * step['stock']:.2f}", f"{r['ratio']:.2f}x"]
        cells.append([r["optimizer"], *calls, *steps])
    table(" | ".join(columns), cells)
    limits = f"{FIRST_AT_MOST:g} times our first call or {STEP_AT_MOST:g} times our step"
    print(f"\nbeyond {limits}: {', '.join(missed) or 'none'}")


def main() -> None:
    """Parse arguments, measure, print, write files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a selection, within two minutes")
    parser.add_argument("--only", default="", help="nothing but the cells whose workload or optimizer contains this")
    parser.add_argument(
        "--seconds", type=float, help="of timed rounds for each cell, after the heat (default 4, quick 1)"
    )
    parser.add_argument(
        "--inductor",
        action="store_true",
        help="torch.compile with Inductor as a peer (half a minute more for each cell; up to 200 parameters)",
    )
    parser.add_argument("--stages", type=int, nargs="*", help="numbers of parameters to measure compile time at")
    parser.add_argument("--stock", action="store_true", help="nothing but torch.optim's classes beside ours")
    parser.add_argument("--many", action="store_true", help="nothing but the first steps of 60 optimizers of one kind")
    parser.add_argument("--first", action="store_true", help="nothing but the first hundred steps of a new process")
    parser.add_argument("--model", choices=["npu"], help="no measurement: launches, bytes and modelled times on an NPU")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-output"))
    given = parser.parse_args()
    if given.model:
        import bench_model

        sys.exit(bench_model.main(given.only, given.out))
    warnings.filterwarnings("ignore", module="torch")
    per_cell = given.seconds or (1 if given.quick else 4)
    if given.many or given.first or given.stock:
        print(f"{datetime.date.today().isoformat()}, {machine()}")
        if given.many:
            print_many()
        elif given.first:
            print_first()
        else:
            print_stock(stock_pairs(per_cell, given.only))
        return
    whole = not given.only
    counts = given.stages if given.stages is not None else (10, 100) if given.quick else STAGE_COUNTS
    rows = stages(counts, given.inductor) if whole or given.stages else []
    if not input_check.wait():
        print("the native input check cannot be compiled here: steps of many tensors are slower than they could be")
    parts = calls() if whole else {}
    sizes = GROWTH_COUNTS[:-1:2] if given.quick else GROWTH_COUNTS
    grown = growth(sizes, 0.3 if given.quick else 2) if whole else []
    cells = []
    bar = progress(chosen(given.quick, given.only), desc="step time", unit="cell")
    for workload, family in bar:
        bar.set_postfix_str(f"{family.name}, {workload.name}")
        cells.append(measure(workload, family, per_cell, given.inductor))
    found = {"date": datetime.date.today().isoformat(), "machine": machine()}
    print(f"\n{found['date']}, {found['machine']}")
    inplace = [c["in-place GB/s"] for c in cells]
    if inplace:
        print(f"in-place multiply of one large tensor: {min(inplace):.1f} to {max(inplace):.1f} GB/s during this run")
    print_stages(rows)
    print_calls(parts)
    print_growth(grown)
    print_cells(cells)
    print_missed(cells)
    print_overview(cells)
    given.out.mkdir(exist_ok=True)
    measured = {"steps": cells, "compile": rows, "call": parts, "growth": grown}
    (given.out / "bench.json").write_text(json.dumps({**found, **measured}, indent=2))
    print(f"\nwrote {given.out / 'bench.json'}")
    if whole:
        from bench_picture import draw  # matplotlib, which the NPU lane's environment lacks

        draw(cells, rows, grown, given.out / "bench.png")
        print(f"wrote {given.out / 'bench.png'}")


if __name__ == "__main__":
    main()
