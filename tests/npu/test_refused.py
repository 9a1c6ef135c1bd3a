"""What happens when GE refuses a step's graph: the elementwise form runs, and where GE refuses that too, the original.

Each starts from values that the failed try did not change.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from steps import SHAPES, assert_close, assert_same, parameters, set_gradients, step_both, twins

import npu_fuse_pass
from npu_fuse_pass import errors
from npu_fuse_pass.lowerings.npu import execution, fakes, program
from npu_fuse_pass.lowerings.npu.environment import require
from npu_fuse_pass.lowerings.npu.graph import converters
from tests.support.cases import BY_NAME
from tests.support.training import heard, warned

TORCH_NPU = importlib.metadata.version("torch_npu")
LEAVES = ["load", "compile", "run", "write"]
GE_SAYS = "EZ9999: Inner Error! op ApplyX\n  TraceBack: tiling failed"


def fails() -> RuntimeError:
    """As torchair gives it on: with its own traceback behind the text."""
    return RuntimeError(f"{GE_SAYS}\nTraceback (most recent call last):\n  File x\n[ERROR] ERR03005 GRAPH")


def in_a_function(opt: Any) -> Callable[[], None]:
    params = opt.param_groups[0]["params"]

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    return tail


# How an optimizer is built, and what is compiled of it.
STEPS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Callable[[], None]]]] = {
    "ours": (BY_NAME["adam"].build, lambda opt: opt.step),
    "ours_in_a_function": (BY_NAME["adam"].build, in_a_function),
    "stock": (lambda p: torch.optim.Adam(p, lr=0.02, foreach=False), lambda opt: opt.step),
    "stock_foreach": (lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True), lambda opt: opt.step),
    "stock_rule": (lambda p: torch.optim.AdamW(p, lr=0.02), lambda opt: opt.step),  # by compile_step
}

DEDICATED = [name for name in STEPS if name != "ours_in_a_function"]  # that one writes the clipped gradients, too


def compiled(function: Callable[[], None], **options: Any) -> Callable[[], None]:
    return torch.compile(function, backend=npu_fuse_pass.npu_fused, options={"platform": "npu", **options})


def compiled_as(name: str, opt: Any, **options: Any) -> Callable[[], None]:
    """What `STEPS` says of a name, compiled."""
    if name == "stock_rule":
        return npu_fuse_pass.compile_step(opt, platform="npu", **options)
    return compiled(STEPS[name][1](opt), **options)


def values(opt: Any) -> list[torch.Tensor]:
    params = opt.param_groups[0]["params"]
    states = [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    gradients = [p.grad for p in params if p.grad is not None]
    return [t.detach().clone() for t in [*params, *gradients, *states]]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", STEPS)
def test_training_continues_with_the_original(name: str, leaf: str, ge: harness.Recording) -> None:
    build, function = STEPS[name]
    ours, eager = build(parameters()), build(parameters())
    step, eager_step = compiled_as(name, ours), function(eager)
    ge.failing[leaf] = fails()
    with heard() as ours_say:
        step_both(ours, eager, step, 4, eager_step)
    assert_same(ours, eager, 2e-6)  # compiled, stock Adam is capturable: another order of its bias corrections
    refused = [r for r in npu_fuse_pass.reports() if r.groups]
    assert len(ours_say) == len(refused) >= 1  # once for every graph: torch's optimizers have one for the first step
    for report, warning in zip(refused, ours_say, strict=True):
        assert GE_SAYS in report.fallback
        assert "[ERROR]" not in report.fallback
        assert report.fallback in warning
        for part in (f"torch {torch.__version__}", f"torch_npu {TORCH_NPU}", "CANN unknown", f"chip {harness.SOC}"):
            assert part in report.fallback
        assert "What to do: report it" in warning and "report it" in str(report)
        assert {(g.lowering, g.kernel, g.launches) for g in report.groups} == {
            ("eager", "original graph, not GE elementwise", 0)
        }
        assert GE_SAYS.splitlines()[0] in str(report)
        assert report.to_json()["fallback"] == report.fallback
        assert all(GE_SAYS in g.note for g in report.groups) or name not in DEDICATED
    forms = 2  # dedicated operations, or on lists, and elementwise
    assert sum(g.runs for g in ge.graphs) == (forms * len(refused) if leaf == "write" else 0)  # each tried once


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", DEDICATED)
def test_the_elementwise_form_is_tried_first(name: str, leaf: str, ge: harness.Recording) -> None:
    """GE refuses what has a dedicated operation, and takes the rest."""
    build, function = STEPS[name]
    ours, eager = build(parameters()), build(parameters())
    step, eager_step = compiled_as(name, ours, strict=True), function(eager)
    ge.failing[leaf], ge.only = fails(), frozenset({"AdamApplyOneAssign"})
    with heard() as says:
        step_both(ours, eager, step, 3, eager_step)
    assert_same(ours, eager, 2e-6)
    tried = [r for r in npu_fuse_pass.reports() if r.groups]
    assert len(says) == len(tried) >= 1
    assert all("without dedicated operations" in text and GE_SAYS in text for text in says)
    for report in tried:
        assert report.fallback is None
        assert {(g.lowering, g.kernel) for g in report.groups} == {("npu", "GE elementwise")}
        for g in report.groups:
            assert GE_SAYS in g.note and "What to do: report it" in g.note and f"chip {harness.SOC}" in g.note
        after = sum(g.bytes_per_element * g.elements for g in report.groups) / sum(g.elements for g in report.groups)
        assert report.bytes_per_element["after"] == pytest.approx(after)
    kinds = [("AdamApplyOneAssign" in g.counts(), g.runs) for g in ge.graphs]
    assert sum(runs for dedicated, runs in kinds if not dedicated) == 3
    assert sum(runs for dedicated, runs in kinds if dedicated) == (len(tried) if leaf == "write" else 0)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", STEPS)
def test_strict_raises_and_nothing_is_changed(name: str, leaf: str, ge: harness.Recording) -> None:
    ours = STEPS[name][0](parameters())
    params = ours.param_groups[0]["params"]
    set_gradients(params, 0)
    ours.step()
    before = values(ours)
    step = compiled_as(name, ours, strict=True)
    ge.failing[leaf] = fails()
    for _ in range(2):  # not silent the second time either
        with pytest.raises(errors.UnfusedError, match="EZ9999"):
            step()
    for got, wanted in zip(values(ours), before, strict=True):
        assert torch.equal(got, wanted)


def test_a_later_failure_is_the_users(ge: harness.Recording) -> None:
    """GE has written in place by then: nothing is done on top of it, and nothing is silent."""
    ours, eager = twins(BY_NAME["adam"])
    step = compiled(ours.step)
    for optimizer in (ours, eager):
        set_gradients(optimizer.param_groups[0]["params"], 0)
    step()
    eager.step()
    assert_same(ours, eager, 1e-6)
    ge.failing["write"] = fails()
    with pytest.raises(npu_fuse_pass.StepFailedError, match=r"partly updated.*checkpoint.*EZ9999.*") as raised:
        step()
    assert isinstance(raised.value, RuntimeError)
    assert raised.value.__cause__ is ge.failing["write"]
    assert npu_fuse_pass.reports()[-1].fallback is None
    assert [g.runs for g in ge.graphs] == [2]


def test_an_interrupted_first_run_is_undone(ge: harness.Recording) -> None:
    ours, untouched = twins(BY_NAME["adam"])
    set_gradients(ours.param_groups[0]["params"], 0)
    ge.failing["write"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        compiled(ours.step)()
    for p, q in zip(ours.param_groups[0]["params"], untouched.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_torchair_that_does_not_convert(ge: harness.Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any) -> Any:
        raise NotImplementedError("npu_fused.device_update.default ge_converter is not implemented!")

    monkeypatch.setattr(converters, "_slots", unknown)
    ours, eager = twins(BY_NAME["adam"])
    for optimizer in (ours, eager):
        set_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.warns(
        UserWarning, match=rf"npu_fused.*does not convert.*implemented! \[torch .*torch_npu {re.escape(TORCH_NPU)}"
    ):
        compiled(ours.step)()
    eager.step()
    assert_same(ours, eager, 0)
    assert "does not convert" in str(npu_fuse_pass.reports()[-1].fallback)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="does not convert"):
        compiled(ours.step, strict=True)()


def test_another_form_is_made_as_a_compile_is(ge: harness.Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchair traces when it is first used, under flags of the whole process, and other threads may train."""
    found: list[bool] = []

    def watched(mode: Any) -> Any:
        found.append(torch.compiler.is_compiling())
        return fakes.while_traced(mode)

    monkeypatch.setattr(program, "while_traced", watched)
    ours, _ = twins(BY_NAME["adam"])
    set_gradients(ours.param_groups[0]["params"], 0)
    ge.failing["run"], ge.only = fails(), frozenset({"AdamApplyOneAssign"})
    with pytest.warns(UserWarning, match="without dedicated operations"):
        compiled(ours.step)()
    assert found == [True, True]


def test_a_new_plan_is_tried_again(ge: harness.Recording) -> None:
    """Another graph may be one that GE takes."""
    ours, eager = twins(BY_NAME["adam"])
    step = compiled(ours.step)
    ge.failing["compile"] = fails()
    for k in range(4):
        if k == 2:
            ge.failing.clear()
            for optimizer in (ours, eager):
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 3))]})
        for optimizer in (ours, eager):
            set_gradients([p for g in optimizer.param_groups for p in g["params"]], k)
        assert len(warned(step)) == (k == 0)
        eager.step()
    assert_same(ours, eager, 1e-6)
    assert_close(ours.param_groups[1]["params"][0], eager.param_groups[1]["params"][0], 1e-6)
    assert [g.runs for g in ge.graphs] == [0, 0, 2]  # of the first two, both forms are refused
    first, second = npu_fuse_pass.reports()
    assert "EZ9999" in str(first.fallback)
    assert second.fallback is None
    assert (second.groups[0].lowering, second.groups[0].updates) == ("npu", len(SHAPES) + 1)


def test_compile_step_and_explain(ge: harness.Recording) -> None:
    ours, eager = twins(BY_NAME["adam"])
    for optimizer in (ours, eager):
        set_gradients(optimizer.param_groups[0]["params"], 0)
    ge.failing["load"] = fails()
    assert "EZ9999" in str(npu_fuse_pass.explain(ours, platform="npu").fallback)
    assert_same(ours, twins(BY_NAME["adam"])[0], 0)
    with pytest.raises(npu_fuse_pass.UnfusedError, match="EZ9999"):
        npu_fuse_pass.compile_step(ours, platform="npu", strict=True)()
    with pytest.warns(UserWarning, match="npu_fused.*EZ9999"):
        npu_fuse_pass.compile_step(ours, platform="npu", torchair_config=require().CompilerConfig())()
    eager.step()
    assert_same(ours, eager, 0)


def test_a_first_run_that_cannot_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is gone: there are no values to go on from."""

    def gone(devices: Any) -> None:
        raise RuntimeError("507035: vector core exception")

    monkeypatch.setattr(execution, "wait_for", gone)
    run = execution.Execution(lambda *_: [], lambda: "versions")
    with pytest.raises(errors.StepFailedError, match=r"undoing it: RuntimeError: 507035.*\[versions\]"):
        run([torch.ones(2)], [0])


def test_an_npu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    harness.prepare()
    require()
    waited: list[Any] = []
    monkeypatch.setattr(torch.npu, "synchronize", waited.append)
    execution.wait_for([torch.device("cpu"), torch.device("npu:0")])
    assert waited == [torch.device("npu:0")]
