"""A step that something interrupts: what a handler of signals raises between two kernels, Ctrl-C for example.

Every test interrupts a step in turn at each of its operations of Python where CPython runs handlers.
"""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import optimizers
from npu_fuse_pass import compile_optimizer_, pipeline
from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.lowerings import eager, segmented
from npu_fuse_pass.lowerings.cpu import program as cpu
from npu_fuse_pass.lowerings.cpu.kernel import Kernel
from npu_fuse_pass.lowerings.cpu.program import Program
from npu_fuse_pass.stock.prelude import StockPrelude
from tests.support.training import assert_fused, last_report, parameters, set_gradients

SHAPES = [(3, 4), (5,), (5,)]


class Interrupt(BaseException):
    """What a test raises in the place of KeyboardInterrupt."""


def interrupted(step: Callable[[], Any], at: int, program: type[Any] = Program) -> bool:
    """Whether a step was interrupted at the n-th call or return of a function while its program runs."""
    left = at

    def interrupt(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            sys.setprofile(None)
            raise Interrupt

    def profiled(run: Callable[..., None]) -> Callable[..., None]:
        def inside(*args: Any, **kwargs: Any) -> None:
            sys.setprofile(interrupt)
            try:
                run(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return inside

    with pytest.MonkeyPatch.context() as patch:
        for name in {"__call__", "again"} & {*vars(program)}:
            patch.setattr(program, name, profiled(getattr(program, name)))
        try:
            step()
        except Interrupt:
            return True
        finally:
            torch.set_grad_enabled(True)  # an interrupt may come while `torch.no_grad` puts it back
    return False


def _several(params: Any) -> Any:
    """Two kernels that depend on each other's sums: norms over all parameters in two dtypes."""
    return optimizers.NpuFusedLamb(params, lr=0.01, weight_decay=0.1, use_global_grad_norm=True)


def _adam(params: Any) -> Any:
    return optimizers.NpuFusedAdam(params, lr=0.01, amsgrad=True)


def _stock(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=0.01, foreach=True)


def mixed(seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters of two dtypes: a kernel for each."""
    first, second = parameters(SHAPES, seed=seed), parameters(SHAPES[:2], dtype=torch.float64, seed=seed + 1)
    return [p for pair in zip(first, second, strict=False) for p in pair] + first[2:]


def grads(params: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    set_gradients(params, [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params])


def everything(params: Any, opt: Any) -> list[Tensor]:
    saved = copy.deepcopy(opt.state_dict()["state"])
    return [*(p.detach().clone() for p in params), *(t for e in saved.values() for _, t in sorted(e.items()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def make_step(opt: Any) -> Callable[[], Any]:
    return torch.compile(opt.step, backend="npu_fused")


@pytest.mark.parametrize("make", [_several, _adam, _stock])
def test_all_or_nothing(make: Callable[[Any], Any]) -> None:
    """Parameters and states are those of before or those of after, and the run goes on as the uninterrupted one."""
    params, twins = mixed(), mixed()
    opt, twin = make(params), make(twins)
    step, other = make_step(opt), make_step(twin)
    outcomes, at = set(), -2
    while True:
        for given in (params, twins):
            grads(given, at)
        before, versions = everything(params, opt), [p._version for p in params]
        went = interrupted(step, at)
        if went and same(everything(params, opt), before):
            outcomes.add("before")
            assert [p._version for p in params] == versions
            step()
        elif went:
            outcomes.add("after")
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        other()
        assert same(everything(params, opt), everything(twins, twin)), f"interrupted at operation {at}"
        at += 1 if at < 1 else 3
        if at > 1 and not went:
            break
    assert outcomes == {"before", "after"}
    assert_fused(last_report(), parameters=5)
    assert len(last_report().groups) == 2


def test_operations_between_kernels() -> None:
    """Integers that they write, and the generator that they draw from, are of before or of after, too."""
    p, count, other = torch.ones(4, 6), torch.ones((4, 6), dtype=torch.int64), torch.ones((4, 6), dtype=torch.int64)

    def step() -> None:
        p.sub_(torch.rand_like(p) * count, alpha=0.125)
        count.mul_(3).add_(1)
        other.add_(count)
        p.mul_(0.5)

    def now() -> list[Tensor]:
        return [p.clone(), count.clone(), other.clone(), torch.get_rng_state()]

    compiled = torch.compile(step, backend="npu_fused")
    compiled()
    before, after, outcomes = now(), [], set()
    for at in range(-1, 1000, 3):
        for tensor, value in zip((p, count, other), before, strict=False):
            tensor.copy_(value)
        torch.set_rng_state(before[-1])
        went = interrupted(compiled, at, segmented.Program)
        after = after or now()
        assert same(now(), before) or same(now(), after), f"interrupted at operation {at}"
        outcomes.add("before" if same(now(), before) else "after")
        if at > 1 and not went:
            break
    assert outcomes == {"before", "after"}
    report = last_report()
    assert report.groups and report.unfused and not report.fallback


def test_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: Any) -> Any:
        raise PlatformError("no compiler")

    monkeypatch.setattr(cpu, "Program", no_compiler)
    params, twins = parameters(SHAPES, seed=0), parameters(SHAPES, seed=0)
    opt, twin = _adam(params), _adam(twins)
    step, outcomes = make_step(opt), set()
    grads(params, -2)
    grads(twins, -2)
    with pytest.warns(UserWarning, match="not fused: the fused graph is interpreted: no compiler"):
        step()
    twin.step()
    for at in range(-1, 2000, 25):
        for given in (params, twins):
            grads(given, at)
        before = everything(params, opt)
        went = interrupted(step, at, eager.Program)
        untouched = went and same(everything(params, opt), before)
        if untouched:
            step()
        outcomes.add("before" if untouched else "after")
        twin.step()
        for a, b in zip(everything(params, opt), everything(twins, twin), strict=True):
            torch.testing.assert_close(a, b)
        if at > 1 and not went:
            break
    assert outcomes == {"before", "after"}
    assert [g.kernel for g in last_report().groups] == ["interpreter"]


@pytest.mark.parametrize("at", [5, 60, 110])
@pytest.mark.parametrize("make", [_several, _adam])
def test_the_first_step(make: Callable[[Any], Any], at: int) -> None:
    """The one that shows states in opt.state."""
    params, twins = mixed(), mixed()
    opt, twin = make(params), make(twins)
    grads(params, 0)
    grads(twins, 0)
    step, before = make_step(opt), everything(params, opt)
    if interrupted(step, at) and same(everything(params, opt), before):
        step()
    make_step(twin)()
    assert same(everything(params, opt), everything(twins, twin))


def test_within_a_larger_function() -> None:
    params, twins = mixed(), mixed()
    opt, twin = _adam(params), _adam(twins)

    def clipped(ps: Any, o: Any) -> Callable[[], None]:
        def tail() -> None:
            torch.nn.utils.clip_grad_value_(ps, 0.5)
            o.step()

        return torch.compile(tail, backend="npu_fused")

    step, other = clipped(params, opt), clipped(twins, twin)
    held = 0
    for at in range(-1, 120, 9):
        for given in (params, twins):
            grads(given, at)
        before = everything(params, opt)
        gradients = [p.grad.clone() for p in params]
        went = interrupted(step, at)
        if went and same(everything(params, opt), before):
            assert same([p.grad for p in params], gradients)
            step()
        held += went and not same(everything(params, opt), before)
        other()
        assert same(everything(params, opt), everything(twins, twin))
        assert same([p.grad for p in params], [p.grad for p in twins])
    assert held
    assert_fused(last_report(), parameters=5)


SIGNALS: dict[str, tuple[int, type[BaseException]]] = {
    "ctrl-c": (signal.SIGINT, KeyboardInterrupt),
    "terminated": (signal.SIGTERM, SystemExit),
    "alarm": (signal.SIGALRM, TimeoutError),
}


@pytest.fixture
def handled(request: pytest.FixtureRequest) -> Iterator[tuple[int, type[BaseException]]]:
    number, error = SIGNALS[request.param]

    def handler(*args: Any) -> None:
        raise error

    before = signal.signal(number, handler)
    yield number, error
    signal.signal(number, before)


@pytest.mark.parametrize("handled", SIGNALS, indirect=True)
@pytest.mark.parametrize("again", [False, True], ids=["once", "and again"])
@pytest.mark.parametrize("make", [_several, _adam])
def test_signals(
    make: Callable[[Any], Any], handled: tuple[int, type[BaseException]], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while the first kernel runs, and a second one while the next does."""
    number, error = handled
    params, twins = mixed(), mixed()
    opt, twin = make(params), make(twins)
    step, other = make_step(opt), make_step(twin)
    for given, run in ((params, step), (twins, other)):
        grads(given, 0)
        run()
    call, sent = Kernel.call, []

    def signalled(self: Kernel, function: Any, threads: int) -> None:
        call(self, function, threads)
        if len(sent) < 1 + again:
            sent.append(1)
            signal.raise_signal(number)

    grads(params, 1)
    grads(twins, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "call", signalled)
        with pytest.raises(error):
            step()
    assert len(sent) == 1 + again
    other()
    assert same(everything(params, opt), everything(twins, twin))
    for seed in range(2, 4):
        for given, run in ((params, step), (twins, other)):
            grads(given, seed)
            run()
    assert same(everything(params, opt), everything(twins, twin))


def test_a_refusal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `write` refuses is not written: torch's error for a tensor that may not be, for example."""
    params = mixed()
    opt = _adam(params)
    step = make_step(opt)
    grads(params, 0)
    step()
    before, count = everything(params, opt), []

    def refuse(self: Kernel, values: Any) -> None:
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("refused")

    monkeypatch.setattr(Kernel, "write", refuse)
    grads(params, 1)
    with pytest.raises(RuntimeError, match="refused"):
        step()
    assert same(everything(params, opt), before)


def _more(opt: Any, params: Any) -> None:
    opt.add_param_group({"params": params[3:]})


def _another_rule(opt: Any, params: Any) -> None:
    opt.param_groups[0]["amsgrad"] = False


@pytest.mark.parametrize(("change", "updated"), [(_more, 5), (_another_rule, 3)])
@pytest.mark.parametrize("in_a_function", [False, True])
def test_a_plan_that_is_made_anew(
    change: Callable[[Any, Any], None], updated: int, in_a_function: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compile takes seconds, so that Ctrl-C comes in it; the next step makes it, and does not run the old one."""
    params, twins = mixed(), mixed()
    opt, twin = _adam(params[:3]), _adam(twins[:3])
    step = torch.compile(lambda: opt.step() and None, backend="npu_fused") if in_a_function else make_step(opt)
    grads(params, 0)
    grads(twins, 0)
    step()
    twin.step()
    change(opt, params)
    change(twin, twins)
    grads(params, 1)
    before = everything(params, opt)

    def interrupt(*args: Any) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "group", interrupt)
        with pytest.raises(Interrupt):
            step()
    assert same(everything(params, opt), before)
    for seed in (1, 2):
        grads(params, seed)
        grads(twins, seed)
        step()
        twin.step()
    for a, b in zip(everything(params, opt), everything(twins, twin), strict=True):
        torch.testing.assert_close(a, b)
    assert_fused(last_report(), parameters=updated)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("place", [(StockPrelude, "_initialise"), (Kernel, "bind")], ids=["prepared", "run"])
def test_what_a_step_begins_before_it_is_ended(
    place: tuple[object, str], momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that trains from now on, and its momentum, begin at the next step, where everybody sees it."""
    params, twins = mixed(), mixed()
    opt, twin = (torch.optim.SGD(ps, lr=0.1, momentum=momentum) for ps in (params, twins))
    compile_optimizer_(opt)

    def step(seed: int, frozen: bool) -> None:
        for ps in (params, twins):
            grads(ps, seed)
            ps[2].requires_grad_(not frozen)
            ps[2].grad = None if frozen else ps[2].grad
        opt.step()

    def interrupt(*args: Any) -> None:
        raise Interrupt

    for frozen in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupt)
            with pytest.raises(Interrupt):
                step(0, frozen)
        for seed in range(3):
            step(seed, frozen)
            twin.step()
    for a, b in zip(everything(params, opt), everything(twins, twin), strict=True):
        torch.testing.assert_close(a, b)
    assert_fused(last_report(), parameters=5)
