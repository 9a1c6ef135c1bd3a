"""Reasons as values: each code is raised, its remedy removes it, and the same reason is shown everywhere."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.report import CompileReport

from .support import clones, gradients, last_report, parameters, set_gradients


@pytest.fixture(autouse=True)
def _alone() -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "npu_fused" in str(w.message)]


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


def test_two_steps_in_one_function_are_told_as_such() -> None:
    params = parameters(((4,), (3,)))
    others = clones(params)
    eager, opt = optimizers.NpuFusedAdam(others, lr=0.1), optimizers.NpuFusedAdam(params, lr=0.1)

    @torch.compile(backend="npu_fused")
    def twice() -> None:
        opt.step()
        opt.step()

    for i in range(3):
        set_gradients(params, gradients(params, i))
        set_gradients(others, gradients(others, i))
        eager.step()
        eager.step()
        said = warned(twice)
        assert len(said) == (i == 0) and not any("tied" in text for text in said)
    assert {reason.code for report in npu_fuse_pass.reports() for reason in report.reasons} == {Code.STEPS_TWICE}
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


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
    assert any("outside of the compiled function" in remedy for remedy in remedies)
    assert not any("optimizer of ours" in remedy or "npu_fuse_pass.rule" in remedy for remedy in remedies)


def test_nothing_is_promised_before_the_original_ran() -> None:
    said = warned(lambda: torch.compile(lambda p: p[:2].add_(1), backend="npu_fused")(torch.ones(3)))
    assert len(said) == 1 and "not fused" in said[0] and "right" not in said[0]


def test_the_report_holds_the_same_reason_that_is_printed() -> None:
    report = CompileReport("cpu", fallbacks=[Code.SHARED_MEMORY("two tensors overlap")])
    assert report.fallback == str(report.reasons[0]) == "two tensors overlap"
    assert report.to_json()["reasons"] == [report.reasons[0].to_json()]
