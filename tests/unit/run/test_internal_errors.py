"""A fault of this package at a later step: the original makes that one and those after it, with the reason."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass.lowerings.cpu import input_check, kernel, program
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.run import graph_step
from npu_fuse_pass.stock import prelude
from optimizers import NpuFusedAdamW

Steps = tuple[list[torch.nn.Parameter], Callable[[], Any]]


@pytest.fixture(autouse=True)
def own_reports() -> None:
    npu_fuse_pass.clear_reports()
    torch._dynamo.reset()


def params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 7, 300)]


def rule_of_torch() -> Steps:
    p = params()
    return p, npu_fuse_pass.compile_step(torch.optim.Adam(p, lr=0.1))


def rule_of_ours() -> Steps:
    p = params()
    return p, torch.compile(NpuFusedAdamW(p, lr=0.1, weight_decay=0.0).step, backend="npu_fused")


def captured() -> Steps:
    p = params()
    return p, torch.compile(torch.optim.Adagrad(p, lr=0.1).step, backend="npu_fused")


EAGER: dict[Callable[[], Steps], Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    rule_of_torch: lambda p: torch.optim.Adam(p, lr=0.1),
    rule_of_ours: lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    captured: lambda p: torch.optim.Adagrad(p, lr=0.1),
}
PLACES: list[tuple[object, str]] = [
    (program.Program, "_check_memory"),
    (program.Program, "_compute"),
    (kernel.Kernel, "write"),
]


def planted(*args: object, **kwargs: object) -> None:
    [][0]


def break_(monkeypatch: pytest.MonkeyPatch, holder: object, name: str) -> None:
    """Make a function fail as code of this package does: with a traceback that ends in it."""
    original: Any = vars(holder)[name]
    monkeypatch.setattr(original, "__code__", planted.__code__.replace(co_filename=original.__code__.co_filename))


def train(made: Steps, eager: list[torch.nn.Parameter], opt: torch.optim.Optimizer, times: int, seed: int) -> None:
    for k in range(times):
        for p, q in zip(made[0], eager, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + k))
            q.grad = p.grad.clone()
        made[1]()
        opt.step()
    for p, q in zip(made[0], eager, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", EAGER, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("holder", "name"), PLACES, ids=[name for _, name in PLACES])
def test_the_original_goes_on(
    kind: Callable[[], Steps], holder: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, eager = kind(), params()
    opt = EAGER[kind](eager)
    train(made, eager, opt, 3, 0)
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.fallback is None
    break_(monkeypatch, holder, name)
    with pytest.warns(UserWarning, match="internal error: IndexError"):
        train(made, eager, opt, 1, 3)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        train(made, eager, opt, 3, 4)
    report = npu_fuse_pass.reports()[-1]
    assert [reason.code for reason in report.fallbacks] == [Code.INTERNAL]
    assert {g.lowering for g in report.groups} == {"eager"}


def test_a_torch_class_whose_rule_cannot_be_prepared_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made, eager = rule_of_torch(), params()
    opt = EAGER[rule_of_torch](eager)
    train(made, eager, opt, 2, 0)
    break_(monkeypatch, prelude.StockPrelude, "_fit")
    train(made, eager, opt, 3, 2)
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.fallback is None
    assert report.no_rule is not None and "internal error: IndexError" in report.no_rule.text


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "finish") for kind in EAGER), (rule_of_torch, "checks"), (rule_of_ours, "checks")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_may_have_written_is_raised(kind: Callable[[], Steps], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, eager = kind(), params()
    train(made, eager, EAGER[kind](eager), 2 if name == "finish" else 1, 0)
    for p in made[0] if name == "checks" else ():  # after a step without a member
        p.grad = p.grad if p is made[0][0] else None
    made[1]()
    break_(monkeypatch, kernel.Kernel, name)
    with pytest.raises(IndexError):
        made[1]()


@pytest.mark.parametrize("kind", EAGER, ids=lambda f: f.__name__)
def test_what_others_raise_is_theirs(kind: Callable[[], Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a signal, say."""

    def handler(*args: object) -> None:
        raise TimeoutError

    made, eager = kind(), params()
    opt = EAGER[kind](eager)
    train(made, eager, opt, 2, 0)
    monkeypatch.setattr(kernel.Kernel, "write", handler)
    with pytest.raises(TimeoutError):
        made[1]()
    monkeypatch.undo()
    train(made, eager, opt, 2, 2)
    assert npu_fuse_pass.reports()[-1].fallback is None


def test_a_fault_behind_the_program_does_not_run_the_original_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    p = params()

    def step() -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_sub_(p, [x.grad for x in p])
            return p[0] * 2

    compiled = torch.compile(step, backend="npu_fused")
    for x in p:
        x.grad = torch.ones_like(x)
    before = [x.detach().clone() for x in p]
    compiled()
    assert npu_fuse_pass.reports()[-1].groups and npu_fuse_pass.reports()[-1].fallback is None
    break_(monkeypatch, graph_step, "_returned")
    with pytest.raises(IndexError):
        compiled()
    for x, old in zip(p, before, strict=True):
        torch.testing.assert_close(x, old - 2)


def test_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    made = params()
    step = npu_fuse_pass.compile_step(torch.optim.Adam(made, lr=0.1), strict=True)
    for p in made:
        p.grad = torch.ones_like(p)
    step()
    before = [p.detach().clone() for p in made]
    break_(monkeypatch, kernel.Kernel, "write")
    with pytest.raises(IndexError):
        step()
    assert all(torch.equal(p, q) for p, q in zip(made, before, strict=True))


def test_the_next_optimizer_of_its_kind_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers that are alike share the report of a compile, but not of one that was given up."""
    made, eager = rule_of_torch(), params()
    train(made, eager, EAGER[rule_of_torch](eager), 1, 0)
    break_(monkeypatch, kernel.Kernel, "write")
    made[1]()
    monkeypatch.undo()
    other, eager = rule_of_torch(), params()
    train(other, eager, EAGER[rule_of_torch](eager), 2, 0)
    given_up, report = npu_fuse_pass.reports()[-2:]
    assert given_up.fallback is not None and report.fallback is None
    assert [g.lowering for g in report.groups] == ["cpu"]


@pytest.mark.parametrize("kind", EAGER, ids=lambda f: f.__name__)
@pytest.mark.parametrize("native", [True, False], ids=["native input check", "in Python"])
def test_a_fault_anywhere_is_never_silently_wrong(
    kind: Callable[[], Steps], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised, or what the step leaves is what the original does."""
    if not native:
        monkeypatch.setattr(input_check, "WORTH", 1000)
    raised = []
    functions = [f for cls in (program.Program, kernel.Kernel) for _, f in inspect.getmembers(cls, inspect.isfunction)]
    functions = [f for f in functions if not f.__code__.co_freevars and f.__name__ != "__init__"]
    for function in functions:
        made, eager = kind(), params()
        opt = EAGER[kind](eager)
        train(made, eager, opt, 2, 0)
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = planted.__code__.replace(co_filename=function.__code__.co_filename)
            patched.setattr(function, "__code__", code)
            try:
                train(made, eager, opt, 1, 2)
            except IndexError:
                raised.append(function.__name__)
    assert len(functions) > 25
    if kind is not rule_of_ours:  # its own preparation has no original beside it
        assert set(raised) <= {"call", "finish", "release", "checks"}, raised
