"""Many optimizers of one kind (optimizer-in-backward: one for each parameter) are compiled once, bound one by one."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import npu_fuse_pass
import optimizers
from npu_fuse_pass import rule, zeros
from npu_fuse_pass.capture import rule as capture
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.stock import binding
from tests.support.training import FULL, assert_fused, at_once

COUNT = 60 if FULL else 12


@rule(states={"m": zeros}, defaults={"lr": 0.1, "beta": 0.9})
def heavy_ball(param: Tensor, grad: Tensor, m: Tensor, *, lr: float, beta: float) -> Any:
    m = beta * m + grad
    return param - lr * m, m


def by_torch(opt: Any) -> Callable[..., Any]:
    return torch.compile(opt.step, backend="npu_fused")  # type: ignore[no-any-return]


def in_place(opt: Any) -> Callable[..., Any]:
    return npu_fuse_pass.compile_optimizer_(opt).step  # type: ignore[no-any-return]


def make(build: Any, count: int = COUNT) -> tuple[list[Any], list[Any]]:
    """Parameters, and an optimizer for each of them."""
    params = [torch.nn.Parameter(torch.full((8, 8), 1.0 + i)) for i in range(count)]
    return params, [build([p], lr=0.1) for p in params]


def train(params: Any, steps: Any, rounds: int = 2) -> None:
    for k in range(rounds):
        for i, p in enumerate(params):
            p.grad = torch.full((8, 8), 0.5 * k - i)
        for step in steps:
            step()


def began() -> None:
    torch._dynamo.reset()
    counters.clear()
    npu_fuse_pass.clear_reports()


WAYS = [
    (optimizers.NpuFusedAdamW, by_torch),
    (optimizers.NpuFusedAdamW, npu_fuse_pass.compile_step),
    (heavy_ball, in_place),
    (torch.optim.AdamW, npu_fuse_pass.compile_step),
    (torch.optim.SGD, in_place),
]


@pytest.mark.parametrize(("build", "compiled"), WAYS, ids=lambda x: getattr(x, "__name__", None) or x.name)
def test_one_compile_serves_them_all(build: Any, compiled: Any) -> None:
    (params, opts), (others, eager) = make(build), make(build)
    began()
    with (
        mock.patch.object(capture, "_trace", wraps=capture._trace) as traces,
        mock.patch.object(capture, "_calls", wraps=capture._calls) as asked,
        mock.patch.object(core_op, "run_rules") as rules,
        mock.patch.object(binding, "original_step") as originals,
    ):
        steps = [compiled(opt) for opt in opts]
        train(params, steps)
    assert asked.call_count == COUNT  # what the rule calls, once for each, the first one too
    assert not rules.called and not originals.called  # no step of any of them was unfused
    train(others, [opt.step for opt in eager])
    assert_fused(npu_fuse_pass.reports()[-1], parameters=1)
    assert len(npu_fuse_pass.reports()) == traces.call_count == 1
    assert counters["stats"]["unique_graphs"] <= 2  # the core, and what traces run in
    torch.testing.assert_close(params, others, rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", [torch.optim.Adam, optimizers.NpuFusedAdam], ids=["torch", "ours"])
def test_each_has_torchs_limit_of_compiles_to_itself(build: Any) -> None:
    """More global settings in a process than torch compiles one code for, each with optimizers of its own."""
    began()
    threads = torch.get_num_threads()
    params, opts = make(build, 12)
    gone = []
    try:
        for i in range(12):
            torch.set_num_threads(i + 1)
            step = npu_fuse_pass.compile_step(opts[i])  # raises where it is not captured
            train([params[i]], [step], rounds=3)
            assert_fused(step._tracked.ran[-1], parameters=1)
            gone.append(weakref.ref(step._tracked))
    finally:
        torch.set_num_threads(threads)
    del step
    opts.clear()
    gc.collect()
    assert [r() for r in gone] == [None] * len(gone)


def test_those_that_stay_do_not_notice_what_goes() -> None:
    (params, opts), (others, eager) = make(optimizers.NpuFusedAdamW, 6), make(optimizers.NpuFusedAdamW, 6)
    began()
    steps = [by_torch(opt) for opt in opts]
    train(params, steps)
    train(others, [opt.step for opt in eager])
    gone = [weakref.ref(x) for i in (0, 3, 5) for x in (opts[i], params[i])]
    for kept in (params, opts, steps, others, eager):
        for i in (5, 3, 0):
            del kept[i]
    gc.collect()
    assert [r() for r in gone] == [None] * len(gone)
    train(params, steps)
    train(others, [opt.step for opt in eager])
    more, added = make(optimizers.NpuFusedAdamW, 2)  # which find what the first of them all has compiled
    more_others, more_eager = make(optimizers.NpuFusedAdamW, 2)
    train(more, [by_torch(opt) for opt in added])
    train(more_others, [opt.step for opt in more_eager])
    assert len(npu_fuse_pass.reports()) == 1
    torch.testing.assert_close(params + more, others + more_others, rtol=1e-6, atol=0)


def test_what_differs_is_compiled_by_itself() -> None:
    began()
    p = torch.nn.Parameter(torch.ones(8, 8))
    kinds = [
        optimizers.NpuFusedAdamW([p]),
        optimizers.NpuFusedAdamW([p], amsgrad=True),
        optimizers.NpuFusedAdamW([torch.nn.Parameter(torch.ones(8, 9))]),
        optimizers.NpuFusedAdamW([p], state_dtype=torch.float64),
        optimizers.NpuFusedAdam([p]),
        heavy_ball([p]),
    ]
    for opt in kinds:
        for param in opt.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        by_torch(opt)()
        assert_fused(npu_fuse_pass.reports()[-1], parameters=1)
    assert len(npu_fuse_pass.reports()) == len(kinds)


FACTOR, CONSTANT = 1.0, torch.tensor(1.0)


@rule(defaults={"lr": 0.1})
def reads_globals(param: Tensor, grad: Tensor, *, lr: float) -> Tensor:
    return param - lr * FACTOR * CONSTANT * grad


def test_a_rule_that_reads_what_has_changed_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    began()
    for factor, constant in ((1.0, 1.0), (2.0, 1.0), (2.0, 3.0)):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        monkeypatch.setitem(globals(), "CONSTANT", torch.tensor(constant))
        params, opts = make(reads_globals, 2)
        train(params, [by_torch(opt) for opt in opts], rounds=1)
        for i, p in enumerate(params):
            torch.testing.assert_close(p.detach(), torch.full((8, 8), 1 + i + 0.1 * factor * constant * i))
    assert len(npu_fuse_pass.reports()) == 3


def test_threads() -> None:
    """Optimizers of two kinds, in four threads that begin at once."""
    began()
    kinds = [optimizers.NpuFusedAdamW, heavy_ball] * 2
    made, expected = [make(kind, 3) for kind in kinds], [make(kind, 3) for kind in kinds]
    works = [(params, [by_torch(opt) for opt in opts]) for params, opts in made]
    at_once(*(functools.partial(train, params, steps, rounds=5) for params, steps in works))
    for (params, _), (others, eager) in zip(made, expected, strict=True):
        train(others, [opt.step for opt in eager], rounds=5)
        torch.testing.assert_close(params, others, rtol=1e-6, atol=0)
    assert npu_fuse_pass.reports() and not any(r.reasons for r in npu_fuse_pass.reports())


def test_the_last_report_is_of_the_optimizer_that_stepped_for_the_first_time_last() -> None:
    began()
    params, opts = make(optimizers.NpuFusedAdamW, 3)
    other = heavy_ball([params[1]], lr=0.1)
    said = []
    for opt in (opts[0], other, opts[2]):
        train(params, [in_place(opt)], rounds=1)
        said.append(npu_fuse_pass.reports()[-1])
    assert said[2] is said[0] and [r is said[1] for r in npu_fuse_pass.reports()] == [True, False]
