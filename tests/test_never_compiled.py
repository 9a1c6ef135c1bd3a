"""An optimizer of ours that makes many steps without a kernel says so, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers

from .support import assert_fused, gradients, last_report, parameters, set_gradients


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "without a fused kernel" in r.getMessage()]


def train(step: Any, steps: int) -> None:
    for _ in range(steps):
        step()


@pytest.mark.parametrize("make", [optimizers.NpuFusedSGD, optimizers.lion], ids=["class", "rule"])
def test_many_eager_steps(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(((3,),))
    set_gradients(params, gradients(params, 0))
    opt = make(params, lr=1e-4)
    with caplog.at_level(logging.WARNING, "npu_fuse_pass"):
        train(opt.step, 99)
        assert not messages(caplog)
        train(opt.step, 201)
    (said,) = messages(caplog)
    assert type(opt).__name__ in said and "compile_step(opt)" in said and "torch.compile(opt.step" in said


@pytest.mark.parametrize("form", ["step", "function"])
def test_not_where_it_is_compiled(form: str, caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(((3,),))
    set_gradients(params, gradients(params, 0))
    opt = optimizers.NpuFusedSGD(params, lr=1e-4)
    npu_fuse_pass.clear_reports()
    compiled = torch.compile(opt.step if form == "step" else lambda: opt.step(), backend="npu_fused")
    with caplog.at_level(logging.WARNING, "npu_fuse_pass"):
        train(compiled, 2)
        train(opt.step, 150)  # somebody who looks for a fault
        train(compiled, 2)
    assert not messages(caplog)
    assert_fused(last_report(), parameters=1)
