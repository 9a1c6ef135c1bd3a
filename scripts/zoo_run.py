"""One class of scripts/zoo.py: compiled and eager, side by side, and what came of it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from zoo_classes import Class, construct

import npu_fuse_pass
from npu_fuse_pass import backend
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.tools import pace

STEPS, LR_AT = 6, 3  # compared steps; the one before which lr is halved
PLAIN_STEPS, PLAIN_LR_AT = 10, (3, 5, 8)  # the same of plain torch.compile
TIMED = 9  # steps after them
SETTLED = 1 + pace.ALL  # steps after which compile_step times nothing itself
CONTESTANTS = ("compile_step", "Inductor", "eager")
COMPILING = 4  # steps after them that may be looked at: the first that compiles nothing counts
TOLERANCE = 1e-4  # |a - b| / max|b|, float32
_LEFT = "outside of what was captured"
NUMBERS_LEFT = f"{_LEFT}, with single numbers alone"
EXACT = 1e-9  # the same in float64, where float32 is further apart
# how a step is made, of which the first counts that runs eagerly: without arguments; with a lr; with groups that say
# use_muon; with a closure; after a backward pass that can be differentiated; and on matrices alone
WAYS = ("plain", "lr", "muon", "closure", "graph", "matrices", "matrices, closure", "matrices, graph")

# operations that compute nothing: memory, views, and reading one number
_NOTHING = {
    *("alias", "as_strided", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "is_nonzero"),
    *("item", "lift_fresh", "_local_scalar_dense", "narrow", "reshape", "resolve_conj", "resolve_neg", "result_type"),
    *("select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view", "_to_copy"),
}

_CLOSURE = "closure"  # what its operations lie in
_OF_NUMBERS = " of numbers"  # what names of operations end with that compute with 0-dim tensors alone


class Twin:
    """A small model and an optimizer of it; two of them start the same and get the same gradients.

    `lr_at`: the steps before which lr is halved, counted from 1.
    """

    def __init__(
        self, library: str, cls: Class, way: str, dtype: torch.dtype = torch.float32, lr_at: tuple[int, ...] = (LR_AT,)
    ) -> None:
        torch.manual_seed(0)
        self.way, self.lr_at = way, lr_at
        if "matrices" in way or "large" in way:
            sizes = (256,) * 101 if "large" in way else (32, 16, 12, 24, 8)
            self.model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(sizes)))
            shape: tuple[int, ...] = (5, sizes[0])
        else:
            convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
            self.model = nn.Sequential(*convolution, nn.Linear(32, 10), nn.LayerNorm(10))
            shape = (5, 3, 4, 4)
        self.model.to(dtype)
        self.params = list(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(shape, generator=generator).to(dtype)
        self.gradients = [
            [(torch.randn(p.shape, generator=generator) * 0.1).to(dtype) for p in self.params] for _ in range(STEPS)
        ]
        given: Any = self.params
        if "muon" in way:
            matrices, rest = ([p for p in self.params if (p.ndim > 1) is yes] for yes in (True, False))
            given = [dict(params=matrices, use_muon=True), dict(params=rest, use_muon=False)]
        self.opt = construct(library, cls, given, self.model, **({"lr": 1e-3} if way == "lr" else {}))
        if callable(getattr(self.opt, "train", None)):
            self.opt.train()

    def step(self, function: Callable[..., Any], i: int) -> float:
        """Make step `i`, counted from 0; returns its seconds."""
        if i + 1 in self.lr_at:
            for group in self.groups():
                group["lr"] = group["lr"].mul_(0.5) if isinstance(group["lr"], Tensor) else group["lr"] * 0.5
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(100 + i)
        arguments = [self._closure(i)] if "closure" in self.way else []
        if not arguments:
            self._set_gradients(i)
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start

    def groups(self) -> Iterator[dict[str, Any]]:
        """Groups with a lr, each once: of the optimizer and of one that it wraps."""
        seen: list[Any] = []
        for opt in self._optimizers():
            for group in opt.param_groups:
                if group.get("lr") is not None and not any(group is s for s in seen):
                    seen.append(group)
                    yield group

    def _optimizers(self) -> list[Any]:
        found = [self.opt, *(getattr(self.opt, name, None) for name in ("optimizer", "base_optimizer"))]
        return [o for o in found if isinstance(o, torch.optim.Optimizer)]

    def _set_gradients(self, i: int) -> None:
        if "graph" in self.way:
            for p in self.params:
                p.grad = None
            self.model(self.x).square().mean().backward(create_graph=True)
            return
        for p, g in zip(self.params, self.gradients[i % STEPS], strict=True):
            if p.grad is None:
                p.grad = g.clone()
            else:
                p.grad.copy_(g)

    def _closure(self, i: int) -> Callable[..., Tensor]:
        def closure(*args: Any, **kwargs: Any) -> Tensor:
            with record_function(_CLOSURE):
                self._set_gradients(i)
                return torch.tensor(1.0 / (i + 1))

        return torch.compiler.disable(closure)  # type: ignore[no-any-return]

    def values(self) -> dict[str, Any]:
        """Copies of all tensors and numbers there are: parameters, states, groups."""
        found: dict[str, Any] = {}
        names = {id(p): f"parameter {i}" for i, p in enumerate(self.params)}

        def walk(name: str, value: Any) -> None:
            if isinstance(value, Tensor):
                plain = type(value) in (Tensor, nn.Parameter)
                found[name] = (value if plain else value.dequantize()).detach().clone()
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = value
            elif isinstance(value, dict):
                for key, inner in value.items():
                    walk(f"{name}.{names.get(id(key), '?') if isinstance(key, Tensor) else key}", inner)
            elif isinstance(value, (list, tuple, collections.deque)):
                for k, inner in enumerate(value):
                    walk(f"{name}.{k}", inner)

        for i, p in enumerate(self.params):
            walk(f"parameter {i}", p)
        for n, opt in enumerate(self._optimizers()):
            for p, state in opt.state.items():
                walk(f"optimizer {n}.state of {names.get(id(p), 'others')}", state)
            for k, group in enumerate(opt.param_groups):
                walk(f"optimizer {n}.group {k}", {key: v for key, v in group.items() if key != "params"})
        return found


def difference(got: dict[str, Any], want: dict[str, Any]) -> tuple[float, str]:
    """The largest relative difference and where it is; infinite where keys, shapes or dtypes differ."""
    if got.keys() != want.keys():
        return float("inf"), f"only one has {sorted(got.keys() ^ want.keys())[0]}"
    worst, where = 0.0, ""
    for name, y in want.items():
        x = got[name]
        if isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape, x.dtype) != (y.shape, y.dtype):
            return float("inf"), f"{name}: {tuple(x.shape)} {x.dtype}, eager {tuple(y.shape)} {y.dtype}"
        a, b = (_wide(v) for v in (x, y))
        if a.numel() and not torch.equal(a, b):
            same = torch.equal(a.isfinite(), b.isfinite())
            a, b = (t.nan_to_num(0, 0, 0) for t in (a, b))
            found = float((a - b).abs().max() / b.abs().max().clamp(min=1e-15)) if same else float("inf")
            worst, where = max((worst, where), (found, name))
    return worst, where


def _wide(value: Any) -> Tensor:
    t = torch.as_tensor(value)
    return torch.view_as_real(t).double() if t.is_complex() else t.double()


def operations(step: Callable[[], Any]) -> dict[str, int]:
    """ATen operations that compute something, as one step calls them; what its closure does is the model's."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        step()
    found: dict[str, int] = collections.Counter()
    for event in record.events() or ():
        above = [parent.name for parent in _parents(event)]
        outer = not above[:1] or not above[0].startswith("aten::")
        name = event.name.removeprefix("aten::")
        if name != event.name and outer and _CLOSURE not in above and name not in _NOTHING:
            small = not any(event.input_shapes) and _is_pointwise(name)
            found[name + _OF_NUMBERS * small] += 1
    return dict(found)


def _is_pointwise(name: str) -> bool:
    overloads = getattr(torch.ops.aten, name, None)
    return overloads is not None and any(
        torch.Tag.pointwise in getattr(overloads, overload).tags for overload in overloads.overloads()
    )


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


@dataclasses.dataclass
class Phase:
    """What the steps of one twin showed.

    Attributes:
        compiles: of steps 1, 2, ...: graphs with updates that were compiled.
        ran: reports of the graphs that ran in the step after the compared ones.
        left: operations that this step called outside of fused kernels.
        difference: to the eager twin, and where.
        microseconds: of a step, the median of those after the compared ones.
        breaks: why and where Dynamo broke graphs.
        refused: why compile_step gave up, where it did.
        error: of a step.
    """

    compiles: list[int] = dataclasses.field(default_factory=list)
    ran: list[CompileReport] = dataclasses.field(default_factory=list)
    causes: list[str] = dataclasses.field(default_factory=list)
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    difference: tuple[float, str] = (0.0, "")
    microseconds: float = 0.0
    first: float = 0.0
    breaks: list[str] = dataclasses.field(default_factory=list)
    refused: str = ""
    error: str = ""

    @property
    def storm(self) -> bool:
        return len(self.compiles) >= STEPS and all(self.compiles[LR_AT:STEPS])


def uncompiled() -> Any:
    """What a library compiles itself inside the block runs as Python."""
    return mock.patch("torch.compile", lambda model=None, **kwargs: model if model is not None else lambda f: f)


def eager(twin: Twin, timed: bool = True, steps: int = STEPS) -> tuple[list[dict[str, Any]], Phase]:
    """Values after each of the compared steps."""
    phase, values = Phase(), []
    with uncompiled():
        for i in range(steps):
            twin.step(twin.opt.step, i)
            values.append(twin.values())
        if timed:
            _measure(twin, twin.opt.step, phase)
    return values, phase


def compiled(twin: Twin, want: list[dict[str, Any]], function: Callable[..., Any], tracked: Any = None) -> Phase:
    """The steps of `function`, compared with `want`; `tracked` knows which graphs ran."""
    phase = Phase()
    try:
        for i in range(len(want)):
            npu_fuse_pass.clear_reports()
            seconds = twin.step(function, i)
            phase.first = phase.first or seconds
            made = [r for r in npu_fuse_pass.reports() if r.is_step]
            phase.compiles.append(len(made))
            phase.causes += [r.cause for r in made]
            phase.difference = max(phase.difference, difference(twin.values(), want[i]))
        if tracked is not None:
            if not phase.storm:
                _measure(twin, function, phase, tracked.ran)
            phase.ran = list(tracked.ran)
    except npu_fuse_pass.NotCapturedError as e:
        phase.refused = str(e)
    except Exception as e:
        phase.error = f"step {len(phase.compiles) + 1}: {type(e).__name__}: {_first_lines(str(e))}"
    phase.breaks = backend.breaks()
    return phase


def _measure(twin: Twin, function: Callable[..., Any], phase: Phase, ran: list[CompileReport] | None = None) -> None:
    twin.step(function, STEPS)
    for _ in range(COMPILING):
        if ran is not None:
            ran.clear()
        npu_fuse_pass.clear_reports()
        phase.left.clear()
        twin.step(lambda *args: phase.left.update(operations(lambda: function(*args))), STEPS + 1)
        made = [r for r in npu_fuse_pass.reports() if r.is_step]
        if not made:
            break
        phase.compiles.append(len(made))
    kept = list(ran or ())
    seconds = [twin.step(function, STEPS + 2 + k) for k in range(SETTLED + TIMED)]
    phase.microseconds = statistics.median(seconds[SETTLED:]) * 1e6
    if ran is not None:
        ran[:] = kept


def _first_lines(text: str) -> str:
    return " ".join(text.split())[:400]


def fused(library: str, cls: Class, way: str, want: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> Phase:
    """compile_step, and plain torch.compile where that refuses."""
    _forget()
    twin = Twin(library, cls, way, dtype)
    step = npu_fuse_pass.compile_step(twin.opt)
    phase = compiled(twin, want, step, step._tracked)
    if not phase.refused:
        return phase
    _forget()
    twin, tracked = Twin(library, cls, way, dtype), backend.TrackedBackend({})
    again = compiled(twin, want, backend.isolated(twin.opt.step, tracked), tracked)
    again.refused, again.breaks = phase.refused, list(dict.fromkeys([*phase.breaks, *again.breaks]))
    return again


def baseline(
    library: str, cls: Class, way: str, want: list[dict[str, Any]], lr_at: tuple[int, ...] = (LR_AT,)
) -> Phase:
    """The same steps through torch.compile(backend="eager")."""
    _forget()
    twin = Twin(library, cls, way, lr_at=lr_at)
    return compiled(twin, want, torch.compile(twin.opt.step, backend="eager"))


def _forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.graph_break_reasons.clear()
    npu_fuse_pass.clear_reports()


Measure = Callable[[str, Class, str, list[dict[str, Any]], Phase], dict[str, Any]]


def run(library: str, name: str, cls: Class) -> dict[str, Any]:
    """Everything about one class, as JSON."""
    return _row(library, name, cls, _everything)


def run_plainly(library: str, name: str, cls: Class) -> dict[str, Any]:
    """How often `torch.compile(opt.step, backend="npu_fused")` compiles in ten steps with three changes of lr."""
    return _row(library, name, cls, _plainly, PLAIN_STEPS, PLAIN_LR_AT)


def run_beside_inductor(library: str, name: str, cls: Class) -> dict[str, Any]:
    """Microseconds of a step by compile_step, by torch.compile with Inductor, and eager: small, and 100 x 64K."""
    return _row(library, name, cls, _beside_inductor)


def _row(
    library: str, name: str, cls: Class, measure: Measure, steps: int = STEPS, lr_at: tuple[int, ...] = (LR_AT,)
) -> dict[str, Any]:
    """What is measured of the first way in which steps run eagerly, or why there is none."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    errors = []
    for way in WAYS:
        try:
            twin = Twin(library, cls, way, lr_at=lr_at)
            start = twin.values()
            want, plain = eager(twin, steps=steps)
            if all(torch.equal(want[-1][k], start[k]) for k in start if k.startswith("parameter")):
                raise RuntimeError("no parameter changed")
            break
        except Exception as e:
            errors.append(f"{type(e).__name__}: {_first_lines(str(e))}")
    else:
        return {"library": library, "name": name, "result": "not run", "why": [errors[0]]}
    return {"library": library, "name": name, **measure(library, cls, way, want, plain)}


def _everything(library: str, cls: Class, way: str, want: list[dict[str, Any]], plain: Phase) -> dict[str, Any]:
    ours = fused(library, cls, way, want)
    dynamo, rounding = None, False
    if ours.error or ours.difference[0] > TOLERANCE:
        dynamo = baseline(library, cls, way, want)
        rounding = not ours.error and _differs_by_rounding(library, cls, way)
    result, why = verdict(ours, plain, dynamo, rounding)
    return {
        "way": way,
        "result": result,
        "why": why,
        "compiles": ours.compiles,
        "graphs": len(ours.ran),
        "groups": sum(len(r.groups) for r in ours.ran),
        "kernels": sum(g.launches for r in ours.ran for g in r.groups),
        "left": ours.left,
        "operations": sum(plain.left.values()),
        "difference": ours.difference,
        "dynamo": dynamo and (dynamo.error or dynamo.difference),
        "rounding": rounding,
        "refused": ours.refused,
        "first": ours.first,
        "microseconds": ours.microseconds,
        "eager_microseconds": plain.microseconds,
    }


def _plainly(library: str, cls: Class, way: str, want: list[dict[str, Any]], plain: Phase) -> dict[str, Any]:
    phase = plainly(library, cls, way, want)
    total = sum(phase.compiles)
    result = f"{total} compile{'s' * (total > 1)}" if total else "none"
    apart = f"{phase.difference[1]} differs by {phase.difference[0]:.1e}" if phase.difference[0] > TOLERANCE else ""
    rounding = bool(apart) and _differs_by_rounding(library, cls, way, plainly, PLAIN_LR_AT)
    told = [f"{apart}, not in {STEPS} steps of float64"] if rounding else []
    if phase.error or (apart and not rounding):
        result = phase.error or apart
        dynamo = baseline(library, cls, way, want, PLAIN_LR_AT)
        told = ['so it is with backend="eager"' if dynamo.error or dynamo.difference[0] > TOLERANCE else "only here"]
    if phase.storm:
        too = "so it is" if fused(library, cls, way, want[:STEPS]).storm else "not so"
        told.append(f"compiled until torch stops, then eager; {too} with compile_step(opt)")
    causes = [cause for cause in dict.fromkeys(phase.causes) if cause != "compile"]
    most = max((int(n) for cause in causes for n in re.findall(r"compile (\d+) of this code", cause)), default=1)
    made = phase.compiles if total else []
    return {"result": result, "compiles": made, "most": most, "why": [*told, *causes, *phase.breaks[:1]]}


def plainly(
    library: str, cls: Class, way: str, want: list[dict[str, Any]], dtype: torch.dtype = torch.float32
) -> Phase:
    """Plain torch.compile."""
    _forget()
    twin = Twin(library, cls, way, dtype, PLAIN_LR_AT)
    return compiled(twin, want, torch.compile(twin.opt.step, backend="npu_fused"))


def _beside_inductor(library: str, cls: Class, way: str, want: list[dict[str, Any]], plain: Phase) -> dict[str, Any]:
    row: dict[str, Any] = {size: _in_turns(library, cls, w) for size, w in (("small", way), ("large", f"{way}, large"))}
    failed = [f"{size}, {label}: {t}" for size in row for label, t in row[size].items() if isinstance(t, str)]
    return {**row, "result": "timed", "why": failed}


def _in_turns(library: str, cls: Class, way: str) -> dict[str, float | str]:
    """Microseconds of a step of each contestant, or why there are none; they step in turns."""
    _forget()
    twins = {label: Twin(library, cls, way) for label in CONTESTANTS}
    steps = {
        "compile_step": npu_fuse_pass.compile_step(twins["compile_step"].opt),
        "Inductor": torch.compile(twins["Inductor"].opt.step),
        "eager": twins["eager"].opt.step,
    }
    times: dict[str, list[float]] = {label: [] for label in CONTESTANTS}
    failed: dict[str, float | str] = {}
    for k in range(SETTLED + TIMED):
        for label in [name for name in CONTESTANTS if name not in failed]:
            try:
                times[label].append(twins[label].step(steps[label], k))
            except Exception as e:
                failed[label] = f"{type(e).__name__}: {_first_lines(str(e))}"
    return {k: statistics.median(v[SETTLED:]) * 1e6 for k, v in times.items() if k not in failed} | failed


def _differs_by_rounding(
    library: str, cls: Class, way: str, run: Callable[..., Phase] | None = None, lr_at: tuple[int, ...] = (LR_AT,)
) -> bool:
    """Whether the same steps agree in float64, so that only float32's roundings, enlarged, lie between them."""
    try:
        want, _ = eager(Twin(library, cls, way, torch.float64, lr_at), timed=False)
        return (run or fused)(library, cls, way, want, torch.float64).difference[0] < EXACT
    except Exception:  # a class that fails in float64 shows nothing about rounding: the difference stays one
        return False


def verdict(ours: Phase, plain: Phase, dynamo: Phase | None, rounding: bool) -> tuple[str, list[str]]:
    """One of: fused | fused with k compiles | partly | not reached | wrong | crash; and why not all is fused."""
    if ours.error:
        if dynamo is not None and dynamo.error:
            return "not reached", [f'torch.compile itself fails, with backend="eager" too: {dynamo.error}']
        return "crash", [ours.error]
    told = []
    if ours.difference[0] > TOLERANCE and not rounding:
        if dynamo is None or not (dynamo.error or dynamo.difference[0] > TOLERANCE):
            return "wrong", [f"{ours.difference[1]} differs by {ours.difference[0]:.1e}"]
        told = ['differs, and so it does with backend="eager"']
    reasons = [str(reason) for r in ours.ran for reason in r.reasons]
    total = sum(ours.compiles)
    if not total:
        return "not reached", [ours.refused or "Dynamo skips the step", *ours.breaks[:3]]
    if ours.storm:
        return "partly", [*told, f"compiles anew at every step: {ours.causes[-1]}", *reasons]
    if not ours.ran:
        return "partly", [*told, "steps run eagerly after the first ones", *ours.breaks[:3]]
    if reasons:
        return "partly", list(dict.fromkeys([*told, *reasons, *ours.breaks[:2]]))
    if not any(r.groups for r in ours.ran):
        return "not reached", [*told, *ours.breaks[:3]]
    if sum(ours.left.values()) > 0:
        text = f"{NUMBERS_LEFT}: " if all(op.endswith(_OF_NUMBERS) for op in ours.left) else f"{_LEFT}: "
        most = sorted(ours.left.items(), key=lambda item: -item[1])[:6]
        text += ", ".join(f"{op.removesuffix(_OF_NUMBERS)} x{n}" for op, n in most)
        return "partly", [*told, text, *ours.breaks[:3]]
    if total == 1:
        return "fused", told
    parts = ours.causes.count("compile")
    apart = [f"{parts} parts of its code are compiled by themselves", *ours.breaks[:1]] if parts > 1 else []
    again = [f"compiled again: {cause}" for cause in dict.fromkeys(ours.causes) if cause != "compile"]
    return f"fused with {total} compiles", [*told, *apart, *again[:2]]
