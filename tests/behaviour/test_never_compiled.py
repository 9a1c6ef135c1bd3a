"""An optimizer of ours that makes many steps without a kernel says so, once."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from tests.support.training import assert_fused, gradients, last_report, parameters, set_gradients


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


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_within_another_backends_function(backend: str) -> None:
    """A compiled step that another backend inlines is not fused, and a warning says so once; what it tells is true."""
    params = parameters(((3,), (2, 2)))
    set_gradients(params, gradients(params, 0))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    set_gradients(others, gradients(params, 0))
    opt, eager = optimizers.NpuFusedAdam(params, lr=0.1), optimizers.NpuFusedAdam(others, lr=0.1)
    step = torch.compile(opt.step, backend="npu_fused")

    @torch.compile(backend=backend)
    def inside(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).sum()
        step()
        return y

    with pytest.warns(UserWarning, match=r"step of NpuFusedAdam is part of a graph that another backend"):
        inside(torch.ones(4))
    npu_fuse_pass.clear_reports()

    @torch.compiler.disable
    def apart() -> None:
        step()

    @torch.compile(backend=backend)
    def outside(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).sum()
        apart()
        return y

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        inside(torch.ones(4))
        outside(torch.ones(4))
    train(eager.step, 3)
    assert_fused(last_report(), parameters=2)
    assert all(torch.allclose(p, q) for p, q in zip(params, others, strict=True))
