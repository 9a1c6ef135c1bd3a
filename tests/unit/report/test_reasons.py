"""Reasons as values: each code is raised, its remedy removes it, and the same reason is shown everywhere."""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass import private_torch
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.errors import GraphRefused, Mismatch, Unsupported
from npu_fuse_pass.ir.expr import Builder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.cpu import program as cpu
from npu_fuse_pass.lowerings.npu import whole
from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.emit.split import split
from npu_fuse_pass.lowerings.npu.kernels.launch import generate_group
from npu_fuse_pass.match.polynomial import Arithmetic
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.causes import recompile
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.run.fallbacks import refusal
from scripts import reasons_table
from tests.support.graphs import batches_of, traced
from tests.support.kernel_cache import forget, own_cache
from tests.support.training import gradients, last_report, parameters, set_gradients, warned

pytestmark = pytest.mark.usefixtures("afresh")


# Values --------------------------------------------------------------------------------------------------------------


def test_a_reason_prints_with_its_operation_and_place() -> None:
    reason = Reason(Code.OPERATION, "has no place", "logit", "do something", "logit_1", "train.py:12, in step")
    assert str(reason) == "logit: has no place (train.py:12, in step)"
    assert reason.advised == f"{reason}. What to do: do something"
    assert str(reason.led_by("at some steps")) == "at some steps: logit: has no place (train.py:12, in step)"
    assert reason.to_json() == {
        "code": "OPERATION",
        "text": "has no place",
        "op": "logit",
        "remedy": "do something",
        "node": "logit_1",
        "source": "train.py:12, in step",
    }


def test_a_code_gives_its_remedy_unless_the_reason_knows_better() -> None:
    assert Code.SHARED_MEMORY("x").remedy == Code.SHARED_MEMORY.remedy
    assert Code.SHARED_MEMORY("x", remedy="y").remedy == "y"
    assert len({code.meaning for code in Code}) == len(Code)  # equal values would be one member with two names


class Logit(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(torch.logit(torch.sigmoid(p.grad)))  # the place


@npu_fuse_pass.rule(defaults={"lr": 0.1})  # the place
def cumulated(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    return param - lr * torch.cumsum(grad, 0)


@npu_fuse_pass.rule(defaults={"lr": 0.1})
def failing(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    if grad.ndim == 1:
        grad.tolist()  # the place
    return param - lr * grad


@pytest.mark.parametrize("make", [Logit, lambda p: cumulated(p), lambda p: failing(p)])
def test_a_reason_names_the_line_in_the_users_source(make: Any) -> None:
    params = parameters(((4,), (3,)))
    set_gradients(params, gradients(params, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = npu_fuse_pass.explain(make(params))
    sources = {reason.source for reason in report.reasons}
    (line,) = {str(source).partition(",")[0].rpartition(":")[2] for source in sources}
    assert "# the place" in pathlib.Path(__file__).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert all("test_reasons.py:" in str(source) and str(source) in str(report) for source in sources)


# What is true --------------------------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor that wraps another one and has no memory."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        return made

    def __init__(self, inner: Tensor) -> None:
        self.wrapped = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapper({self.wrapped})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["wrapped"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Wrapper:
        return Wrapper(inner["wrapped"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = torch.utils._pytree.tree_map_only(Wrapper, lambda w: w.wrapped, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if func._schema.is_mutable:
            return args[0]
        return torch.utils._pytree.tree_map_only(Tensor, Wrapper, result)


WRAPPED = {"parameter": (Wrapper, torch.clone), "gradient": (torch.clone, Wrapper), "both": (Wrapper, Wrapper)}


@pytest.mark.parametrize("which", WRAPPED)
@pytest.mark.parametrize("n", [1, 3])
def test_tensors_without_memory_are_refused_as_such(which: str, n: int) -> None:
    """Nothing is tied, and nothing is written where there is no memory."""
    wrap, wrap_gradient = WRAPPED[which]
    params = [torch.nn.Parameter(wrap(torch.ones(4))) for _ in range(n)]
    for p in params:
        p.grad = wrap_gradient(torch.ones(4))
    said = warned(torch.compile(optimizers.NpuFusedSGD(params, lr=0.25).step, backend="npu_fused"))
    (reason,) = last_report().reasons
    assert reason.code is Code.NO_MEMORY and len(said) == 1 and "tied" not in said[0]
    assert all(torch.equal(getattr(p.data, "wrapped", p.data), torch.full((4,), 0.75)) for p in params)


def test_two_steps_in_one_graph_are_told_as_such() -> None:
    """Dynamo's graphs end before a second step; whoever makes another graph learns why it does not fuse."""
    params = ones((4,))
    opt = optimizers.NpuFusedAdam(params, lr=0.1)
    found: list[set[Code]] = []

    def doubled(gm: fx.GraphModule, inputs: Any) -> Any:
        (step,) = (node for node in gm.graph.nodes if node.target is core_op.rule_update)
        with gm.graph.inserting_after(step):
            gm.graph.node_copy(step, lambda node: node)
        batches_of(opt)
        found.append({reason.code for reason in capture(gm).unfused})
        return gm.forward

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    torch.compile(clipped, backend=doubled)()
    assert found == [{Code.STEPS_TWICE}]


def test_reordered_parameters_are_no_other_optimizer() -> None:
    params = parameters(((4,), (3,)))
    set_gradients(params, gradients(params, 0))
    opt = torch.optim.Adam(params, lr=0.1)
    step = torch.compile(opt.step, backend="npu_fused")
    step()
    step()
    opt.param_groups[0]["params"].reverse()
    step()
    assert "another optimizer" not in last_report().cause
    assert "in another order" in last_report().cause and last_report().cause_remedy


@pytest.mark.parametrize("loaded", ["after", "before"])
def test_loaded_states_are_no_other_optimizer(loaded: str) -> None:
    params = parameters(((4,), (3,)))
    set_gradients(params, gradients(params, 0))
    opt = torch.optim.Adam(params, lr=0.1, foreach=False)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for made in range(3):
        if made == (0 if loaded == "before" else 2):
            opt.load_state_dict(saved)
        if not made:
            step = torch.compile(opt.step, backend="npu_fused")
        step()
    if loaded == "after":
        assert last_report().cause.startswith(
            "the states are other tensors than before (load_state_dict makes new ones)"
        )
        assert last_report().cause_remedy.startswith("load checkpoints before the first step")
    else:
        assert len(npu_fuse_pass.reports()) == 1


def test_users_of_these_optimizers_are_not_told_to_use_one() -> None:
    params = parameters(((4,), (3,)))
    opt = optimizers.NpuFusedAdam(params, lr=0.1)

    @torch.compile(backend="npu_fused")
    def step(lr: float) -> None:
        opt.param_groups[0]["lr"] = lr
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    for i in range(4):
        set_gradients(params, gradients(params, i))
        if i == 3:
            params[0].grad = None
        step(0.1 * (i + 1))
    remedies = [remedy for report in npu_fuse_pass.reports() for remedy in report.remedies]
    assert not any("optimizer of this package" in remedy or "npu_fuse_pass.rule" in remedy for remedy in remedies)


def test_guards_on_numbers_have_a_remedy_for_who_steps() -> None:
    guard = "0/1: G['opt'].param_groups[0]['lr'] == 0.1"
    assert "optimizer of this package" in str(recompile(guard, with_rules=False).remedy)
    assert "outside of the compiled function" in str(recompile(guard, with_rules=True).remedy)
    missing = "3/0: self.param_groups[0]['params'][1].grad is None  # train.py:5 in step"
    assert "optimizer of this package" in str(recompile(missing, with_rules=False).remedy)
    assert "torch.compile(opt.step) alone" in str(recompile(missing, with_rules=True).remedy)


def test_nothing_is_promised_before_the_original_ran() -> None:
    said = warned(lambda: torch.compile(lambda p: p[:2].add_(1), backend="npu_fused")(torch.ones(3)))
    assert len(said) == 1 and "not fused" in said[0] and "right" not in said[0]
    report = last_report()
    assert report.fallback and f"{report.fallback}. What to do: {report.remedies[0]}" in said[0]


def test_the_report_holds_the_same_reason_that_is_printed() -> None:
    report = CompileReport("cpu", fallbacks=[Code.SHARED_MEMORY("two tensors overlap")])
    assert report.fallback == str(report.reasons[0]) == "two tensors overlap"
    assert report.to_json()["reasons"] == [report.reasons[0].to_json()]


# Every code is raised, and its remedy, followed, removes it ----------------------------------------------------------

Operation = Callable[..., Any]
# code -> what raises it, and the same with its remedy followed; p and q are float32, h is bfloat16
OPERATIONS: dict[Code, tuple[Operation, Operation]] = {
    Code.OPERATION: (lambda p, q, h: p.copy_(torch.logit(p)), lambda p, q, h: p.copy_(torch.log(p / (1 - p)))),
    Code.FORM: (
        lambda p, q, h: p.copy_(torch.round(p, decimals=2)),
        lambda p, q, h: p.copy_(torch.round(p * 100) / 100),
    ),
    Code.DTYPE: (lambda p, q, h: p.add_(p.to(torch.int64)), lambda p, q, h: p.add_(torch.trunc(p))),
    Code.HALF_PRECISION: (
        lambda p, q, h: h.copy_(torch.floor_divide(h, 0.3)),
        lambda p, q, h: h.copy_(torch.floor_divide(h.float(), 0.3)),
    ),
    Code.DEVICE: (lambda p, q, h: p.copy_(p.to("cpu", copy=True) * 2), lambda p, q, h: p.copy_(p * 2)),
    Code.SHAPES: (lambda p, q, h: p.add_(q), lambda p, q, h: p.add_(p)),
    Code.REDUCTION: (lambda p, q, h: p.mul_(p.sum((0, 1), keepdim=True)), lambda p, q, h: p.mul_(p.sum())),
    Code.ACROSS_PARAMETERS: (
        lambda p, q, h: [q.mul_(p.norm(i)) for i in range(1, 11)][:0],
        lambda p, q, h: (q.mul_(sum(p.norm(i) for i in range(1, 11))),)[:0],
    ),
    Code.VIEW_WRITTEN: (lambda p, q, h: (p[:1].add_(1),)[:0], lambda p, q, h: p.add_(1)),
    Code.VIEW_RETURNED: (
        lambda p, q, h: (p.add_(1), q.view(-1, 1))[1],
        lambda p, q, h: (p.add_(1), q.view(-1, 1).clone())[1],
    ),
    Code.SIZE: (lambda p, q, h: p.mul_(p.size(0)), lambda p, q, h: p.mul_(4)),
}


def read_after_writing(p: Tensor, q: Tensor, h: Tensor) -> None:
    view = p.view(-1)
    p.add_(1)
    q.copy_(torch.logit(view[:4]))


def read_before_writing(p: Tensor, q: Tensor, h: Tensor) -> None:
    view = p.view(-1)
    q.copy_(torch.logit(view[:4]))
    p.add_(1)


OPERATIONS[Code.VIEW_STALE] = read_after_writing, read_before_writing


def codes_of(function: Operation) -> set[Code]:
    graph = traced(function, torch.rand(4, 4), torch.rand(4), torch.rand(4, 4).bfloat16())
    return {reason.code for reason in capture(graph).unfused}


@pytest.mark.parametrize("code", OPERATIONS, ids=lambda code: code.name)
def test_what_an_update_computes(code: Code) -> None:
    raises, cured = OPERATIONS[code]
    assert code in codes_of(raises) and code not in codes_of(cured) and code.remedy


# a step, and the same with the remedy followed; None: the reason is the user's own error
Steps = tuple[Callable[[], Any], Callable[[], Any] | None]


def ones(*shapes: tuple[int, ...], wrap: Callable[[Tensor], Tensor] = torch.clone) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(wrap(torch.ones(shape))) for shape in shapes]
    for p, shape in zip(params, shapes, strict=True):
        p.grad = wrap(torch.ones(shape))
    return params


def compiled(opt: torch.optim.Optimizer) -> Callable[[], Any]:
    return torch.compile(opt.step, backend="npu_fused")


def shared_memory() -> Steps:
    (p,) = ones((4,))
    tied = [p, torch.nn.Parameter(p.detach())]
    tied[1].grad = torch.ones(4)
    return compiled(optimizers.NpuFusedSGD(tied, lr=0.1)), compiled(optimizers.NpuFusedSGD(ones((4,), (4,)), lr=0.1))


def no_memory() -> Steps:
    wrapped = compiled(optimizers.NpuFusedSGD(ones((4,), wrap=Wrapper), lr=0.1))
    return wrapped, compiled(optimizers.NpuFusedSGD(ones((4,)), lr=0.1))


def kept() -> Steps:
    def step(held: bool) -> Callable[[], Any]:
        params = ones((4,))
        opt = optimizers.NpuFusedAdam(params, lr=0.1)
        opt.step()
        counter = opt.state[params[0]]["step"]

        def counted() -> Any:
            opt.step()
            return counter * 2 if held else None

        return torch.compile(counted, backend="npu_fused")

    return step(True), step(False)


def repeated() -> Steps:
    p, q = ones((4,), (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the duplicate
        twice = optimizers.NpuFusedAdam([p, p], lr=0.1)
    return compiled(twice), compiled(optimizers.NpuFusedAdam([q], lr=0.1))


def hooks() -> Steps:
    def step(fullgraph: bool) -> Callable[[], Any]:
        opt = optimizers.NpuFusedAdam(ones((4,)), lr=0.1)
        opt.register_step_post_hook(lambda *_: None)

        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
            opt.step()

        return torch.compile(clipped, backend="npu_fused", fullgraph=fullgraph)

    return step(True), step(False)


def constant() -> Steps:
    @npu_fuse_pass.rule(defaults={"lr": 0.1})
    def with_a_tensor(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
        return param - lr * grad * torch.tensor([2.0], device=grad.device)

    @npu_fuse_pass.rule(defaults={"lr": 0.1})
    def with_a_number(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
        return param - lr * grad * 2.0

    return compiled(with_a_tensor(ones((4,)))), compiled(with_a_number(ones((4,))))


def other_device() -> Steps:
    def step(device: str) -> Callable[[], Any]:
        p = torch.ones(4, device=device)
        return lambda: torch.compile(lambda p: p.mul_(0.5), backend="npu_fused", options={"platform": "cpu"})(p)

    return step("meta"), step("cpu")


def failing_rule() -> Steps:
    return compiled(failing(ones((4,)))), None


def other_gradients() -> Steps:
    params = ones((4,), (3,))
    opt = optimizers.NpuFusedAdam(params, lr=0.1)

    def drops(gm: Any, inputs: Any) -> Any:
        grad, params[0].grad = params[0].grad, None
        try:
            return npu_fused(gm, inputs)
        finally:
            params[0].grad = grad

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    return torch.compile(step, backend=drops), torch.compile(step, backend="npu_fused")


def large_integers() -> Steps:
    def step(number: int) -> Callable[[], Any]:
        def run() -> None:
            torch._dynamo.reset()
            update = torch.compile(lambda p, n: p.mul_(n * n % 7), backend="npu_fused", dynamic=True)
            update(torch.ones(4), 3)
            update(torch.ones(4), number)

        return run

    return step(2**40), step(4)


def sharded() -> Steps:
    @torch.no_grad()
    def divide(p: Tensor, by: Tensor) -> None:
        p.div_(by.norm())

    @torch.no_grad()
    def halve(p: Tensor, by: Tensor) -> None:
        p.mul_(0.5)

    def step(function: Callable[..., None]) -> Callable[[], Any]:
        def run() -> None:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            try:
                mesh = init_device_mesh("cpu", (1,))
                p = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
                torch.compile(function, backend="npu_fused")(p, p)
            finally:
                torch.distributed.destroy_process_group()

        return run

    return step(divide), step(halve)


STEPS: dict[Code, Callable[[], Steps]] = {
    Code.NUMBER: large_integers,
    Code.SHARDED: sharded,
    Code.SHARED_MEMORY: shared_memory,
    Code.NO_MEMORY: no_memory,
    Code.KEPT: kept,
    Code.REPEATED: repeated,
    Code.HOOKS: hooks,
    Code.CONSTANT: constant,
    Code.OTHER_DEVICE: other_device,
    Code.RULE: failing_rule,
    Code.GRADIENTS: other_gradients,
}


@pytest.mark.parametrize("code", STEPS, ids=lambda code: code.name)
def test_what_a_step_is_called_with(code: Code) -> None:
    raises, cured = STEPS[code]()
    said = warned(raises)
    reasons = [reason for report in npu_fuse_pass.reports() for reason in report.reasons]
    assert {reason.code for reason in reasons} == {code}
    assert len(said) == 1 and reasons[0].text.removeprefix("at some steps: ") in said[0]
    assert all(reason.remedy is None or f"What to do: {reason.remedy}" in said[0] for reason in reasons)
    if cured is not None:
        npu_fuse_pass.clear_reports()
        assert warned(cured) == []
        assert any(report.groups for report in npu_fuse_pass.reports())
        assert not any(report.reasons for report in npu_fuse_pass.reports())


class Reads(torch.optim.Optimizer):
    """Breaks every graph before it writes anything."""

    def __init__(self, params: Any, where: bool) -> None:
        super().__init__(params, {"lr": 0.1})
        self.where = where

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if self.where:
                p.sub_(torch.where(p.grad.sum() > 0, p.grad, p.grad * 0.5))
            elif p.grad.sum() > 0:
                torch._dynamo.graph_break()


class Assigns(torch.optim.Optimizer):
    """Gives its parameters other memory at every step, or copies into theirs."""

    def __init__(self, params: Any, copies: bool) -> None:
        super().__init__(params, {"lr": 0.1})
        self.copies = copies

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            new = p.data - 0.1 * p.grad
            if self.copies:
                p.data.copy_(new)
            else:
                p.data = new


class Alternates(torch.optim.Optimizer):
    """Counts in a number of its group, by which it looks into a list: Dynamo then takes it for a constant."""

    def __init__(self, params: Any, from_list: bool) -> None:
        super().__init__(params, {"lr": 0.1, "count": 0})
        self.from_list = from_list

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        group["count"] += 1
        scale = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)[group["count"] % 6] if self.from_list else 1 / (1 + group["count"])
        for p in group["params"]:
            p.sub_(p.grad, alpha=scale)


EXPLAINED: dict[str, tuple[Code, Callable[[], Any], Callable[[], Any] | None]] = {
    "fused": (
        Code.FUSED_OPTION,
        lambda: torch.optim.Adam(ones((4,)), fused=True),
        lambda: torch.optim.Adam(ones((4,))),
    ),
    "hidden": (Code.HIDDEN, lambda: torch.optim.SparseAdam(ones((4,))), lambda: torch.optim.Adam(ones((4,)))),
    "a value": (Code.VALUE, lambda: Reads(ones((4,)), False), lambda: Reads(ones((4,)), True)),
    "other memory": (
        Code.OPERATION,
        lambda: Assigns(ones((4,)), copies=False),
        lambda: Assigns(ones((4,)), copies=True),
    ),
    "compiled anew": (
        Code.RECOMPILES,
        lambda: Alternates(ones((4,)), from_list=True),
        lambda: Alternates(ones((4,)), from_list=False),
    ),
    "nothing to update": (Code.NOT_CAPTURED, lambda: torch.optim.SGD([torch.ones(3)], lr=0.1), None),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_torch_shows(name: str) -> None:
    code, raises, cured = EXPLAINED[name]
    report = npu_fuse_pass.explain(raises())
    assert {reason.code for reason in report.reasons} == {code} and report.remedies
    if cured is not None:
        assert not npu_fuse_pass.explain(cured()).reasons


def test_the_remedy_for_assigned_data_names_it() -> None:
    (reason,) = npu_fuse_pass.explain(Assigns(ones((4,)), copies=False)).reasons
    assert reason.op == "data" and "p.data.copy_(" in reason.advised


def test_what_torch_compiles_no_further_is_said_with_its_cause() -> None:
    params = ones((4,))
    step = npu_fuse_pass.compile_step(Alternates(params, from_list=True))
    with torch._dynamo.config.patch(recompile_limit=3):
        said = warned(lambda: [step() for _ in range(5)])
    assert len(said) == 1 and "a step of Alternates ran eagerly" in said[0]
    for words in (
        "a number in a parameter group changed",
        "test_reasons.py:",
        "What to do: use an optimizer of this package",
    ):
        assert words in said[0]


@pytest.mark.parametrize(
    ("reason", "cause", "has_remedy"),
    [
        ("0/1: self.state[p]['step'] == 1  # a  # lib/a.py:3 in step", "a Python number in the states", False),
        ("0/4: self.state[p]['step'] == 4  # a  # lib/a.py:3 in step", "a Python number in the states", True),
        ("0/4: self.state[p]['norm'] == 3.99e-05", "a Python number in the states", True),
        ("1/0: Cache line invalidated because L['self'].p[0].grad got deallocated", "a gradient is another", True),
        ("0/0: len(self.state) == 0", "created states", False),
        ("0/0: not args[0].state  # if not state:  # lib/a.py:3 in step", "created states", False),
        ("0/2: ((1 + self.param_groups[0]['k']) % 6) == 3", "a number in a parameter group", True),
        ("0/1: args[0].param_groups[0]['mode'] == 'a'  # a  # lib/a.py:3 in step", "an option in", False),
        ("0/1: args[0].param_groups[0]['nesterov'] == False", "an option in", False),
        ("0/1: self.param_groups[0]['clip'] is None", "an option in", False),
        ("0/1: ___check_type_id(self.param_groups[0]['clip']), type=<class 'float'>", "the type of a number", False),
        ("0/2: len(self.param_groups[0]['params']) == 3", "parameters were added", False),
        ("0/2: len(args[0].param_groups) == 1  # for  # lib/a.py:3 in step", "parameters were added or removed", False),
        ("1/0: Cache line invalidated because L['self'] got deallocated", "another optimizer runs", True),
        ("1/0: Cache line invalidated because L['p'] got deallocated", "no longer true: Cache", False),
        ("1/0: list(dict.keys(L['opt'].state))[1] is L['p']", "states are in another order", True),
        (
            "1/0: self.param_groups[0]['params'][1] is list(dict.keys(self.state))[0]",
            "states are in another order",
            True,
        ),
        (
            "1/0: self.param_groups[0]['params'][2].grad is self.param_groups[0]['params'][0].grad",
            "had one gradient",
            True,
        ),
        ("1/0: ___check_obj_id(p, 14), type=<class 'torch.nn.parameter.Parameter'>", "another parameter", True),
        ("1/0: ___check_obj_id(self.state[p]['exp_avg'], 14), type=<class 'torch.Tensor'>", "states are other", True),
    ],
)
def test_what_a_guard_says(reason: str, cause: str, has_remedy: bool) -> None:
    found = recompile(reason, with_rules=False)
    assert cause in found.text and (found.remedy is not None) == has_remedy
    assert (", lib/a.py:3, in step)" in found.text) == ("lib/a.py" in reason)


class Branches(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad.sum().item() > 0:
                p.sub_(p.grad)


def test_the_remedy_for_a_branch_on_a_value_stands_alone() -> None:
    """Dynamo advises something that does not help an optimizer."""
    (reason,) = npu_fuse_pass.explain(Branches(ones((4,)), lr=0.1)).reasons
    assert reason.code is Code.VALUE and "torch._check" not in reason.advised and "torch.where" in reason.advised


class Deprecated(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.add_(-0.1, p.grad)


def test_a_deprecated_order_of_arguments() -> None:
    (reason,) = npu_fuse_pass.explain(Deprecated(ones((4,)), lr=0.1)).reasons
    assert reason.code is Code.NOT_CAPTURED and "test_reasons.py:" in reason.text
    assert "as torch documents it now" in str(reason.remedy)


def test_dtypes_that_meet_without_a_cast() -> None:
    builder = Builder()
    p, h = builder.leaf(0, torch.float32, True), builder.leaf(1, torch.bfloat16, True)
    with pytest.raises(Unsupported) as refused:
        builder.op("add", p, h)
    assert refused.value.reason.code is Code.MIXED_DTYPES
    assert builder.op("add", p, builder.cast(h, torch.float32)).dtype == torch.float32


def test_members_that_write_one_scalar() -> None:
    captured = capture(traced(lambda count, p: (count.add_(1), p.mul_(count)), torch.tensor(1.0), torch.rand(3)))
    grouped = group(captured)
    (g,) = grouped.groups
    with pytest.raises(Unsupported) as refused:
        cpu.Program(grouped.leaves, [dataclasses.replace(g, members=[*g.members, *g.members])])
    assert refused.value.reason.code is Code.SAME_SCALAR


def test_tensors_that_changed() -> None:
    captured = capture(traced(lambda p: p.mul_(0.5), torch.rand(3)))
    grouped = group(captured)
    program = cpu.Program(grouped.leaves, grouped.groups)
    with pytest.raises(Mismatch) as refused:
        program([torch.rand(5)], complete=True)
    assert refused.value.reason.code is Code.CHANGED
    kept = torch.ones(3)
    program([kept], complete=True)
    assert torch.equal(kept, torch.full((3,), 0.5))


def test_a_graph_without_recorded_tensors() -> None:
    (reason,) = capture(fx.symbolic_trace(lambda p, g: p.copy_(p + g))).unfused
    assert reason.code is Code.GRAPH


def test_a_formula_that_is_not_compared() -> None:
    with pytest.raises(Unsupported) as refused:
        Arithmetic().spend(10**9)
    assert refused.value.reason.code is Code.MATCH


def test_a_platform_that_is_not_here() -> None:
    opt = optimizers.NpuFusedAdam(ones((4,)), lr=0.1)
    with pytest.raises(npu_fuse_pass.FuseError) as refused:
        npu_fuse_pass.compile_step(opt, platform="npu")()
    assert isinstance(refused.value, npu_fuse_pass.PlatformError) and refused.value.reason.code is Code.PLATFORM


def test_a_torch_that_lacks_a_private_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_private_torch` takes each of them away; here it is all at once, until torch has them again."""
    with monkeypatch.context() as patch:
        patch.setattr(private_torch, "find", lambda *names: None)
        opt, oracle = (cls(ones((4,)), lr=0.1) for cls in (optimizers.NpuFusedAdam, torch.optim.Adam))
        (said,) = warned(compiled(opt))
        oracle.step()
        assert torch.allclose(opt.param_groups[0]["params"][0], oracle.param_groups[0]["params"][0], rtol=1e-6)
        (reason,) = last_report().reasons
        assert reason.code is Code.TORCH and "FakeTensorMode in rule adam: torch" in said and reason.advised in said
    assert warned(compiled(optimizers.NpuFusedAdam(ones((4,)), lr=0.1))) == []
    assert not last_report().reasons and last_report().groups


def test_no_compiler(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_cache(tmp_path):
        path = os.environ["PATH"]
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        warned(compiled(optimizers.NpuFusedAdam(ones((4,)), lr=0.1)))
        assert [reason.code for reason in last_report().reasons] == [Code.COMPILER]
        monkeypatch.setenv("PATH", path)
        forget()  # in a new process
        assert warned(compiled(optimizers.NpuFusedAdam(ones((4,)), lr=0.1))) == []
        assert not last_report().reasons and last_report().groups


def formula(function: Operation, *tensors: Tensor) -> Formula:
    (g,) = group(capture(traced(function, *tensors))).groups
    return g.formula


def test_what_ge_has_no_operation_for() -> None:
    wide = torch.rand(3, dtype=torch.float64)
    with pytest.raises(Unsupported) as refused:
        elementwise.check(formula(lambda p: p.copy_(torch.trunc(p)), wide))
    assert refused.value.reason.code is Code.GE_OPERATION
    elementwise.check(formula(lambda p: p.copy_(torch.where(p > 0, torch.floor(p), torch.ceil(p))), wide))


def test_states_that_a_host_cannot_advance() -> None:
    count, p = torch.tensor(1.0), torch.rand(3)
    with pytest.raises(Unsupported) as refused:
        split(formula(lambda count, p: (count.copy_(p.sum()), p.mul_(count)), count, p), (), False, {})
    assert refused.value.reason.code is Code.GE_STATE
    split(formula(lambda count, p: (count.add_(1), p.mul_(count)), count, p), (), False, {})


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"device": torch.device("cpu")}, "lies in the host's memory"),
        ({"dtype": torch.float64}, "stored in torch.float64"),
        ({"dtype": torch.int64}, "stored in torch.int64"),
        ({}, None),
    ],
    ids=["host", "float64", "int64", "float32"],
)
@pytest.mark.parametrize("alone", [False, True], ids=["of a parameter", "alone"])
def test_states_that_kernels_cannot_write(kept: dict[str, Any], says: str | None, alone: bool) -> None:
    def step(v: Tensor, *tensors: Tensor) -> None:
        norm = sum(t.sum() for t in tensors)
        v.copy_(norm)
        for t in tensors:
            t.mul_(norm)

    grouped = group(capture(traced(step, torch.tensor(1.0), *map(torch.rand, (3, 4) if alone else (3,)))))
    leaves = [dataclasses.replace(leaf, device=torch.device("meta")) for leaf in grouped.leaves]
    leaves = [leaf if leaf.shape else dataclasses.replace(leaf, **kept) for leaf in leaves]
    (found,) = (g for g in grouped.groups if any(not g.formula.slots[s].tensor for s in g.formula.written))
    assert bool(found.formula.tensor_slots) != alone
    if says is None:
        generate_group(found, leaves, lambda _: 1024)
        return
    with pytest.raises(Unsupported, match=says) as refused:
        generate_group(found, leaves, lambda _: 1024)
    assert refused.value.reason.code is Code.GE_STATE


def test_states_that_a_host_advances_between_original_operations() -> None:
    captured = capture(traced(lambda count, p: (count.add_(1), p.mul_(count)), torch.tensor(1.0), torch.rand(3)))
    (number,) = [i for i, leaf in enumerate(captured.leaves) if leaf.kind == "input" and not leaf.shape]
    with pytest.raises(Unsupported) as refused:
        whole._check(captured.leaves, [], [], {number})
    assert refused.value.reason.code is Code.GE_BETWEEN


def test_what_ge_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise GraphRefused("GE said no")

    monkeypatch.setattr(cpu.Program, "__call__", refuse)
    step = npu_fuse_pass.compile_step(optimizers.NpuFusedAdam(ones((4,)), lr=0.1))
    (said,) = warned(lambda: [step() for _ in range(3)])
    (reason,) = last_report().reasons
    assert reason.code is Code.GE_REFUSED and reason.advised in said and "report it, with this message" in said


def test_an_error_of_the_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(cpu, "Program", fail)
    opt = optimizers.NpuFusedAdam(ones((4,)), lr=0.1)
    (said,) = warned(torch.compile(opt.step, backend="npu_fused", options={"verify": False}))
    (reason,) = last_report().reasons
    assert reason.code is Code.INTERNAL and reason.advised in said


def test_a_forward_pass_and_an_update_in_one_graph() -> None:
    model = torch.nn.Linear(4, 3)
    model(torch.ones(2, 4)).sum().backward()

    def update() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)

    def both() -> Tensor:
        loss = model(torch.ones(2, 4)).square().mean()
        update()
        return loss

    slow = [p.detach().clone() for p in model.parameters()]

    def recorded() -> None:  # as in torch_optimizer's Lookahead
        for p, s in zip(model.parameters(), slow, strict=True):
            p.data.mul_(0.5).add_(s, alpha=0.5)
            s.data.copy_(p)

    cases = ((both, {Code.FORWARD_PASS}), (update, set()), (recorded, {Code.FORWARD_PASS}))
    assert "torch.no_grad()" in str(Code.FORWARD_PASS.remedy)
    for function, codes in (*cases, (torch.no_grad()(recorded), set())):
        torch._dynamo.reset()
        npu_fuse_pass.clear_reports()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(function, backend="npu_fused")()
        assert {reason.code for reason in npu_fuse_pass.reports()[-1].reasons} == codes


def test_states_of_ours_that_share_memory() -> None:
    opt = optimizers.NpuFusedAdam([torch.nn.Parameter(torch.ones(3)) for _ in range(2)])
    (batch,) = batches_of(opt)
    shared = Mismatch("two tensors overlap", Code.SHARED_MEMORY)
    assert refusal(shared, [opt]).code is Code.SHARED_MEMORY
    views = batch.views["exp_avg"]
    views[1] = views[0]
    assert refusal(shared, [opt]).code is Code.STATES


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_FUSE_DISABLE", "1")
    report = npu_fuse_pass.explain(torch.optim.SGD(ones((4,)), lr=0.1))
    assert [reason.code for reason in report.reasons] == [Code.DISABLED]
    monkeypatch.delenv("NPU_FUSE_DISABLE")
    assert not npu_fuse_pass.explain(torch.optim.SGD(ones((4,)), lr=0.1)).reasons


RAISED = {*OPERATIONS, *STEPS, *(code for code, _, _ in EXPLAINED.values())}
RAISED |= {
    Code.STEPS_TWICE,
    Code.FORWARD_PASS,
    Code.STATES,
    Code.MIXED_DTYPES,
    Code.SAME_SCALAR,
    Code.CHANGED,
    Code.GRAPH,
    Code.MATCH,
    Code.PLATFORM,
    Code.TORCH,
    Code.COMPILER,
    Code.DISABLED,
}
RAISED |= {Code.GE_OPERATION, Code.GE_STATE, Code.GE_BETWEEN, Code.GE_REFUSED, Code.INTERNAL}


def test_a_step_that_no_rule_computes() -> None:
    """It is fused all the same, so that the reason is one beside the others."""
    params = parameters(((3, 4),), torch.bfloat16)
    for opt, captured in ((torch.optim.SGD(params, lr=0.1), True), (optimizers.NpuFusedSGD(params, lr=0.1), False)):
        set_gradients(params, gradients(params, 0))
        npu_fuse_pass.compile_step(opt)()
        report = last_report()
        assert (report.no_rule is not None and report.no_rule.code is Code.NO_RULE) == captured
        assert report.replaces is None and not report.reasons


RAISED |= {Code.NO_RULE}


def test_every_code_is_raised_here_and_in_the_docs() -> None:
    assert set(Code) == RAISED
    assert reasons_table.PATH.read_text(encoding="utf-8") == reasons_table.text()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_complex_parameters(kind: type[torch.optim.Optimizer]) -> None:
    """torch updates them as real ones, through views: advice about views or other operations would not help."""
    params = [torch.nn.Parameter(torch.randn(4, dtype=torch.complex64))]
    step = npu_fuse_pass.compile_step(kind(params, lr=0.1))  # type: ignore[call-arg]
    for _ in range(2):
        params[0].grad = torch.randn_like(params[0])
        step()
    assert "torch.view_as_complex" in str(npu_fuse_pass.reports()[-1])
