"""The table of optimizers in docs/optimizers.md, made from the reports of compiled steps.

python scripts/support_table.py            # prints it as markdown
python scripts/support_table.py --check    # fails if the page has another one between its markers
python scripts/support_table.py --write    # puts it there
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import npu_fuse_pass  # noqa: E402
import optimizers  # noqa: E402

PAGE = ROOT / "docs" / "optimizers.md"
BEGIN, END = "<!-- support table: scripts/support_table.py -->", "<!-- end of the support table -->"
SHAPES = ((4, 3), (17, 2), (3, 5), (8, 8))  # matrices: Muon takes no others
HEAD = ["optimizer", "groups x updates", "kernel calls", "bytes/element", "result"]

Make = Callable[[Any], torch.optim.Optimizer]
_FOREACH = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")


def rows() -> Iterator[tuple[str, Make]]:
    """Every optimizer of torch.optim with its defaults, foreach and loop, then ours."""
    for form, foreach in (("foreach", True), ("loop", False)):
        for name in _FOREACH:
            yield f"`torch.optim.{name}`, {form}", _made(torch.optim, name, foreach=foreach)
        momentum = _made(torch.optim, "SGD", momentum=0.9, nesterov=True, foreach=foreach)
        yield f"`torch.optim.SGD` with Nesterov momentum, {form}", momentum
    for name in ("Muon", "Adafactor", "LBFGS", "SparseAdam"):
        yield f"`torch.optim.{name}`", _made(torch.optim, name)
    yield "`torch.optim.Adam`, `AdamW`, `SGD`, `Adagrad` with `fused=True`", _made(torch.optim, "Adam", fused=True)
    for row in optimizers.one_each(optimizers.ROWS):
        yield f"`optimizers.{row.optimizer}`", functools.partial(_defaults, row)


def _defaults(row: optimizers.Row, params: Any) -> torch.optim.Optimizer:
    """All options but the learning rate have their defaults."""
    made: torch.optim.Optimizer = dataclasses.replace(row, options=row.rate).build(params)
    return made


def _made(module: Any, name: str, **options: Any) -> Make:
    return lambda params: getattr(module, name)(params, **options)


def row(label: str, make: Make) -> list[str]:
    """One line of the table, from a dry run."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = npu_fuse_pass.explain(make(params), platform="cpu")
    if report.fallback is not None:
        return [label, "–", "–", "–", f"**not fused**: {report.fallback}"]
    groups = " + ".join(f"{g.updates}" for g in report.groups)
    cells = [f"{len(report.groups)} ({groups})", str(sum(g.launches for g in report.groups)), _bytes(report)]
    left = dict.fromkeys(u.op for u in report.unfused)
    result = "fused" if not left else "**partly**: " + ", ".join(f"`{op}`" for op in left) + " stay as they are"
    return [label, *cells, result]


def _bytes(report: Any) -> str:
    return " + ".join(str(g.bytes_per_element) for g in report.groups)


def table() -> str:
    """The whole table as markdown."""
    cells: dict[str, list[str]] = {}
    for label, make in rows():
        name, _, form = label.rpartition(", ")
        made = row(label, make)[1:]
        if form == "loop" and cells[f"{name}, foreach"] == made:  # then one line tells of both
            cells = {name if k == f"{name}, foreach" else k: v for k, v in cells.items()}
        else:
            cells[label] = made
    lines: list[Sequence[str]] = [HEAD, ["---"] * len(HEAD), *([label, *rest] for label, rest in cells.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parts(text: str) -> tuple[str, str, str]:
    """What is before, between and after the markers."""
    before, found, rest = text.partition(BEGIN)
    between, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{PAGE.name} has no lines {BEGIN!r} and {END!r}: put them where the table belongs")
    return before, between.strip(), after


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if the page has another table")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    chosen = parser.parse_args(arguments)
    made = table()
    if not (chosen.check or chosen.write):
        print(made)
        return 0
    before, between, after = parts(PAGE.read_text(encoding="utf-8"))
    if chosen.write:
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
    elif between != made:
        new = [line for line in made.splitlines() if line not in between.splitlines()]
        print(f"{PAGE.name} has another table; run python scripts/support_table.py --write. New lines:", *new, sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
