"""One program, a list of lines of Python, run eagerly and compiled from equal values: the first difference.

It needs torch, the package and its optimizers alone: a script that reproduces a finding begins with this file.
"""

from __future__ import annotations

import os

os.environ.setdefault("NPU_FUSE_VERIFY", "1")  # internal errors are findings, not fallbacks

# ruff: noqa: F401 (programs use these)
import collections
import concurrent.futures
import copy
import dataclasses
import gc
import itertools
import math
import pathlib
import pickle
import sys
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALF = (F16, BF16)
# |a - b| <= relative |b| + absolute, after up to eight steps of values about 1
LIMITS = {F64: (1e-12, 1e-12), F32: (2e-5, 2e-6), F16: (2**-10, 2**-14), BF16: (2**-7, 2**-11)}
# where ATen's half precision is not in whole vectors it rounds every operation once more
CAPTURED = (2e-5, 2e-5)  # in float32, of torch's own graph: its numbers are rounded to float32, too
LOOSE = {F16: (2**-7, 2**-7), BF16: (2**-4, 2**-4)}
SCALAR = ("strided", "expanded", "torch.stack(", "view(")  # of lines
MEET = ("closure(", "= clipped(")  # of lines: all parameters change each other's gradients, or updates
NUDGES, AS_MUCH = 4, 8  # so many runs from values an ulp off; a difference so many times as large as theirs counts
_RUNS = itertools.count()
STEPS = ("step(", "in_thread(step", "in_mode(", "opt.step(", "several_threads(")  # lines that step


@npu_fuse_pass.rule(
    states={"buf": npu_fuse_pass.zeros},
    defaults=dict(lr=0.1, mu=0.9, weight_decay=0.01),
    totals={"squares": npu_fuse_pass.total(lambda grad: grad.double().square().sum())},
)
def clipped(param, grad, buf, *, squares, lr, mu, weight_decay, step):  # type: ignore[no-untyped-def]
    """Momentum on gradients that are clipped by their common norm."""
    buf = mu * buf + grad / (1 + squares.sqrt()) + weight_decay * param
    return param - lr * buf / step.sqrt(), buf


class Drawing(torch.optim.Optimizer):
    """Constants and draws in a step, as libraries write them."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, k=0))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        keep = torch.tensor([0.9, 0.5])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s["m"], s["mean"] = torch.zeros_like(p), torch.tensor([0.25], dtype=p.dtype)
                s["mean"] += 1
                s["m"].mul_(keep[0].item() if group["k"] else 0.9).add_(p.grad, alpha=0.1)
                noise = torch.empty_like(p).uniform_() * torch.full_like(p, 0.125)
                p.add_(s["m"] + noise * torch.as_tensor([[0.5]]).view(()), alpha=-group["lr"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


class Counting(torch.optim.Optimizer):
    """Python numbers in states, as libraries keep them, and nothing else."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, mu=0.9))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                s["step"] = s.get("step", 0) + 1
                s["scale"] = s.get("scale", 1.0) * group["mu"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(p.grad, alpha=-group["lr"] * s["scale"] / math.sqrt(s["step"]))
        return loss


class Keeping(torch.optim.Optimizer):
    """States of every kind: None, truths, lists and tuples of tensors, masks, views of a buffer."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, mu=0.9))

    def _init_group(self, group: Any, params: list[Any]) -> None:
        """Make states, as torch.optim's classes do; while Dynamo traces it calls a method of this name itself."""
        for p in group["params"]:
            if p.grad is None:
                continue
            params.append(p)
            s = self.state[p]
            if "pair" not in s:
                buffer = torch.zeros(2 * p.numel(), dtype=p.dtype)
                s |= {"slow": None, "begun": False, "last": [], "pair": (torch.zeros_like(p), torch.zeros_like(p))}
                s |= {"buffer": buffer, "row": buffer[p.numel() :].view(p.shape)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            params: list[Any] = []
            self._init_group(group, params)
            for p in params:
                s = self.state[p]
                s["last"] = [*s["last"][-1:], p.grad.clone()]
                first, second = s["pair"]
                s["pair"] = (second, group["mu"] * first + sum(s["last"]) / len(s["last"]))
                s["positive"] = p.grad > 0
                s["row"].lerp_(p.grad, 0.5)
                update = torch.where(s["positive"], first, second) + s["row"]
                if s["slow"] is None:
                    s["slow"] = p.detach().clone()
                else:
                    s["slow"].lerp_(p, 0.5)
                    update = update + group["weight_decay"] * s["slow"]
                s["begun"] = s["begun"] or group["lr"] > 0
                p.sub_(update, alpha=group["lr"])
        return loss


nudge: torch.Generator | None = None  # with it random values are an ulp off, by chance up or down


def drawn(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random values."""
    value = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    if nudge is None:
        return value
    return value + value * (torch.randint(2, shape, generator=nudge) * 2 - 1) * torch.finfo(dtype).eps


def param(shape: tuple[int, ...], dtype: torch.dtype = F32, kind: str = "plain", seed: int = 0) -> Any:
    """A parameter of random values; `kind` says where they lie and what else is unusual."""
    value = drawn(shape, torch.Generator().manual_seed(seed), dtype)
    if kind == "strided":
        value = torch.stack([value, value], -1)[..., 0]
    elif kind == "transposed":
        value = value.t().contiguous().t()
    elif kind == "channels_last":
        value = value.to(memory_format=torch.channels_last)
    elif kind == "expanded":
        value = value[:1].expand(shape)
    elif kind == "numpy":
        value = torch.from_numpy(np.array(value.numpy()))
    elif kind == "offset":
        value = torch.cat([torch.zeros(1, dtype=dtype), value.flatten()])[1:].view(shape)
    elif kind == "inference":
        with torch.inference_mode():
            return torch.nn.Parameter(value.clone())
    return torch.nn.Parameter(value, requires_grad=kind != "frozen")


def dtype_of_numbers(ps: Sequence[Any]) -> Any:
    """Float64 where parameters are: what torch computes with numbers in float32 it rounds to that (docs/limits.md)."""
    return F64 if any(p.dtype == F64 for p in ps) else F32


def overlapping(n: int, by: int) -> list[Any]:
    """Two parameters that share some of their memory, or (by 0) all."""
    memory = torch.linspace(-1, 1, n + by)
    return [torch.nn.Parameter(memory[:n]), torch.nn.Parameter(memory[by:])]


def gradients(ps: Sequence[Any], seed: int, kind: str = "plain") -> None:
    """Random gradients for all parameters, in new memory."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in ps:
        g = drawn(p.shape, generator, p.dtype)
        if kind == "strided":
            g = torch.stack([g, g], -1)[..., 0]
        elif kind == "expanded":
            g = torch.ones((), dtype=p.dtype).expand(p.shape)
        elif kind in ("nan", "inf"):
            g = torch.where(g > 0.5, float(kind), g)
        elif kind == "zeros":
            g = torch.zeros_like(p)
        elif kind == "tiny":
            g = g * (1e-30 if p.dtype not in HALF else 1e-6)
        p.grad = g.detach()


def closure(ps: Sequence[Any], labels: Tensor) -> Callable[[], Tensor]:
    """A loss with integer labels in it."""

    def loss() -> Tensor:
        for p in ps:
            p.grad = None
        x = torch.stack([(p * p).sum().float() for p in ps])
        value = torch.nn.functional.cross_entropy(x.view(1, -1), labels)
        value.backward()
        return value

    return loss


def alike(p: Tensor, q: Tensor) -> bool:
    """Whether one may have the other's gradient or states."""
    return p.shape == q.shape and p.dtype == q.dtype


def resized(opt: Any, ps: list[Any], i: int, change: Callable[[Tensor], Tensor]) -> None:
    """Another parameter in the place of one, its states changed alike, as 3-D Gaussian splatting grows and prunes."""
    old = ps[i]
    entry = opt.state.pop(old)
    for n, x in [*entry.items()]:
        if isinstance(x, Tensor) and x.shape == old.shape:
            entry[n] = change(x)
    ps[i] = torch.nn.Parameter(change(old.detach()))
    for group in opt.param_groups:
        group["params"][:] = [ps[i] if p is old else p for p in group["params"]]
    opt.state[ps[i]] = entry


def grown(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def collect() -> None:
    """Free what is unreachable, and in a second round what only guards of Dynamo, freed in the first, had held."""
    gc.collect()
    gc.collect()


def in_thread(call: Callable[..., Any], *args: Any) -> None:
    """Call it in a thread of its own; its exception is ours."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(call, *args).result()


def several_threads(steps: Sequence[Callable[..., Any]]) -> None:
    """All at once, each for parameters of its own."""
    with concurrent.futures.ThreadPoolExecutor(len(steps)) as pool:
        for future in [pool.submit(step) for step in steps]:
            future.result()


def in_mode(mode: Any, call: Callable[..., Any], *args: Any) -> None:
    with mode:
        call(*args)


def states(opt: Any, ps: Sequence[Any]) -> list[Tensor]:
    """Copies of all states, counters and masks apart, of which load_state_dict makes the parameter's dtype."""
    found = [(n, x) for p in ps if p in opt.state for n, x in opt.state[p].items() if isinstance(x, Tensor)]
    return [x.clone() for n, x in found if n not in ("step", "positive", "begun")]


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Bit for bit, dtypes included."""
    pairs = zip(got, want, strict=False)
    equal = (a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)
    return len(got) == len(want) and all(equal)


def clears_its_own() -> bool:
    """Whether `clear_cache` deletes a kernel in a folder that the user names, and nothing else there."""
    with tempfile.TemporaryDirectory() as name:
        folder, own = pathlib.Path(name), pathlib.Path(name) / "npu_fuse_pass"
        own.mkdir(mode=0o700)
        others = ["libother.so.1", "notes.so", "npu_fuse_pass/mine.so", "thesis.sources.tex"]
        for file in others:
            (folder / file).write_text("precious")
        (own / f"{'0' * 32}-{'0' * 16}.so").write_text("a kernel")
        before = os.environ.get("NPU_FUSE_CACHE_DIR")
        os.environ["NPU_FUSE_CACHE_DIR"] = name
        try:
            npu_fuse_pass.clear_cache()
        finally:
            os.environ.pop("NPU_FUSE_CACHE_DIR")
            if before is not None:
                os.environ["NPU_FUSE_CACHE_DIR"] = before
        return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) == others


@dataclasses.dataclass
class Run:
    """What one run of a program showed, a row for each line that ran.

    Attributes:
        seen: what there was after each line, by name.
        errors: the exception of each line, or None.
        fused: of each line that stepped: True; or False, where it may have stepped as the original.
        reasons: why something was not fused.
        said: warnings of the package.
        broken: what holds for every optimizer and did not here.
    """

    seen: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[BaseException | None] = dataclasses.field(default_factory=list)
    fused: list[bool] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)

    def promise(self, what: str, kept: bool) -> None:
        """Note what does not hold."""
        if not kept:
            self.broken.append(what)


BACKENDS = {"captured": "eager", "compiled": "npu_fused"}


def run(lines: Sequence[str], mode: str) -> Run:
    """Run a program.

    Args:
        mode: "eager"; "captured", which Dynamo captures and runs as it is; "compiled"; "stock", eagerly with
            torch.optim's class (the text after "#=" in the line that makes the optimizer).
    """
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    backend = BACKENDS.get(mode)
    observed: dict[str, Any] = {}
    own = f"program{next(_RUNS)}"  # Dynamo imports a function's module, and keeps it by its name for good
    module = sys.modules[own] = types.ModuleType(own)
    names = vars(module)
    names |= {
        **globals(),
        "__name__": own,
        "ps": [],
        "mode": mode,
        "labels": torch.tensor([0]),
        "observe": observed.__setitem__,
    }

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> None:
            names["returned"] = call(*args)

        return noted

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return noting(torch.compile(function, backend=backend) if backend else function)

    def by_tool(tool: Callable[..., Any]) -> Callable[..., Any]:
        """Steps that a tool compiles; they take a closure, and not the number that a function is given."""

        def made(opt: Any, **options: Any) -> Callable[..., Any]:
            plain = torch.compile(opt.step, backend=backend) if backend else opt.step
            call = tool(opt, **options) if mode == "compiled" else plain
            return noting(lambda *args: call(*filter(callable, args)))

        return made

    names["by_compile_step"] = by_tool(npu_fuse_pass.compile_step)
    names["by_compile_optimizer"] = by_tool(lambda opt: npu_fuse_pass.compile_optimizer_(opt).step)
    names["compiled"] = compiled
    result = Run()
    names["promise"] = result.promise
    names["forget"] = lambda *those: [names.pop(name, None) for name in those]
    for line in lines:
        text, _, stock = line.partition("  #= ")
        error = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with torch.enable_grad():  # a graph that raises in its midst leaves torch's mode as it was there
                    exec(compile(stock if stock and mode == "stock" else text, "<program>", "exec"), names)
            except Exception as e:
                error = _without_frames(e)
        result.said += [str(w.message) for w in caught if "npu_fused" in str(w.message)]
        result.errors.append(error)
        result.seen.append(_look(names, "look(" in line or line is lines[-1]) | observed)
        if line.startswith(STEPS):
            if error is not None:
                break  # who refuses a step may have done part of it
            reports = npu_fuse_pass.reports()
            result.fused.append(bool(reports) and bool(reports[-1].groups) and not reports[-1].fallback)
    for report in npu_fuse_pass.reports():
        result.reasons += [report.fallback] if report.fallback else []
        result.reasons += [str(u) for u in report.unfused]
    del sys.modules[own]
    for name in [name for name in names if not name.startswith("_")]:  # Dynamo removes what it has put there itself
        del names[name]
    return result


def _without_frames(e: BaseException) -> BaseException:
    """The same exception and its causes; their frames would keep optimizers alive."""
    seen: BaseException | None = e
    while seen is not None:
        seen.__traceback__, seen = None, seen.__cause__ or seen.__context__
    return e


def look() -> None:
    """States are compared after this line; elsewhere nobody touches them, so that nothing is hidden by looking."""


def _look(names: dict[str, Any], states: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"average": names["average"].clone()} if "average" in names else {}
    for i, x in enumerate([*names.get("named", ()), *names.get("named_grads", ())]):
        found[f"named {i}"] = None if x is None else x.detach().clone()
    for i, x in enumerate(names["returned"] if isinstance(names.get("returned"), list) else ()):
        found[f"returned {i}"] = x.detach().clone() if isinstance(x, Tensor) else _plain(x)
        found[f"returned {i} is"] = [k for k, p in enumerate(names["ps"]) if x is p]
    for i, p in enumerate(names["ps"]):
        found[f"p{i}"] = p.detach().clone()
        found[f"p{i}.grad"] = None if p.grad is None else p.grad.detach().clone()
        if states and "opt" in names and p in names["opt"].state:
            for n, x in [*names["opt"].state[p].items()]:
                for k, value in enumerate(x if isinstance(x, (list, tuple)) else [x]):
                    if value is not None:
                        found[f"p{i}.{n}" + f".{k}" * bool(k)] = torch.as_tensor(value).detach().clone()
    for i, group in enumerate(names["opt"].param_groups if "opt" in names else ()):
        found |= {f"group {i}, {n}": _plain(x) for n, x in group.items() if n != "params"}
    return found


def _plain(x: Any) -> Any:
    """A number of NumPy's as Python's: Dynamo makes arrays of what a function computes of one."""
    return x.item() if isinstance(x, (np.generic, np.ndarray)) else copy.copy(x)


def differs(
    got: Any, want: Any, limits: Mapping[torch.dtype, tuple[float, float]] = LIMITS, near: Sequence[Any] = ()
) -> str:
    """How a value differs from what is wanted; "" if it does not.

    Args:
        near: what comes of values an ulp off; elements that differ from `want` about as much as the one of these that
            differs most are no difference.
    """
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return "" if got is want or (type(got) is type(want) and got == want) else f"{got!r} not {want!r}"
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype} {tuple(got.shape)} not {want.dtype} {tuple(want.shape)}"
    relative, absolute = limits.get(got.dtype, (0.0, 0.0))
    a, b = got.double().flatten(), want.double().flatten()
    right = torch.isclose(a, b, rtol=relative, atol=absolute, equal_nan=True)
    for other in near:
        if isinstance(other, Tensor) and other.shape == want.shape:
            off = (other.double().flatten() - b).abs().nan_to_num(0.0, 0.0)
            right |= (a - b).abs() <= AS_MUCH * off.amax() if off.numel() else True
    return "" if right.all() else f"{a[~right][:3].tolist()} not {b[~right][:3].tolist()}"


def compare(
    lines: Sequence[str],
    got: Run,
    want: Run,
    shared: bool = False,
    also: Run | None = None,
    captured: bool = False,
    loose: bool = False,
    near: Sequence[Run] = (),
) -> tuple[str, str]:
    """The kind of the first difference and what it is, or ("", "").

    Args:
        shared: of states, only those that both have, in the wanted one's dtype.
        also: what this run shows is right, too.
        captured: `want` is torch's own graph.
        loose: some of the steps were fused: half precision may be rounded once more, or once less, and the counters of
            torch's own graph are float32 beside float64 parameters.
        near: eager runs from values an ulp off.
    """
    scalar = any(word in line for line in lines for word in SCALAR)
    limits = {**LIMITS, **(LOOSE if loose or scalar else {}), **({F64: CAPTURED} if loose else {})}
    found = {x.dtype for seen in want.seen for x in seen.values() if isinstance(x, Tensor)} & limits.keys()
    coarsest = max(limits[dtype] for dtype in found | {F32})
    of_all = {dtype: max(limit, coarsest) for dtype, limit in limits.items()}  # as exact as the coarsest of them
    if any(word in line for line in lines for word in MEET):
        limits = of_all  # the loss is float32, and a total of its parameters' dtypes
    exact = limits
    # what was once about 1 was rounded as that
    of_parameters = limits | {dtype: (limits[dtype][0], max(limits[dtype])) for dtype in HALF}
    for i, line in enumerate(lines[: len(want.errors)]):
        a, b = got.errors[i], want.errors[i]
        if shared and (isinstance(a, npu_fuse_pass.OptionError) or ((a or b) and not line.startswith(STEPS))):
            break  # asked for what torch.optim's class does not offer, or copied what it does not copy
        if shared and a and b:
            break  # each refuses in its own words
        if a and b and any(text.startswith("def body") for text in lines[:i]):
            break  # a step that refuses does so before what stands ahead of it in the function, if that is one graph
        if captured and type(a) is not type(b) and also and i < len(also.errors) and type(also.errors[i]) is type(a):
            break  # what Dynamo changed in a group has torch's eager step refuse it
        if type(a) is not type(b):
            return "error", f"line {i}, {line!r}: {_told(a)} not {_told(b)}"
        if a is not None and line.startswith(STEPS):
            break  # ours refuses before anything is changed, torch.optim's class in between
        size = _size(want.seen[i])  # weight decay brings roundings of parameters into the states
        of_states = exact | {dtype: (exact[dtype][0], exact[dtype][1] * size) for dtype in HALF}
        for name in want.seen[i].keys() | got.seen[i].keys():
            x, y = (seen[i].get(name) for seen in (got.seen, want.seen))
            limits = of_all if name == "average" else of_states if "." in name else of_parameters
            if shared and (x is None or y is None or name.startswith("group") or name.endswith(".step")):
                continue
            off = [other.seen[i].get(name) for other in near if i < len(other.seen)]
            if captured:
                # where the eager step refuses, float64 is as exact as torch's graph alone, whose counters are float32
                stepped = also and i < len(also.errors) and also.errors[i] is None
                difference = differs(x, y, {**limits, F32: CAPTURED, **({} if stepped else {F64: CAPTURED})}, off)
                if also and i < len(also.seen) and all(got.fused) and _nan(x) and not _nan(also.seen[i].get(name)):
                    difference = "not a number, as in torch's graph, but not in the eager step"
            else:
                difference = differs(*((_finite(x), _finite(y)) if shared else (x, y)), limits, off)
            if difference and not (also and i < len(also.seen) and not differs(x, also.seen[i].get(name), limits, off)):
                return "value", f"line {i}, {line!r}: {name} is {difference}"
        if i + 1 == len(got.errors):
            break
    return "", ""


def _size(seen: Mapping[str, Any]) -> float:
    """The largest finite magnitude in parameters of half precision, 1 at least."""
    found = [x for n, x in seen.items() if "." not in n and isinstance(x, Tensor) and x.dtype in HALF and x.numel()]
    return max([1.0, *(float(x.float().nan_to_num(0.0, 0.0, 0.0).abs().max()) for x in found)])


def _nan(x: Any) -> bool:
    return isinstance(x, Tensor) and bool(x.isnan().any())


def _finite(x: Any) -> Any:
    """What is not finite as one value: of two infinities torch's lerp makes a NaN, ours adds them (docs/limits.md)."""
    return torch.where(x.isfinite(), x, float("nan")) if isinstance(x, Tensor) and x.is_floating_point() else x


def _told(e: BaseException | None) -> str:
    return "no error" if e is None else f"{type(e).__name__} ({str(e).strip()[:150]!r})"


def check(lines: Sequence[str], reasons: bool = True) -> tuple[str, str, Run]:
    """The kind of the first finding and what it is, and the compiled run.

    Kinds: "value", "error"; "stock value", "stock error" (ours, run eagerly, and torch.optim's class); "promise" (what
    holds for every optimizer does not); "silent"
    (nothing was fused, without a reason); "reason" (something was not fused, where `reasons` allows none).
    """
    eager, got = run(lines, "eager"), run(lines, "compiled")
    kind, what = _difference(lines, eager, got)
    if kind.endswith("value"):  # Adam's first step divides by |g| + eps, and g may be the rest of a cancellation
        kind, what = _difference(lines, eager, got, [_nudged(lines, seed) for seed in range(NUDGES)])
    if not kind and eager.broken + got.broken:
        kind, what = "promise", (eager.broken + got.broken)[0]
    if not kind and got.fused and not any(got.fused) and not got.reasons:
        kind, what = "silent", f"{len(got.fused)} steps, nothing fused and no reason"
    if not kind and not reasons and (got.reasons or got.said):
        kind, what = "reason", "; ".join([*got.reasons, *got.said])
    return kind, what, got


def _nudged(lines: Sequence[str], seed: int) -> Run:
    """The eager run from parameters and gradients an ulp off."""
    global nudge
    nudge = torch.Generator().manual_seed(seed)
    try:
        return run(lines, "eager")
    finally:
        nudge = None


def _difference(lines: Sequence[str], eager: Run, got: Run, near: Sequence[Run] = ()) -> tuple[str, str]:
    """The kind of the first difference of values or errors and what it is, or ("", "")."""
    text = "\n".join(lines)
    ours = ("opt = optimizers.", "opt = clipped(")
    stock = any(line.startswith("opt = ") and not line.startswith(ours) for line in lines)
    half = "F16" in text  # and BF16
    kind, what = compare(lines, got, eager, near=near)
    if kind == "error" or (kind and stock):
        # value by value: in half precision what Dynamo captures rounds elsewhere, in float64 its counters are float32.
        # Where torch compiles anew it draws other numbers than eagerly; then only what was captured can be compared
        # with, which rounds by itself. Steps of which some were fused and others not round as neither does throughout
        mixed = len(set(got.fused)) > 1 or any("at some steps" in reason for reason in got.reasons)
        captured = run(lines, "captured")
        kind, what = compare(lines, got, captured, also=eager, captured=True, loose=mixed, near=near)
    other = half or ("state_dtype" in text and "F64" in text) or "inference_mode()" in text
    if not kind and "#=" in text and not other:
        kind, what = compare(lines, eager, run(lines, "stock"), shared=True, near=near)
        kind = kind and f"stock {kind}"
    return kind, what
