"""Hyperparameters of every kind of number that torch.optim takes, also where a schedule writes them meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

import npu_fuse_pass
import optimizers
from npu_fuse_pass.rules import rule, zeros

KINDS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "int": lambda x: round(x) or 1,
    "fraction": Fraction,
    "tensor": torch.tensor,
    "tensor of one": lambda x: torch.tensor([x]),
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "int tensor": lambda x: torch.tensor(round(x) or 1),
    "array": numpy.array,
    "array of one": lambda x: numpy.array([x]),
    **{n: getattr(numpy, n) for n in ("float16", "float32", "float64", "longdouble")},
    **{n: (lambda x, n=n: getattr(numpy, n)(round(x) or 1)) for n in ("int8", "uint8", "int32", "int64", "uint64")},
}
# what torch.optim itself takes as lr, and divides and multiplies by in the end
PLAIN = {n: (lambda x, make=make: _plain(make(x))) for n, make in KINDS.items()}


def _plain(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)


@rule(states={"momentum": zeros}, defaults=dict(lr=0.1, beta=0.9, nesterov=False))
def heavy_ball(param, grad, momentum, *, lr, beta, nesterov):
    momentum = beta * momentum + grad
    return param - lr * (grad + beta * momentum if nesterov else momentum), momentum


def train(make: Callable[..., Any], of: Callable[[float], Any], compiled: bool, **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    opt = make([p], lr=of(0.125), **{k: of(v) for k, v in options.items()})
    step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
    for k in range(5):
        p.grad = torch.linspace(1 - k, 2, 12).reshape(3, 4)
        step()
        if k < 3:
            opt.param_groups[0]["lr"] = of(0.5 / (k + 1))  # as a schedule writes it
    assert not compiled or all(r.groups and not r.fallback for r in npu_fuse_pass.reports()), npu_fuse_pass.reports()
    return p.detach()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number(kind: str, compiled: bool) -> None:
    pairs = [
        (optimizers.NpuFusedAdam, torch.optim.Adam, dict(eps=0.25)),
        (optimizers.NpuFusedSGD, torch.optim.SGD, dict(momentum=0.75, weight_decay=0.25)),
        (heavy_ball, torch.optim.SGD, {}),
    ]
    for ours, stock, options in pairs:
        renamed = {} if ours is not heavy_ball else {"beta": 0.5}
        theirs = options if ours is not heavy_ball else {"momentum": 0.5}
        got = train(ours, KINDS[kind], compiled, **(renamed or options))
        torch.testing.assert_close(got, train(stock, PLAIN[kind], False, **theirs), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32, numpy.float64, numpy.int64])
def test_a_schedule_from_a_table(dtype: type) -> None:
    table = numpy.linspace(1.0, 0.1, 5).astype(dtype)

    def run(cls: Any, compiled: bool) -> torch.Tensor:
        torch._dynamo.reset()
        p = torch.nn.Parameter(torch.ones(3))
        opt = cls([p], lr=0.1)
        step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: table[epoch])
        for k in range(4):
            p.grad = torch.full((3,), 1.0 - k)
            step()
            schedule.step()
        return p.detach()

    want = run(torch.optim.Adam, False)
    # with a float16 as lr, torch.optim.Adam's step size lr / (1 - beta1**step) is a float16, too; ours is a float64
    tolerance = 2.0**-11 if dtype is numpy.float16 else 1e-6
    for compiled in (False, True):
        torch.testing.assert_close(run(optimizers.NpuFusedAdam, compiled), want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("flag", [numpy.bool_(True), torch.tensor(True), True], ids=["numpy", "tensor", "bool"])
def test_flags_are_no_numbers(flag: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = heavy_ball([p], nesterov=flag)
    p.grad = torch.ones(3)
    opt.step()
    assert p[0].item() == pytest.approx(1 - 0.1 * 1.9)


@pytest.mark.parametrize(
    "value",
    ["0.1", 1j, [0.1, "x"], numpy.array([1.0, 2.0]), object()],
    ids=["text", "complex", "list", "array", "object"],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"lr|learning rate"):
        optimizers.NpuFusedAdam([torch.nn.Parameter(torch.ones(3))], lr=value)
