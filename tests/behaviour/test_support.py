"""Tests of the tests: what asserts that a step was fused must fail where it was not."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass.reasons import Code
from tests.support.cases import BY_NAME
from tests.support.training import Step, assert_close, assert_fused, clones, last_report, parameters, train


def pass_through(gm: Any, example_inputs: Any) -> Any:
    """A backend that compiles nothing."""
    return gm.forward


def test_a_backend_that_passes_the_graph_through_is_noticed() -> None:
    params = parameters()
    opt = BY_NAME["adam"].build(params)
    step = Step(opt, "compiled", backend=pass_through)
    oracle = BY_NAME["adam"].oracle(params)
    train(params, step, oracle)
    assert_close(params, oracle.values)  # its numbers are right
    with pytest.raises(AssertionError, match="has compiled nothing"):
        step.check(len(params))


def test_an_eager_lowering_is_noticed() -> None:
    params = parameters()
    step = Step(BY_NAME["adam"].build(params), "compiled", platform="eager")
    train(params, step)
    with pytest.raises(AssertionError):
        step.check(len(params))


def test_a_step_that_was_not_compiled_is_noticed() -> None:
    params = parameters()
    opt = BY_NAME["adam"].build(params)
    step = Step(opt, "compiled")
    train(params, opt.step)
    with pytest.raises(AssertionError, match="has compiled nothing"):
        step.check(len(params))


@dataclasses.dataclass
class Report:
    groups: list[Any]
    unfused: list[Any] = dataclasses.field(default_factory=list)
    fallback: str | None = None


def group(updates: int, lowering: str = "cpu") -> Any:
    return types.SimpleNamespace(updates=updates, lowering=lowering)


def test_reports_that_must_fail() -> None:
    assert_fused(Report([group(2), group(1)]), parameters=3)
    left = Code.OPERATION("a matrix product", "aten.mm")
    for wrong in (
        Report([]),
        Report([group(2)]),
        Report([group(4)]),
        Report([group(3)], fallback="no compiler"),
        Report([group(3)], unfused=[left]),
        Report([group(2), group(1, "eager")]),
    ):
        with pytest.raises(AssertionError):
            assert_fused(wrong, parameters=3)


def test_wrong_numbers_are_noticed() -> None:
    params = parameters()
    others = clones(params)
    assert_close(params, others)
    with torch.no_grad():
        others[0][1, 1] *= 1.001
    with pytest.raises(AssertionError, match="parameter 0"):
        assert_close(params, others)


def test_no_report_is_an_error() -> None:
    npu_fuse_pass.clear_reports()
    with pytest.raises(AssertionError, match="has compiled nothing"):
        last_report()
