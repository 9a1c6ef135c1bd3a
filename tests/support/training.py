"""What tests of optimizers share: compiled steps whose fusion is asserted, gradients, a measure of errors."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import math
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.tolerances import TRAJECTORY

# |a - b| / (1e-3 + |b|), after a few steps. Half precision: some units in the last place of what is stored.
SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (2, 3, 2), (), (5,))
MODES = ("eager", "compiled")
FULL = os.environ.get("NPU_FUSE_FULL", "") not in ("", "0")  # the slow tier: bash scripts/test.sh --slow

T = TypeVar("T")


def tier(cases: Sequence[T]) -> list[T]:
    """All cases in the slow tier; otherwise every sixth, on a diagonal, so that every form occurs."""
    return [case for i, case in enumerate(cases) if FULL or i % 6 == i // 6 % 6]


class Step:
    """A step function for `opt`: `opt.step` itself, or compiled with the backend under test.

    `check()` asserts that what was compiled was fused, in one compile (where the whole graph was asked for), and
    that no step said that it ran unfused; it does nothing for an eager step.
    """

    def __init__(self, opt: Any, mode: str, *, backend: Any = "npu_fused", fullgraph: bool = True, **options: Any):
        self.compiled, self.fullgraph = mode == "compiled", fullgraph
        self.said: list[str] = []
        self.function: Callable[..., Any] = opt.step
        if self.compiled:
            npu_fuse_pass.clear_reports()
            options = {"options": options} if options else {}
            self.function = torch.compile(opt.step, backend=backend, fullgraph=fullgraph, **options)

    def __call__(self, *args: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self.function(*args)
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        self.said += [str(w.message) for w in caught if "npu_fused" in str(w.message)]
        return result

    def check(self, parameters: int) -> None:
        if self.compiled:
            self.check_fused(parameters)
            causes = [report.cause for report in npu_fuse_pass.reports()]
            assert not self.fullgraph or causes.count("compile") == 1, causes

    def check_fused(self, parameters: int) -> None:
        """The same, however often it was compiled."""
        if self.compiled:
            assert_fused(last_report(), parameters=parameters)
            assert not self.said, self.said


def compiled(opt: Any, **options: Any) -> Step:
    """A compiled step of `opt`, under the backend's options."""
    return Step(opt, "compiled", **options)


def last_report() -> Any:
    """The newest report; an AssertionError if nothing was compiled since the step was made."""
    reports = npu_fuse_pass.reports()
    assert reports, "the backend under test has compiled nothing"
    return reports[-1]


def assert_fused(report: Any, *, parameters: int, lowering: str = "cpu") -> None:
    """Everything was fused: nothing fell back, and the groups' updates are those of all parameters."""
    assert report.fallback is None, report.fallback
    assert not report.unfused, [*map(str, report.unfused)]
    assert sum(group.updates for group in report.groups) == parameters, report
    assert {group.lowering for group in report.groups} == {lowering}, report


def parameters(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Random parameters, of size about one."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [torch.nn.Parameter(p) for p in made]


def gradients(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random gradients, of size about one."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def step_with_a_shared_gradient(params: list[Any], step: Callable[[], Any], shared: Sequence[int]) -> None:
    """Five steps over three parameters; at those that are named the third has the gradient tensor of the first."""
    for seed in range(5):
        set_gradients(params, gradients(params, seed))
        if seed in shared:
            params[2].grad = params[0].grad
        step()


def error(got: Tensor, want: Tensor, old: Tensor | None = None) -> float:
    """The goldens' measure: the largest |a - b| / (1e-3 + |b|).

    Args:
        old: the values before the step; |b| is |old| where that is larger, since b is then a difference of such terms.
    """
    got, want = got.detach().double(), want.detach().double()
    size = want.abs() if old is None else torch.maximum(want.abs(), old.detach().double().abs())
    return float(((got - want).abs() / (1e-3 + size)).max()) if want.numel() else 0.0


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float | None = None) -> None:
    """Every pair is within the tolerance of the first one's dtype (or the given one)."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        limit = TRAJECTORY[a.dtype] if tolerance is None else tolerance
        assert error(a, b) <= limit, f"parameter {i}: error {error(a, b):.3g} > {limit:.3g}\n{a}\n{b}"


def clones(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Independent parameters with the same values."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def take_over(opt: Any, params: Sequence[Tensor], twin: Any, others: Sequence[Tensor]) -> None:
    """Give the twin the values and states of the optimizer."""
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
            for name, value in opt.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    twin.state[q][name].copy_(value)


def train(
    params: Sequence[Tensor], step: Callable[..., Any], oracle: Any = None, seeds: Iterable[int] = range(4)
) -> None:
    """Some steps with random gradients, and the same for the oracle."""
    for seed in itertools.chain(seeds):
        grads = gradients(params, seed)
        set_gradients(params, grads)
        step()
        if oracle is not None:
            oracle.step(grads)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What this package warns of meanwhile, whatever was said before; listed when that is over."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if "npu_fused" in str(w.message)]


def warned(call: Callable[[], Any]) -> list[str]:
    """What this package warns of during a call, whatever was said before."""
    with heard() as said:
        call()
    return said


def profiled(call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """What a call runs: the generated kernels in order, and the aten operations on tensors of several elements."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    events = sorted(profile.events(), key=lambda e: e.time_range.start)
    kernels = [e.name for e in events if e.name.startswith("update_")]
    large = [f"{e.name}{e.input_shapes}" for e in events if "::" in e.name and _elements(e.input_shapes) > 1]
    return kernels, large


def _elements(shapes: Any) -> int:
    """The elements of the largest tensor in a profiler's nested list of shapes."""
    if any(isinstance(s, list) for s in shapes):
        return max(_elements(s) for s in shapes if isinstance(s, list))
    return math.prod(shapes)


def stated_calls(report: Any) -> list[str]:
    """The kernel calls of a step that a report states, sorted: a group's sums over all parameters come first."""
    extra = [f"{g.name}_contribute" for g in report.groups for _ in range(g.launches - 1)]
    return sorted([*extra, *(g.name for g in report.groups)])


def assert_one_fused_step(call: Callable[[], Any], copies: bool = False) -> None:
    """The call runs what the newest report states and nothing else, except copies where a layout asks for them."""
    kernels, large = profiled(call)
    assert sorted(kernels) == stated_calls(last_report())
    left = [op for op in large if not (copies and op.partition("[")[0] in COPYING)]
    assert not left, left


COPYING = ("aten::copy_", "aten::detach", "aten::empty_strided", "aten::empty_like", "detach", "aten::as_strided")


def at_once(*calls: Callable[[], T]) -> list[T]:
    """What functions return that begin together in threads of their own; raises what one of them raises."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        start.wait()
        return call()

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def another_hash_seed() -> str:
    """For PYTHONHASHSEED of a process whose hashes of strings are others than this one's."""
    return "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"


def forget_scripts() -> None:
    """Dynamo as in a new process, for scripts that run in this one.

    It keeps the `__main__` of the script before, in a cache and in the modules whose code it has compiled.
    """
    torch._dynamo.reset()
    torch._dynamo.symbolic_convert._import_module.cache_clear()
    for module in [m for m in sys.modules.values() if isinstance(m, types.ModuleType)]:
        vars(module).pop("__import___main__", None)


class Unseen(torch.optim.Optimizer):
    """An optimizer whose step its author keeps from Dynamo."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch._dynamo.disable
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def beside_float64(steps: int, lr: float, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A bfloat16 parameter before and after steps of a compiled AdamW, and after torch's over a float64 one."""
    (param,) = parameters([(50, 20)], dtype=torch.bfloat16)
    start = param.detach().double()
    other = torch.nn.Parameter(start.clone())
    step = compiled(optimizers.NpuFusedAdamW([param], lr=lr, state_dtype=torch.float32, **options))
    torchs = torch.optim.AdamW([other], lr=lr)
    for seed in range(steps):
        grad = torch.randn(50, 20, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) + 0.5
        param.grad, other.grad = grad, grad.double()
        step()
        torchs.step()
    return start, param.detach().double(), other.detach()
