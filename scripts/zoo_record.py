"""What a recorder of eager steps, without Dynamo, would make of an optimizer: `python scripts/zoo.py --record`.

A recorder lets the optimizer's own Python run at every step, answers its calls from what an earlier step did, and runs
them as fused kernels when something reads a value or the step ends. Nothing here is one: it counts what one would fuse,
and measures how long its two parts would take at least: the step's Python, its calls answered from a tape, and the
kernels. What a recorder has to do besides, comparing every call with the expected one, is not in that.
"""

from __future__ import annotations

import collections
import functools
import operator
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from zoo_classes import Class
from zoo_run import WAYS, Twin, uncompiled

import npu_fuse_pass
from npu_fuse_pass import backend, pipeline
from npu_fuse_pass.options import Options

BEFORE = 6  # steps before the one that is written down, so that warm-ups are over
TIMED = 7  # the fastest of so many counts
COMPILING = 45  # seconds that the compiles of one size may take
READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
_ANSWERS = (Tensor, tuple, list, bool, int, float, torch.dtype, torch.device)
Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Operations(TorchDispatchMode):
    """The operations of a step, in stretches between reads of what the step itself has computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stretches: list[list[Call]] = [[]]
        self._computed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func._schema.name.startswith("aten::"):
            return func(*args, **kwargs)
        if func._schema.name in READS:
            if any(id(t) in self._computed for t in tree_leaves(args)):
                self.stretches.append([])
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self._computed |= {id(t) for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.stretches[-1].append((func, args, kwargs, out))
        return out


class Calls(TorchFunctionMode):
    """The calls that a step's Python makes, and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made.append((func, out))
        return out


class Answers(TorchFunctionMode):
    """Answers the calls of a step with what they gave before; computes nothing."""

    def __init__(self, made: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self._made, self._next, self.other = made, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        i = self._next
        self._next = i + 1
        if i < len(self._made):
            expected, out = self._made[i]
            if expected is func or expected == func:
                return out if isinstance(out, _ANSWERS) else func(*args, **(kwargs or {}))
        self.other = True
        return func(*args, **(kwargs or {}))


def graph_of(calls: list[Call]) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph of calls, and its arguments."""
    graph, nodes, given = fx.Graph(), dict[int, fx.Node](), list[Tensor]()
    made: set[int] = set()
    for *_, args, kwargs, out in calls:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and id(t) not in made and id(t) not in nodes:
                nodes[id(t)] = graph.placeholder(f"t{len(given)}")
                nodes[id(t)].meta["val"] = nodes[id(t)].meta["example_value"] = t
                given.append(t)
        made |= {id(t) for t in tree_leaves(out) if isinstance(t, Tensor)}

    def node(value: Any) -> Any:
        return nodes[id(value)] if isinstance(value, Tensor) else value

    for func, args, kwargs, out in calls:
        call = graph.call_function(func, tree_map(node, args), tree_map(node, kwargs))
        call.meta["val"] = call.meta["example_value"] = out
        for i, t in enumerate(out if isinstance(out, (list, tuple)) else ()):
            if isinstance(t, Tensor) and id(t) not in nodes:
                nodes[id(t)] = graph.call_function(operator.getitem, (call, i))
                nodes[id(t)].meta["val"] = nodes[id(t)].meta["example_value"] = t
        if isinstance(out, Tensor) and id(out) not in nodes:
            nodes[id(out)] = call
    graph.output(())
    return fx.GraphModule(torch.nn.Module(), graph), given


def step_under(opt: Any, mode: Any) -> Callable[..., Any]:
    """The step under a mode, a closure outside of it."""

    def apart(closure: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return closure(*args, **kwargs)

        return called

    def step(*closures: Any) -> None:
        with mode:
            opt.step(*map(apart, closures))

    return step


def run(library: str, name: str, cls: Class) -> dict[str, Any]:
    """What is known of one class, as JSON.

    stretches, whole: how many there are between reads of values; whether all operations of all of them would be fused.
    calls: that a recorder would intercept. small, large: microseconds of a step, see `_times`.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"library": library, "name": name, "result": "not run", "why": []}
    with uncompiled():
        for way in WAYS:
            try:
                recorded = Recorded(Twin(library, cls, way))
                break
            except Exception as e:
                row["why"].append(f"{type(e).__name__}: {e}"[:200])
        else:
            return row
    row |= {"stretches": len(recorded.stretches), "calls": len(recorded.calls.made), "why": recorded.why}
    if not recorded.groups or recorded.why:
        return row | {"result": "partly" if recorded.groups else "nothing"}
    row |= {"result": "one stretch" if len(recorded.stretches) == 1 else "several stretches"}
    try:
        row["small"] = _times(library, cls, way, recorded)
        with uncompiled():
            large = Recorded(Twin(library, cls, f"{way}, large"))
        row["large"] = _times(library, cls, f"{way}, large", large)
    except Exception as e:
        row["why"].append(f"{'large' if 'small' in row else 'small'}: {type(e).__name__}: {e}"[:200])
    return row


class Recorded:
    """A step that was written down: its calls, the operations in stretches, and what would not be fused of them."""

    def __init__(self, twin: Twin) -> None:
        for i in range(BEFORE):
            twin.step(twin.opt.step, i)
        operations, self.calls = Operations(), Calls()
        twin.step(step_under(twin.opt, operations), BEFORE)
        twin.step(step_under(twin.opt, self.calls), BEFORE + 1)
        self.twin = twin
        self.stretches = [graph_of(calls) for calls in operations.stretches if calls]
        self.why: list[str] = []
        self.groups = 0
        with torch.no_grad():
            for graph, _ in self.stretches:
                report = pipeline.fuse_graph(graph, Options("cpu")).report
                self.groups += len(report.groups)
                self.why += [str(reason) for reason in (*report.reasons, *report.fallbacks)]
        self.why = list(dict.fromkeys(self.why))[:4]


def _times(library: str, cls: Class, way: str, recorded: Recorded) -> dict[str, int | None]:
    """Microseconds of this thread, the least of some steps; None: not known.

    eager: the step as it is; now: of compile_step, None where that gives up or compiles for too long; python: the
    step's own Python under a mode that answers all of its calls, None where it makes others; kernels: of the stretches.
    """
    twin = recorded.twin
    eager = min(_seconds(twin, twin.opt.step) for _ in range(TIMED))
    kernels = 0.0
    with torch.no_grad():
        for graph, given in recorded.stretches:
            program = functools.partial(backend.npu_fused(graph, given), *given)
            program()
            kernels += min(_seconds(None, program) for _ in range(TIMED))
    modes = [Answers(recorded.calls.made) for _ in range(TIMED)]
    answered = min(_seconds(twin, step_under(twin.opt, mode)) for mode in modes)
    python = None if any(mode.other for mode in modes) else answered
    found = dict(eager=eager, python=python, kernels=kernels, now=_now(Twin(library, cls, way)))
    return {name: None if seconds is None else round(1e6 * seconds) for name, seconds in found.items()}


def _seconds(twin: Twin | None, function: Callable[..., Any]) -> float:
    """Of this thread, so that what else the machine does is not in it."""
    spent = 0.0

    def timed(*args: Any) -> None:
        nonlocal spent
        start = time.thread_time()
        function(*args)
        spent = time.thread_time() - start

    if twin is None:
        timed()
    else:
        twin.step(timed, BEFORE + 2)
    return spent


def _now(twin: Twin) -> float | None:
    def over(*args: Any) -> None:
        raise TimeoutError(f"compiles took more than {COMPILING} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(COMPILING)
    try:
        step = npu_fuse_pass.compile_step(twin.opt)
        for i in range(BEFORE + 2):
            twin.step(step, i)
        return min(_seconds(twin, step) for _ in range(TIMED))
    except Exception:  # what does not compile in time, or does not run, has no time to compare
        return None
    finally:
        signal.alarm(0)


def unfused(page: str) -> list[str]:
    """Classes of docs/zoo.md that are not wholly fused."""
    names, library = [], ""
    for line in page.splitlines():
        if line.startswith("## "):
            library = line[3:]
        cells = [cell.strip() for cell in line.split(" | ")]
        if library and len(cells) > 2 and cells[1] in ("partly", "not reached"):
            names.append(f"{library}.{cells[0].removeprefix('| ')}")
    return names


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Those that a recorder would fuse wholly, with times; the others by number."""
    lines = ["| class | stretches | calls | eager | now | recorded | eager | now | recorded |", "|---" * 9 + "|"]
    whole = [row for row in rows if "small" in row]
    for row in whole:
        times = " | ".join(_cells(row.get(size)) for size in ("small", "large"))
        lines.append(f"| {row['library']}.{row['name']} | {row['stretches']} | {row['calls']} | {times} |")
    counts = collections.Counter(row["result"] for row in rows)
    return "\n".join([*lines, "", ", ".join(f"{n} {result}" for result, n in counts.most_common())])


def _cells(times: dict[str, Any] | None) -> str:
    if times is None:
        return "– | – | –"
    recorded = None if times["python"] is None else times["python"] + times["kernels"]
    return " | ".join("–" if t is None else f"{t}" for t in (times["eager"], times["now"], recorded))
