"""`torch.set_default_device` says where a user's new tensors go: it changes nothing of what an optimizer computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.lowerings.cpu import program as cpu
from tests.support.training import (
    MODES,
    assert_close,
    assert_fused,
    clones,
    gradients,
    last_report,
    parameters,
    set_gradients,
)


@npu_fuse_pass.rule(states=dict(average=npu_fuse_pass.zeros), defaults=dict(lr=0.1))
def with_tensors_of_its_own(param: Any, grad: Any, average: Any, *, lr: Any) -> Any:
    average = torch.lerp(average, grad, torch.tensor(0.25, dtype=grad.dtype, device=grad.device))
    return param - lr * torch.minimum(average, torch.ones_like(average)), average


def lamb(params: Any) -> Any:
    made = optimizers.NpuFusedLamb(params, lr=0.02)
    made.use_global_grad_norm = True
    return made


CASES: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "Adam": (lambda params: optimizers.NpuFusedAdam(params, lr=0.02, weight_decay=0.1), torch.float32),
    "Adam, half precision": (lambda params: optimizers.NpuFusedAdam(params, lr=0.02), torch.bfloat16),
    "Lamb, one norm for all": (lamb, torch.float32),
    "tensors in the rule": (with_tensors_of_its_own, torch.float32),
    "stock Adam": (lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=0.1), torch.float32),
    "stock Adam, half precision": (lambda params: torch.optim.Adam(params, lr=0.02), torch.bfloat16),
}


def train(name: str, step_of: Callable[[Any], Callable[[], Any]], missing: int | None) -> list[Tensor]:
    """The parameters after some steps; what a test makes itself is made on the CPU."""
    make, dtype = CASES[name]
    here = torch.device("cpu")
    with here:
        params = parameters(dtype=dtype)
        grads = [gradients(params, k) for k in range(4)]
    stock = name.startswith("stock")
    with here if stock else contextlib.nullcontext():
        opt = make(params)
        if stock:  # torch makes its states at the first step, and counters on the default device
            set_gradients(params, grads[0])
            opt.step()
    step = step_of(opt)
    for k in range(stock, 4):
        set_gradients(params, [None if k == 2 and i == missing else g for i, g in enumerate(grads[k])])
        step()
    return [p.detach() for p in params]


BEGUN_THERE: dict[str, Callable[[Any], Any]] = {
    "torch's SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "ours": lambda params: optimizers.NpuFusedAdam(params, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BEGUN_THERE)
def test_the_first_step_under_other_defaults(name: str, dtype: torch.dtype) -> None:
    """The default device and dtype are others from the first step on, or while states are made anew."""
    params = parameters(dtype=dtype)
    others = clones(params)
    ours, eager = BEGUN_THERE[name](params), BEGUN_THERE[name](others)
    npu_fuse_pass.clear_reports()
    npu_fuse_pass.compile_optimizer_(ours)
    before = torch.get_default_dtype()
    for k in range(4):
        for opt, tensors in ((ours, params), (eager, others)):
            if k == 2:
                opt.state.clear()
            set_gradients(tensors, gradients(tensors, k))
            torch.set_default_dtype(torch.float64 if dtype is torch.float32 else torch.float32)
            try:
                with torch.device("meta"):
                    opt.step()
            finally:
                torch.set_default_dtype(before)
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))


@pytest.mark.parametrize("how", [*MODES, "interpreted"])
@pytest.mark.parametrize("name", CASES)
def test_steps_under_another_default_device(
    name: str, how: str, on_meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: Any) -> Any:
        raise PlatformError("no compiler")

    def step_of(opt: Any) -> Callable[[], Any]:
        return opt.step if how == "eager" else torch.compile(opt.step, backend="npu_fused")

    missing = None if name.startswith("stock") else 1
    with torch.device("cpu"):
        wanted = train(name, lambda opt: opt.step, missing)
    if how == "interpreted":
        monkeypatch.setattr(cpu, "Program", no_compiler)
    npu_fuse_pass.clear_reports()
    assert_close(train(name, step_of, missing), wanted)
    if how != "eager":
        report = npu_fuse_pass.reports()[-1]
        assert not report.unfused
        assert (report.fallback is None) == (how == "compiled"), report.fallback
        assert ("match: adamw" in str(report)) == ("Adam" in name)  # decided here, where it is asked for


def test_gradients_in_another_order_of_memory() -> None:
    """They are copied for a kernel, where it reads them."""
    params = parameters()
    others = clones(params)
    ours, eager = optimizers.NpuFusedAdam(params, lr=0.1), torch.optim.Adam(others, lr=0.1)
    npu_fuse_pass.clear_reports()
    npu_fuse_pass.compile_optimizer_(ours)
    for k in range(3):
        for opt, tensors in ((ours, params), (eager, others)):
            for p, g in zip(tensors, gradients(tensors, k), strict=True):
                p.grad = g.mT.contiguous().mT if g.ndim > 1 else g
            with torch.device("meta") if opt is ours else contextlib.nullcontext():
                opt.step()
    assert_close(params, others)
    assert_fused(last_report(), parameters=len(params))
