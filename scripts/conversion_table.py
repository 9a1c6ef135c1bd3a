"""Which optimizer steps become GE graphs: stock torchair, the same without Dynamo's decompositions, and this package.

Runs in the environment of the NPU lane, which `bash scripts/npu_lane.sh` makes; no NPU and no CANN are needed:

    bash scripts/conversion_table.sh                   # the table for 10 parameters, about a minute
    bash scripts/conversion_table.sh 10 100            # and for 100: some minutes
    bash scripts/conversion_table.sh --only AdamW      # rows whose name contains it
    bash scripts/conversion_table.sh --time 300        # how long Adam takes to convert, ours and stock torchair's

A cell is "OK" with FX nodes / GE nodes / compute nodes (GE nodes without inputs, constants and the output) for every
number of parameters, of the second step, when all states exist; or what keeps the step from becoming a GE graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "npu")]

import torch  # noqa: E402
from conversion_cases import ROWS, Make, Row  # noqa: E402
from conversion_measure import Conversion, as_shipped, convert, harness, put  # noqa: E402

import optimizers  # noqa: E402


def stock(row: Row, n: int) -> Conversion | None:
    """What torchair does on its own; None for rules, which Dynamo shows to it as one unknown operation."""
    if not row.stock:
        return None
    with as_shipped():
        return convert(row.make, n, ours=False)


def without_decompositions(row: Row, n: int) -> Conversion | None:
    """As `stock`, without Dynamo's decompositions, which turn addcmul, addcdiv and add with alpha into prims.fma."""
    if not hasattr(torch._dynamo.config, "enable_dynamo_decompositions"):
        return stock(row, n)  # an older torch, which always does it
    with torch._dynamo.config.patch(enable_dynamo_decompositions=False):
        return stock(row, n)


COLUMNS: dict[str, Callable[[Row, int], Conversion | None]] = {
    "stock torchair": stock,
    "stock, Dynamo's decompositions off": without_decompositions,
    "ours": lambda row, n: convert(row.make, n, ours=True),
}


def cell(found: Sequence[Conversion | None]) -> str:
    """A cell of the table: one conversion for each number of parameters."""
    made = [conversion for conversion in found if conversion is not None]
    if not made:
        return "–"
    blockers = list(dict.fromkeys(b for conversion in made for b in conversion.blockers))
    if blockers:
        return ", ".join(f"`{b}`" if "." in b and " " not in b else b for b in blockers)
    return "OK " + ", ".join(" / ".join(map(str, conversion.nodes)) for conversion in made)


def table(rows: Sequence[Row], sizes: Sequence[int]) -> Iterator[str]:
    """The table's lines, as they are found."""
    yield f"FX / GE / compute nodes for N = {', '.join(map(str, sizes))} parameters"
    yield ""
    yield "| optimizer | " + " | ".join(COLUMNS) + " |"
    yield "| --- " * (1 + len(COLUMNS)) + "|"
    for row in rows:
        cells: list[str] = []
        for convert_one in COLUMNS.values():
            found = [convert_one(row, sizes[0])]
            if found[0] is not None and not found[0].blockers:  # a blocker is the same for every size
                found += [convert_one(row, n) for n in sizes[1:]]
            cells.append(cell(found))
        yield f"| {row.name} | " + " | ".join(cells) + " |"


@contextlib.contextmanager
def missing_converters() -> Iterator[None]:
    """Gives torchair what it lacks for Adam, as cheap to convert as can be: a list is one GE node."""
    harness.prepare()
    import torchair
    from torchair._ge_concrete_graph import compat_ir, ge_apis

    def one_node(operation: str, tensors: list[Any], meta_outputs: Any = None) -> Any:
        return compat_ir._custom_op(operation, inputs={"x": tensors}, outputs=[("y", len(tensors))])

    def fma(a: Any, b: Any, c: Any, meta_outputs: Any = None) -> Any:
        return ge_apis.Add(ge_apis.Mul(a, b), c)

    aten = torch.ops.aten
    added: dict[Any, Callable[..., Any]] = {
        torch.ops.prims.fma.default: fma,
        aten._foreach_sqrt.default: functools.partial(one_node, "ForeachSqrt"),
        aten._foreach_neg.default: functools.partial(one_node, "ForeachNeg"),
        aten._foreach_reciprocal.default: functools.partial(one_node, "ForeachReciprocal"),
    }
    with as_shipped():
        before = {op: getattr(op, "_ge_converter", None) for op in added}
        for op, converter in added.items():
            torchair.register_fx_node_ge_converter(op)(converter)
        try:
            yield
        finally:
            put(before)


# how it is made; whether it is ours; whether it is a rule's step by compile_step
TIMED: dict[str, tuple[Make, bool, bool]] = {
    "ours, NpuFusedAdam": (lambda p: optimizers.NpuFusedAdam(p, lr=0.01), True, False),
    'ours, NpuFusedAdam, flatten="params"': (
        lambda p: optimizers.NpuFusedAdam(p, lr=0.01, flatten="params"),
        True,
        False,
    ),
    "ours, torch.optim.Adam, compile_step": (lambda p: torch.optim.Adam(p, lr=0.01), True, True),
    "ours, torch.optim.Adam, torch.compile": (lambda p: torch.optim.Adam(p, lr=0.01), True, False),
    "stock, torch.optim.Adam, foreach": (lambda p: torch.optim.Adam(p, lr=0.01, foreach=True), False, False),
    "stock, torch.optim.Adam, for-loop": (lambda p: torch.optim.Adam(p, lr=0.01, foreach=False), False, False),
}


def times(n: int) -> dict[str, Conversion]:
    """Adam through every path; stock torchair has the missing converters for this."""
    with missing_converters():
        for make, *how in TIMED.values():
            convert(make, 2, *how)  # what is loaded once in a process is no one's time
        return {name: convert(make, n, *how) for name, (make, *how) in TIMED.items()}


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[10], help="numbers of parameters")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--time", type=int, metavar="N", help="time the conversion of Adam with N parameters instead")
    chosen = parser.parse_args(arguments)
    if chosen.time is not None:
        print(
            f"Adam, {chosen.time} parameters. Processor time of the first compiled step; of that, from the graph that"
        )
        print("Dynamo captured to the graph that GE gets; and of that, torchair's part:")
        for name, found in times(chosen.time).items():
            counted = f"{found.nodes[0]} FX nodes, {found.nodes[1]} GE nodes"
            seconds = "".join(f"{part:8.2f} s" for part in found.seconds)
            print(f"{name:38s} {seconds}   {counted}", flush=True)
        return 0
    for line in table([row for row in ROWS if chosen.only in row.name], chosen.sizes):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
