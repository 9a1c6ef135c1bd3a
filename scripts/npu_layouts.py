"""What a step costs on an NPU in each layout: compute nodes of the GE graph, and bytes for each parameter element.

    bash scripts/npu_python.sh scripts/npu_layouts.py             # for 10 and 100 parameters, half a minute
    bash scripts/npu_python.sh scripts/npu_layouts.py 1 10 1000   # for other numbers of parameters

Runs in the environment of the NPU lane, which `bash scripts/npu_lane.sh` makes. A cell is compute nodes for every
number of parameters, then bytes per element. Both are counted in the emitted graphs: each node reads its inputs and
writes its outputs once. What GE fuses or copies by itself is not in there.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import npu_graphs  # noqa: E402

import optimizers  # noqa: E402
from optimizers.paddle import RMSProp  # noqa: E402

Make = Callable[..., Any]
ROWS: dict[str, Make] = {
    "Adam": lambda p, **o: optimizers.NpuFusedAdam(p, lr=1e-3, **o),
    "Adam, weight decay": lambda p, **o: optimizers.NpuFusedAdam(p, lr=1e-3, weight_decay=0.01, **o),
    "AdamW": lambda p, **o: optimizers.NpuFusedAdamW(p, lr=1e-3, **o),
    "SGD, momentum": lambda p, **o: optimizers.NpuFusedSGD(p, lr=1e-3, momentum=0.9, **o),
    "AMSGrad": lambda p, **o: optimizers.NpuFusedAdam(p, lr=1e-3, amsgrad=True, **o),
    "RMSpropTF": lambda p, **o: optimizers.NpuFusedRMSpropTF(p, lr=1e-3, **o),
    "Paddle RMSProp": lambda p, **o: RMSProp(1e-3, parameters=p, **o),
    "LAMB": lambda p, **o: optimizers.NpuFusedLamb(p, lr=1e-3, **o),
}
# How parameters and gradients lie, and with which options: of the optimizer, of the backend.
COLUMNS: dict[str, tuple[bool, dict[str, str], dict[str, str]]] = {
    "adjacent": (True, {}, {}),
    "gradients apart": (False, {"flatten": "params"}, {}),
    "all apart": (False, {}, {}),
    'all apart, kernels="elementwise"': (False, {}, {"kernels": "elementwise"}),
}
_SHAPE = (64, 64)


def cell(make: Make, sizes: Sequence[int], column: str) -> str:
    """Compute nodes for every number of parameters, and bytes per element for the last."""
    adjacent, own, options = COLUMNS[column]
    found, moved = [], 0.0
    for n in sizes:
        nodes, _ = npu_graphs.emitted(lambda p: make(p, **own), [_SHAPE] * n, adjacent, **options)
        found.append(f"{len(nodes)}")
        moved = sum(size for _, size in nodes) / (n * _SHAPE[0] * _SHAPE[1])
    return f"{' / '.join(found)}, {moved:.0f} B"


def table(rows: Sequence[str], sizes: Sequence[int]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| compute nodes for N = {', '.join(map(str, sizes))}, bytes per element | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    for name in rows:
        yield f"| {name} | " + " | ".join(cell(ROWS[name], sizes, column) for column in COLUMNS) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[10, 100], help="numbers of parameters")
    for line in table(list(ROWS), parser.parse_args(arguments).sizes):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
