"""The interpreter against torch on what torchair's own converters emit for aten functions: not our idea of GE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import harness
import pytest
import torch
from ge_cases import LR, B, C, P, X, Y
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

# An aten function -> an operation that torchair's own converter for it emits.
STOCK: list[tuple[Callable[..., Any], Sequence[Tensor], str]] = [
    (lambda x: torch.abs(x), [X], "Abs"),
    (lambda x: torch.exp(x), [X], "Exp"),
    (lambda x: torch.floor(x), [X], "Floor"),
    (lambda x: torch.log(x), [P], "Log"),
    (lambda x: -x, [X], "Neg"),
    (lambda x: torch.reciprocal(x), [Y], "Reciprocal"),
    (lambda x: torch.rsqrt(x), [P], "Rsqrt"),
    (lambda x: torch.sign(x), [X], "Sign"),
    (lambda x: torch.sqrt(x), [P], "Sqrt"),
    (lambda x: torch.tanh(x), [X], "Tanh"),
    (lambda x: x.to(torch.bfloat16), [X], "Cast"),
    (lambda x, y: torch.add(x, y), [X, Y], "Add"),
    (lambda x, y: torch.add(x, y, alpha=3), [X, Y], "AxpyV2"),
    (lambda x, y: x - y, [X, Y], "Sub"),
    (lambda x, y: x * y, [X, LR], "Mul"),
    (lambda x, y: x / y, [X, Y], "RealDiv"),
    (lambda x, y: torch.maximum(x, y), [X, Y], "Maximum"),
    (lambda x, y: torch.minimum(x, y), [X, Y], "Minimum"),
    (lambda x, y: torch.pow(x, y), [P, Y], "Pow"),
    (lambda x: torch.pow(2.5, x), [X], "Pow"),
    (lambda x, y: torch.lerp(x, y, 0.25), [X, Y], "Lerp"),
    (lambda x, y, z: torch.addcmul(x, y, z, value=2.0), [X, Y, P], "Addcmul"),
    (lambda x, y, z: torch.addcdiv(x, y, z, value=2.0), [X, Y, P], "Addcdiv"),
    (lambda x, y: x > y, [X, Y], "Greater"),
    (lambda x, y: x >= y, [X, Y], "GreaterEqual"),
    (lambda x, y: x < y, [X, Y], "Less"),
    (lambda x, y: x <= y, [X, Y], "LessEqual"),
    (lambda x, y: x == y, [X, Y], "Equal"),
    (lambda x, y: x != y, [X, Y], "NotEqual"),
    (lambda b, c: torch.logical_and(b, c), [B, C], "LogicalAnd"),
    (lambda b: torch.logical_not(b), [B], "LogicalNot"),
    (lambda b, x, y: torch.where(b, x, y), [B, X, Y], "SelectV2"),
    (lambda x: x.sum(), [X], "ReduceSum"),
    (lambda x: x.sum(1, keepdim=True), [X], "ReduceSum"),
    (lambda x: x.max(), [X], "ReduceMax"),
    (lambda x: torch.linalg.vector_norm(x), [X], "LpNormV2"),
    (lambda x: x.reshape(3, 2) * 2, [X], "Reshape"),
    (lambda x: x.expand(2, 3) * 2, [X[:1]], "BroadcastTo"),
    (lambda x, y: torch.cat([x, y], 1), [X, Y], "ConcatV2"),
    (lambda x, y: torch.stack([x, y], 1), [X, Y], "Pack"),
    (lambda x: [part * 2 for part in torch.split(x, [1, 2], 1)], [X], "SplitV"),
]


@pytest.mark.parametrize(("function", "tensors", "emitted"), STOCK)
def test_as_torchair_emits_it(function: Callable[..., Any], tensors: Sequence[Tensor], emitted: str) -> None:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
    gm = make_fx(lambda *args: tuple(out) if isinstance(out := function(*args), list) else (out,))(*fakes)
    with harness.record() as graphs:
        got = harness.convert(gm, mode)(*[t.contiguous() for t in tensors])
    assert emitted in graphs[0].counts(), graphs[0].counts()
    wanted = function(*tensors)
    for g, w in zip(got, wanted if isinstance(wanted, list) else [wanted], strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-7)
