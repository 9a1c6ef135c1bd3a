"""The public zoo: optimizers that nobody here wrote, compiled with backend="npu_fused". scripts/zoo.sh makes its
environment and runs it.

python scripts/zoo.py                        # every class, a row for each in zoo-output/results.jsonl; then docs/zoo.md
python scripts/zoo.py --only timm.optim.Lion,optimi --again
python scripts/zoo.py --sample               # 30 classes, which have to show what zoo_classes.SAMPLE says
python scripts/zoo.py --page                 # docs/zoo.md from the rows there are
python scripts/zoo.py --plain                # how often plain torch.compile compiles them: a section of the page
python scripts/zoo.py --inductor             # times of those 30 by compile_step, Inductor and eager: another section
python scripts/zoo.py --record               # what a recorder would make of what docs/zoo.md has not wholly fused

A class that has a row is not run again. Every class has a process and a time limit of its own.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental.symbolic_shapes
import zoo_record
import zoo_run
from zoo_classes import LIBRARIES, SAMPLE, Class, classes

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "zoo-output"
PAGE = ROOT / "docs" / "zoo.md"
SECONDS = 240  # for one class
RESULTS = ("fused", "fused with", "partly", "not reached", "wrong", "crash", "not run")
_FORK = multiprocessing.get_context("fork")

Row = dict[str, Any]
Wanted = Callable[[str, str], bool]
Measure = Callable[[str, str, Class], Row]


def run_library(library: str, wanted: Wanted, jobs: int, results: pathlib.Path, measure: Measure) -> None:
    """Import a library once, and fork a process for each of its classes."""
    try:
        found = classes(library)
    except Exception as e:
        _write(results, {"library": library, "name": "*", "result": "not run", "why": [f"{type(e).__name__}: {e}"]})
        return
    waiting = [(name, cls) for name, cls in sorted(found.items()) if wanted(library, name)]
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Running(library, *waiting.pop(0), measure))
        time.sleep(0.05)
        for one in [r for r in running if r.over()]:
            running.remove(one)
            _write(results, one.row())


class _Running:
    """The process of one class."""

    def __init__(self, library: str, name: str, cls: Class, measure: Measure) -> None:
        self._about = {"library": library, "name": name}
        self._file = pathlib.Path(tempfile.mkstemp(suffix=".json")[1])
        self._started = time.monotonic()
        self._process = _FORK.Process(target=_child, args=(library, name, cls, measure, self._file))
        sys.stdout.flush()
        self._process.start()

    def over(self) -> bool:
        if self._process.is_alive() and time.monotonic() - self._started > SECONDS and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the compilers that it started
            self._process.join()
        return not self._process.is_alive()

    def row(self) -> Row:
        text = self._file.read_text(encoding="utf-8")
        self._file.unlink()
        spent = time.monotonic() - self._started
        why = f"the process ended with {self._process.exitcode} after {spent:.0f} s (limit: {SECONDS} s)"
        row = json.loads(text) if text else {**self._about, "result": "not run", "why": [why]}
        return {**row, "seconds": round(spent, 1)}


def _child(library: str, name: str, cls: Class, measure: Measure, file: pathlib.Path) -> None:
    os.setsid()
    with (file.parent / f"{file.stem}.log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    pathlib.Path(log.name).unlink()
    file.write_text(json.dumps(measure(library, name, cls), default=str), encoding="utf-8")
    os._exit(0)


def _write(results: pathlib.Path, row: Row) -> None:
    with results.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    why = "; ".join(row["why"])[:150]
    print(f"{_full_name(row)}: {row['result']}, {row.get('seconds', 0):.0f} s  {why}", flush=True)


def rows_of(results: pathlib.Path) -> dict[str, Row]:
    """The newest row of every class."""
    if not results.exists():
        return {}
    rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {_full_name(row): row for row in rows}


def run(
    libraries: Iterable[str], wanted: Wanted, jobs: int, results: pathlib.Path, measure: Measure = zoo_run.run
) -> None:
    """Run the libraries one after the other, each in a process of its own."""
    for library in libraries:
        process = _FORK.Process(target=run_library, args=(library, wanted, jobs, results, measure))
        process.start()
        process.join()


def check_sample(jobs: int) -> int:
    """Run the sample; the exit status says whether all is as expected."""
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder) / "results.jsonl"
        libraries = list(dict.fromkeys(name.rpartition(".")[0] for name in SAMPLE))
        run(libraries, lambda library, name: f"{library}.{name}" in SAMPLE, jobs, results)
        rows = rows_of(results)
    failed = 0
    for name, expected in SAMPLE.items():
        row = rows.get(name, {"result": "not run", "why": ["the library does not offer it"]})
        if rank(row["result"]) > rank(expected):
            failed += 1
            print(f"{name}: expected {expected!r}, got {row['result']!r}: {'; '.join(row['why'])}")
        elif row["result"] != expected:
            print(f"{name}: {row['result']!r} is better than {expected!r}: write that into scripts/zoo_classes.py")
    print(f"{len(SAMPLE) - failed} of {len(SAMPLE)} classes as expected, or better")
    return 1 if failed else 0


def rank(result: str) -> tuple[int, int]:
    """Results in order, the best first."""
    kind = _kind(result)
    return RESULTS.index(kind), int(result.split()[2]) if kind == "fused with" else 0


def page(rows: Sequence[Row]) -> str:
    """docs/zoo.md."""
    ran = [row for row in rows if row["result"] != "not run"]
    counts = collections.Counter(_kind(row["result"]) for row in rows)
    whole = counts["fused"] + counts["fused with"]
    known = [f"{name} {_version(name)}" for name in LIBRARIES.values() if _version(name)]
    libraries = len({row["library"] for row in ran})
    missing = [name for name in LIBRARIES if all(row["library"] != name for row in rows)]
    numbers = sum(any(text.startswith(zoo_run.NUMBERS_LEFT) for text in row["why"]) for row in rows)
    lines = [
        "# Optimizers that nobody here wrote",
        "",
        f"{len(ran)} classes of {libraries} public libraries, as their users construct them: {whole} wholly fused, "
        f"{counts['partly']} partly, {counts['not reached']} not reached, {counts['wrong']} wrong, "
        f"{counts['crash']} crashing."
        + (f" Of those partly, {numbers} leave nothing outside but operations with single numbers." if numbers else "")
        + (f" These libraries have no rows yet: {', '.join(missing)}." if missing else ""),
        "",
        "| result | classes |",
        "|---|---|",
        f"| fused, one compile | {counts['fused']} |",
        f"| fused with k compiles | {counts['fused with']} |",
        *(f"| {result} | {counts[result]} |" for result in RESULTS[2:]),
        "",
        f"Made by `bash scripts/zoo.sh` on {datetime.date.today().isoformat()} with torch {torch.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores ({platform.machine()}), one thread. Libraries: "
        + ", ".join(known)
        + ".",
        "",
        _HOW,
        "",
    ]
    for library in LIBRARIES:
        own = sorted((row for row in rows if row["library"] == library), key=lambda row: str(row["name"]).lower())
        if own:
            lines += [f"## {library}", "", *_table(own), ""]
    return "\n".join(lines)


_HOW = f"""Each class steps six times through `compile_step` (`torch.compile` where that refuses) on a convolution, a
linear layer and a LayerNorm (6 parameters; four matrices where a class takes only those), lr halved before the third
step. After every step all parameters, states and numbers of the groups are compared with an eager twin's: at most
{zoo_run.TOLERANCE:g} apart, relative to the largest element. Where they are not, or a step fails, `backend="eager"`
runs the same steps, and float64 does: *wrong* and *crash* are what only this backend does.

- *fused*: in the steps after these, every operation that computes something is in a fused kernel; with more than one
  compile, the last column says why.
- *partly*: some are not; the last column says which and where. *With single numbers alone* are operations with 0-dim
  tensors (a step counter, a warmed-up lr) in Python that Dynamo skips.
- *not reached*: no update came to the backend.
- *not run*: not even eagerly, or not within {SECONDS} s.

A class that was not run again keeps the row of an earlier run, which may be of an older package.

Times are medians of later steps on a machine that others used; with parameters this small they show the cost of
calls, not of memory."""


_PLAIN, _INDUCTOR = "## Plain torch.compile", "## Beside Inductor"


def beside(rows: Sequence[Row]) -> str:
    """What docs/zoo.md says of Inductor."""
    told = (
        "Microseconds of a step of the 30 classes that CI runs, by `compile_step`, by `torch.compile(opt.step)` and "
        "eagerly, which step in turns, on the small model and on 100 parameters of 64K elements; – where a step fails "
        f"(`bash scripts/zoo.sh --inductor` on {datetime.date.today().isoformat()} with torch {torch.__version__}, "
        "one thread)."
    )
    sizes = [(size, label) for size in ("small", "large") for label in zoo_run.CONTESTANTS]
    lines = [_INDUCTOR, "", textwrap.fill(told, 120), ""]
    lines.append(f"| class | {' | '.join(f'{label}, {size}' for size, label in sizes)} |")
    lines.append("|---" * (1 + len(sizes)) + "|")
    for row in sorted(rows, key=_full_name):
        times = [row.get(size, {}).get(label) for size, label in sizes]
        cells = [f"{t:.0f}" if isinstance(t, float) else "–" for t in times]
        lines.append(f"| {_full_name(row)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def section(rows: Sequence[Row]) -> str:
    """What docs/zoo.md says of plain torch.compile."""
    rows = [row for row in rows if row["result"] != "not run"]
    whole = [row for row in rows if row.get("compiles")]
    twice = sum(1 for row in whole if row["most"] <= 2)
    missing = [name for name in LIBRARIES if all(row["library"] != name for row in rows)]
    others = sorted((row for row in rows if row["result"] not in _FEW), key=_full_name)
    told = (
        f'{len(rows)} classes through `torch.compile(opt.step, backend="npu_fused")`: {zoo_run.PLAIN_STEPS} steps, '
        f"each compared as above, with {len(zoo_run.PLAIN_LR_AT)} changes of lr (`bash scripts/zoo.sh --plain` on "
        f"{datetime.date.today().isoformat()} with torch {torch.__version__}). {len(whole)} reach the backend, and "
        f"{twice} of these compile no part more than twice; a part is the step, or what Dynamo compiles by itself of a "
        "step that it breaks. The first compile makes states, the second finds them, or a lr that has changed."
        + (f" Not run: {', '.join(missing)}." if missing else "")
    )
    return "\n".join(
        [
            _PLAIN,
            "",
            textwrap.fill(told, 120),
            "",
            "| result | classes |",
            "|---|---|",
            *(f"| {result} | {sum(1 for row in rows if row['result'] == result)} |" for result in _FEW),
            f"| others, below | {len(others)} |",
            "",
            "| class | result | at each step | causes of what is not a part's first compile, or the first break |",
            "|---|---|---|---|",
            *map(_line, others),
            "",
        ]
    )


_FEW = ("1 compile", "2 compiles")


def _line(row: Row) -> str:
    made = row.get("compiles", [])
    why = "; ".join(map(_cell, row["why"][:4]))
    return f"| {_full_name(row)} | {_cell(row['result'])} | {' '.join(map(str, made))} | {why} |"


def _full_name(row: Row) -> str:
    return f"{row['library']}.{row['name']}"


def _kind(result: str) -> str:
    return "fused with" if result.startswith("fused with") else result


def _table(rows: Sequence[Row]) -> list[str]:
    head = "| class | result | kernels | step, us | eager, us | why not all is fused, or not at once |"
    lines = [head, "|---" * 6 + "|"]
    for row in rows:
        timed = row.get("microseconds") and row.get("eager_microseconds")
        times = f"{row['microseconds']:.0f} | {row['eager_microseconds']:.0f}" if timed else "– | –"
        why = "; ".join(map(_cell, row["why"][:4]))
        lines.append(f"| {row['name']} | {row['result']} | {row.get('kernels') or '–'} | {times} | {why} |")
    return lines


def _cell(text: str) -> str:
    """One reason, short, without what breaks a table or tells of this machine."""
    for path in sorted({str(ROOT), sys.prefix, *sys.path} - {"", "/"}, key=len, reverse=True):
        text = text.replace(path + "/", "")
    text = re.sub(r"[^\s(]*site-packages/", "", text)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 220 else text[:217] + "..."


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _parts(text: str) -> dict[str, str]:
    """A page's sections that are made by themselves, by their titles in order; "": what is ahead of them."""
    parts = {"": text, _INDUCTOR: "", _PLAIN: ""}
    for title in (_PLAIN, _INDUCTOR):
        parts[""], found, rest = parts[""].partition(title)
        parts[title] = found + rest
    return parts


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="run 30 classes and check their results")
    parser.add_argument("--only", default="", help="libraries or classes, separated by commas")
    parser.add_argument("--again", action="store_true", help="run classes again that have a row")
    parser.add_argument("--page", action="store_true", help="only write docs/zoo.md")
    parser.add_argument("--plain", action="store_true", help="count what plain torch.compile compiles")
    parser.add_argument("--inductor", action="store_true", help="time steps beside Inductor's")
    parser.add_argument("--record", action="store_true", help="what a recorder would make of what is not wholly fused")
    parser.add_argument("--jobs", type=int, default=1, help="classes at a time")
    chosen = parser.parse_args()
    if chosen.sample:
        return check_sample(chosen.jobs)
    OUTPUT.mkdir(exist_ok=True)
    measures = {"record": zoo_record.run, "plain": zoo_run.run_plainly, "inductor": zoo_run.run_beside_inductor}
    kind = next((kind for kind in measures if vars(chosen)[kind]), "results")
    measure, results = measures.get(kind, zoo_run.run), OUTPUT / f"{kind}.jsonl"
    if not chosen.page:
        only = [name for name in chosen.only.split(",") if name]
        if chosen.inductor and not only:
            only = list(SAMPLE)
        if chosen.record and not only:
            only = zoo_record.unfused(PAGE.read_text(encoding="utf-8"))
        done = set() if chosen.again else rows_of(results).keys()

        def wanted(library: str, name: str) -> bool:
            full = f"{library}.{name}"
            return full not in done and (not only or library in only or full in only)

        asked = [name for name in LIBRARIES if not only or any(o == name or o.startswith(f"{name}.") for o in only)]
        run(asked, wanted, chosen.jobs, results, measure)
    if chosen.record:
        print(zoo_record.table(list(rows_of(results).values())))
        return 0
    parts = _parts(PAGE.read_text(encoding="utf-8"))
    title, made = {"plain": (_PLAIN, section), "inductor": (_INDUCTOR, beside)}.get(kind, ("", page))
    parts[title] = made(list(rows_of(results).values()))
    PAGE.write_text("\n\n".join(part.strip("\n") for part in parts.values() if part) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
