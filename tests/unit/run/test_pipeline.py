"""The pipeline: pure stages, promises that are checked between them, and a net under all of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

import npu_fuse_pass
import optimizers
from npu_fuse_pass import lower, pipeline
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.capture.rule import capture_batches
from npu_fuse_pass.ir import verify
from npu_fuse_pass.ir.expr import Builder, Expr, postorder
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Captured, Grouped, Leaf, Slot, Update
from npu_fuse_pass.lowerings.npu.emit.split import split
from npu_fuse_pass.match.find import match
from npu_fuse_pass.options import Options, Target
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.passes.rewrite import rewrite
from npu_fuse_pass.passes.specialise import decide
from npu_fuse_pass.rules.batch import inputs_of
from tests.support.graphs import batches_of, captured_step, traced
from tests.support.training import compiled, gradients, last_report, parameters, set_gradients, warned

SHAPES = [(3, 4), (5,), (3, 4)]


def _clip_and_momentum(p: Any, g: Any, m: Any, q: Any, h: Any, n: Any, lr: Any) -> None:
    """Two parameters whose gradients have one norm; an operation that stays as it is lies between."""
    norm = torch.sqrt(g.square().sum() + h.square().sum())
    for param, grad, buffer in ((p, g, m), (q, h, n)):
        buffer.mul_(0.9).add_(torch.cumsum(grad / (norm + 1e-6), 0))
        param.sub_(buffer * lr)


def _graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return traced(_clip_and_momentum, *(torch.randn(4) for _ in range(6)), torch.tensor(0.1, dtype=torch.float64))


def _adamw() -> Any:
    params = parameters(SHAPES)
    opt = optimizers.NpuFusedAdamW(params, lr=0.01)
    set_gradients(params, gradients(params, 0))
    return opt


# Purity ---------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """A hash of everything that a stage could change in its input."""
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Expr):
        order = postorder([value])
        place = {id(e): i for i, e in enumerate(order)}
        return [(e.op, [place[id(a)] for a in e.args], e.value, str(e.dtype), e.tensor) for e in order]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *((f.name, _plain(getattr(value, f.name))) for f in dataclasses.fields(value))]
    if isinstance(value, fx.GraphModule):
        return [str(value.graph), [(n.name, sorted(n.meta)) for n in value.graph.nodes]]
    if isinstance(value, Tensor):
        return [str(value.dtype), tuple(value.shape), value.tolist()]
    if isinstance(value, dict):
        return [(_plain(k), _plain(v)) for k, v in value.items()]
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def test_no_stage_changes_its_input() -> None:
    gm, opt = _graph(), _adamw()
    batches = batches_of(opt)
    _unchanged([gm], lambda: capture(gm))
    _unchanged([[p.detach() for b in batches for p in b.params]], lambda: capture_batches(batches))
    for captured, values in ((capture(gm), None), (capture_batches(batches), inputs_of(batches))):
        assert captured.updates
        if values is not None:
            _unchanged([captured, values], lambda c=captured, v=values: decide(c, lambda leaf: v[leaf.index]))
        grouped = group(captured)
        _unchanged([captured], lambda c=captured: group(c))
        _unchanged([grouped], lambda g=grouped: match(g.groups, g.leaves))
        _unchanged([grouped], lambda g=grouped: rewrite(g))
        _unchanged([grouped, Options()], lambda g=grouped: lower.lower(g, Target("cpu"), Options()))


def _unchanged(given: list[Any], stage: Callable[[], Any]) -> None:
    before = fingerprint(given)
    stage()
    assert fingerprint(given) == before


def test_a_fingerprint_sees_a_change() -> None:
    captured = capture(_graph())
    before = fingerprint(captured)
    captured.leaves.append(Leaf("constant", "1.0", value=1.0))
    assert fingerprint(captured) != before


def test_grouping_twice_gives_the_same() -> None:
    captured = capture(_graph())
    leaves = len(captured.leaves)
    assert fingerprint(group(captured)) == fingerprint(group(captured))
    assert len(captured.leaves) == leaves < len(group(captured).leaves)


# Promises -------------------------------------------------------------------------------------------------


def _other_dtype(step: Captured) -> None:
    position = step.updates[0].writes[0][0]
    step.updates[0].slots[position] = Slot(True, torch.float16)


def _unknown_position(step: Captured) -> None:
    step.updates[0].writes[0] = (99, step.updates[0].writes[0][1])


def _short_member(step: Captured) -> None:
    step.updates[0].members[0] = step.updates[0].members[0][:-1]


def _no_such_leaf(step: Captured) -> None:
    step.updates[0].members[0] = (10_000, *step.updates[0].members[0][1:])


def _another_shape(step: Captured) -> None:
    leaf = step.updates[0].members[0][0]
    step.leaves[leaf] = dataclasses.replace(step.leaves[leaf], shape=(1, 2, 3))


def _reads_nothing(step: Captured) -> None:
    position, e = step.updates[0].writes[0]
    step.updates[0].writes[0] = (position, Expr("add", (e, Expr("leaf", (), 77, e.dtype, True)), None, e.dtype, True))


BROKEN: list[tuple[Callable[[Captured], None], str]] = [
    (_other_dtype, "holds torch.float16"),
    (_unknown_position, "writes position 99"),
    (_short_member, "a member of"),
    (_no_such_leaf, "names no leaf"),
    (_another_shape, "several shapes"),
    (_reads_nothing, "reads position 77"),
]


@pytest.mark.parametrize(("change", "complaint"), BROKEN, ids=[f.__name__ for f, _ in BROKEN])
def test_a_broken_promise_of_capture_is_noticed(change: Callable[[Captured], None], complaint: str) -> None:
    step = captured_step(_adamw())
    verify.captured(step)
    change(step)
    with pytest.raises(verify.BrokenPromiseError, match=complaint):
        verify.captured(step)


def test_a_broken_promise_of_grouping_is_noticed() -> None:
    grouped = group(captured_step(_adamw()))
    verify.grouped(grouped)
    grouped.groups[0].members[0] = grouped.groups[0].members[0][::-1]
    with pytest.raises(verify.BrokenPromiseError, match=grouped.groups[0].name):
        verify.grouped(grouped)
    with pytest.raises(verify.BrokenPromiseError, match="names no leaf"):
        verify.grouped(dataclasses.replace(group(captured_step(_adamw())), leaves=()))


def test_the_option_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(verify, "captured", seen.append)
    monkeypatch.setattr(verify, "grouped", seen.append)
    batches = batches_of(_adamw())
    pipeline.fuse_batches(batches, Options("cpu", verify=False))
    assert not seen
    pipeline.fuse_batches(batches, Options("cpu", verify=True))
    assert [type(s) for s in seen] == [Captured, Grouped]


# The net --------------------------------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> None:
    raise ValueError("planted\nmore")


STAGES = {
    "capture": ("stock", pipeline, "capture"),
    "capture of a rule": ("rule", pipeline, "capture_batches"),
    "group": ("stock", pipeline, "group"),
    "group of a rule": ("rule", pipeline, "group"),
    "lower": ("stock", pipeline.lower, "lower"),
    "lower of a rule": ("rule", pipeline.lower, "lower"),
    "choice of a target": ("rule", pipeline.lower, "choose"),
    "rows": ("rule", pipeline, "show_matches"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_internal_error_ends_no_training(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, module, name = STAGES[stage]
    make = _sgd if kind == "stock" else _own
    params, others = parameters(SHAPES), parameters(SHAPES)
    opt, eager = make(params), make(others)

    monkeypatch.setattr(module, name, fail)
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    step = torch.compile(opt.step, backend="npu_fused", options={"verify": False})
    said: list[str] = []
    for t in range(3):
        for own in (params, others):
            set_gradients(own, gradients(own, t))
        said += warned(step)
        eager.step()
        torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)
    reports = npu_fuse_pass.reports()
    assert reports and all("internal error: ValueError: planted" in str(r.fallback) for r in reports), reports
    assert len(said) == len(reports) and all("NPU_FUSE_VERIFY=1" in text for text in said), said


@pytest.mark.parametrize("option", ["strict", "verify"])
@pytest.mark.parametrize("stage", ["group", "lower of a rule"])
def test_an_internal_error_is_raised_on_request(stage: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, module, name = STAGES[stage]

    monkeypatch.setattr(module, name, fail)
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    torch._dynamo.reset()
    options = {"verify": False, option: True}
    step = torch.compile((_sgd if kind == "stock" else _own)(params).step, backend="npu_fused", options=options)
    with pytest.raises(Exception, match="planted") as raised:
        step()
    assert "ValueError" in f"{type(raised.value).__name__}: {raised.value}"


def test_a_report_that_cannot_be_shown_ends_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "announce", fail)
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    compiled(_own(params), verify=False)()
    assert last_report().fallback is None and len(last_report().groups) == 1
    assert "cannot be shown" in caplog.text


def test_what_surrounds_the_stages_has_a_net_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_fuse_pass import backend

    monkeypatch.setattr(backend, "graph_step", fail)
    params, others = parameters(SHAPES), parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    set_gradients(others, gradients(others, 0))
    torch._dynamo.reset()
    step = torch.compile(_sgd(params).step, backend="npu_fused", options={"verify": False})
    with pytest.warns(UserWarning, match="internal error: ValueError: planted"):
        step()
    _sgd(others).step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def _own(params: Any) -> torch.optim.Optimizer:
    opt: torch.optim.Optimizer = optimizers.NpuFusedSGD(params, lr=0.1, momentum=0.9)
    return opt


# Depth ----------------------------------------------------------------------------------------------------

DEPTH = 5000


def _chain(depth: int) -> Captured:
    """One parameter whose update is a chain of operations."""
    b = Builder()
    param, grad = (b.leaf(i, torch.float32, True) for i in range(2))
    x = param
    for _ in range(depth):
        x = b.op("add", b.op("mul", x, b.const(0.5)), grad)
    leaves = [Leaf("input", name, i, dtype=torch.float32, shape=(3,)) for i, name in enumerate(("param", "grad"))]
    slots = [Slot(True, torch.float32)] * 2
    return Captured(leaves, [Update([(0, x)], [], [(0, 1)], ["param", "grad"], slots)], [])


def test_formulas_may_be_deeper_than_pythons_stack() -> None:
    grouped = group(_chain(DEPTH))
    verify.grouped(grouped)
    (made,) = grouped.groups
    assert len(postorder(made.formula.roots)) > 2 * DEPTH
    assert parse(made.formula.text).text == made.formula.text
    assert len(postorder(split(made.formula, (), contribute=False).device.roots)) > 2 * DEPTH
    assert readable(made.formula, made.labels)
    assert made.name in {node.name for node in rewrite(grouped).graph.nodes}
    assert len(repr(made.formula.roots[0])) < 1000
    assert match(grouped.groups, grouped.leaves)[0].reason  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_rule_of_2000_operations_is_one_kernel() -> None:
    @npu_fuse_pass.rule(defaults=dict(lr=0.1))
    def deep(param: Tensor, grad: Tensor, *, lr: Tensor) -> tuple[Tensor]:
        x = param
        for _ in range(1000):
            x = x * 0.5 + grad
        return (param - lr * x,)

    params, others = parameters(SHAPES), parameters(SHAPES)
    step, eager = compiled(deep(params)), deep(others)
    for own in (params, others):
        set_gradients(own, gradients(own, 0))
    step()
    eager.step()
    assert last_report().fallback is None and [g.updates for g in last_report().groups] == [3]
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", ["capture", "group", "rewrite"])
def test_an_internal_error_leaves_another_compilers_graph_as_it_is(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, stage, fail)
    monkeypatch.setenv("NPU_FUSE_VERIFY", "0")
    params, others = parameters(SHAPES), parameters(SHAPES)
    for own in (params, others):
        set_gradients(own, gradients(own, 0))
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    backend = aot_autograd(fw_compiler=_left_alone, keep_inference_input_mutations=True)
    with pytest.warns(UserWarning, match="internal error: ValueError: planted"):
        torch.compile(_sgd(params).step, backend=backend)()
    _sgd(others).step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert "internal error" in str(last_report().fallback)


def _left_alone(gm: fx.GraphModule, _: Any) -> Any:
    before = str(gm.graph)
    npu_fuse_pass.FusePass()(gm)
    assert str(gm.graph) == before
    return gm.forward
