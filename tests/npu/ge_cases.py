"""For every operation that the interpreter knows: how it is emitted, on what, and what torch says it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import harness
import interpreter
import torch
from torch import Tensor

harness.prepare()
from torchair._ge_concrete_graph import compat_ir  # noqa: E402
from torchair._ge_concrete_graph import ge_apis as ge  # noqa: E402
from torchair.ge._ge_graph import GeGraph, default_ge_graph, torch_type_to_ge_type  # noqa: E402

X = torch.tensor([[-1.5, 0.0, 0.25], [2.0, 3.5, -4.0]])
Y = torch.tensor([[0.5, -2.0, 1.25], [2.0, -3.0, 7.0]])
P = X.abs() + 0.5
B = torch.tensor([[True, False, True], [True, True, False]])
C = torch.tensor([[True, True, False], [False, True, False]])
LR, DECAY, B1, B2, EPS, STEP = (torch.tensor(v) for v in (0.1, 0.02, 0.9, 0.99, 1e-3, 3.0))
V = Y * Y
SPECIAL = torch.tensor([1.0, float("inf"), float("nan")])

Build = Callable[..., Any]
Case = tuple[Build, Sequence[Tensor], Tensor | Sequence[Tensor]]


def adam(weight_decay: float, amsgrad: bool) -> list[Tensor]:
    """One step of torch's Adam or AdamW from the same numbers: param, exp_avg, exp_avg_sq, max_exp_avg_sq."""
    param = torch.nn.Parameter(X.clone())
    param.grad = Y.clone()
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    optimizer = kind([param], 0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=weight_decay, amsgrad=amsgrad)
    state = {"step": torch.tensor(2.0), "exp_avg": X / 3, "exp_avg_sq": V / 2, "max_exp_avg_sq": V.flip(0) / 3}
    optimizer.state[param] = {k: v.clone() for k, v in state.items() if amsgrad or k != "max_exp_avg_sq"}
    optimizer.step()
    after = optimizer.state[param]
    return [param.detach(), after["exp_avg"], after["exp_avg_sq"], *([after["max_exp_avg_sq"]] if amsgrad else [])]


def sgd(nesterov: bool) -> list[Tensor]:
    param = torch.nn.Parameter(X.clone())
    param.grad = Y.clone()
    optimizer = torch.optim.SGD([param], 0.1, momentum=0.9, nesterov=nesterov)
    optimizer.state[param] = {"momentum_buffer": X / 3}
    optimizer.step()
    return [param.detach(), optimizer.state[param]["momentum_buffer"]]


def int32(value: int) -> Any:
    return ge.Const(value, torch_type_to_ge_type(torch.int32))


ADAM_W = [X, X / 3, V / 2, B1**2, B2**2, LR, DECAY, B1, B2, EPS, Y]
AMSGRAD = [
    X,
    X / 3,
    V / 2,
    V.flip(0) / 3,
    *(t.view(1) for t in (B1**3, B2**3, LR, B1, B2, EPS * (1 - B2**3) ** 0.5)),
    Y,
]
CORRECTION = torch.sqrt(1 - B2**3)
ADAM_ONE = [Y, V / 2, X / 3, X, LR * CORRECTION / (1 - B1**3), B1, 1 - B1, B2, 1 - B2, EPS * CORRECTION]

ONE = torch.ones(1)


WITHOUT_WRAPPER = {"ForeachSqrt", "ForeachReciprocal"}  # the wheel's torchair has those of the in-place forms only


def lists(name: str, tensors: int, number: Tensor | None = None) -> tuple[Build, Sequence[Tensor]]:
    """A list operation on so many lists, by torchair's wrapper where it has one."""
    given = [[X, 2 * Y], [Y, X], [P, P]][:tensors] if tensors > 1 else [[P, Y * Y + 1]]

    def build(*flat: Any) -> Any:
        args = [list(flat[2 * i : 2 * i + 2]) for i in range(tensors)]
        if name in WITHOUT_WRAPPER:
            return compat_ir.ge_op(name, inputs={"x": args[0]}, outputs=[("y", 2)])
        return getattr(ge, name)(*args, *flat[2 * tensors :])

    return build, [*(t for pair in given for t in pair), *([] if number is None else [number])]


POSITIVE = (P, Y * Y + 1)
LISTS: dict[str, Case] = {
    "ForeachAddScalar": (*lists("ForeachAddScalar", 1, LR.view(1)), [x + 0.1 for x in POSITIVE]),
    "ForeachSubScalar": (*lists("ForeachSubScalar", 1, LR.view(1)), [x - 0.1 for x in POSITIVE]),
    "ForeachMulScalar": (*lists("ForeachMulScalar", 1, LR.view(1)), [x * 0.1 for x in POSITIVE]),
    "ForeachDivScalar": (*lists("ForeachDivScalar", 1, LR.view(1)), [x / 0.1 for x in POSITIVE]),
    "ForeachAddList": (*lists("ForeachAddList", 2, 2 * ONE), [X + 2 * Y, 2 * Y + 2 * X]),
    "ForeachSubList": (*lists("ForeachSubList", 2, 3 * ONE), [X - 3 * Y, 2 * Y - 3 * X]),
    "ForeachMulList": (*lists("ForeachMulList", 2), [X * Y, 2 * Y * X]),
    "ForeachDivList": (*lists("ForeachDivList", 2), [X / Y, 2 * Y / X]),
    "ForeachMaximumList": (*lists("ForeachMaximumList", 2), [X + (Y - X).relu(), X + (2 * Y - X).relu()]),
    "ForeachMinimumList": (*lists("ForeachMinimumList", 2), [X - (X - Y).relu(), X - (X - 2 * Y).relu()]),
    "ForeachAddcmulScalar": (
        *lists("ForeachAddcmulScalar", 3, 2 * ONE),
        [torch.addcmul(X, Y, P, value=2), torch.addcmul(2 * Y, X, P, value=2)],
    ),
    "ForeachLerpScalar": (
        *lists("ForeachLerpScalar", 2, LR.view(1)), [torch.lerp(X, Y, 0.1), torch.lerp(2 * Y, X, 0.1)]
    ),
    "ForeachSqrt": (*lists("ForeachSqrt", 1), [x**0.5 for x in POSITIVE]),
    "ForeachNeg": (*lists("ForeachNeg", 1), [0 - x for x in POSITIVE]),
    "ForeachAbs": (*lists("ForeachAbs", 1), [x.clone() for x in POSITIVE]),
    "ForeachReciprocal": (*lists("ForeachReciprocal", 1), [1 / x for x in POSITIVE]),
}  # fmt: skip

# GE operation -> how to emit it, on what, and what torch says that it is.
CASES: dict[str, Case] = {
    "Abs": (ge.Abs, [X], X.abs()),
    "Ceil": (ge.Ceil, [X], -((-X) // 1)),
    "Cos": (ge.Cos, [X], (torch.pi / 2 - X).sin()),
    "Erf": (ge.Erf, [X], 1 - X.erfc()),
    "Exp": (ge.Exp, [X], X.exp()),
    "Floor": (ge.Floor, [X], X.floor()),
    "Identity": (ge.Identity, [X], X),
    "Log": (ge.Log, [P], P.log()),
    "Neg": (ge.Neg, [X], -X),
    "Reciprocal": (ge.Reciprocal, [Y], 1 / Y),
    "Rint": (ge.Rint, [2 * X + 0.5], torch.tensor([[-2.0, 0.0, 1.0], [4.0, 8.0, -8.0]])),
    "Rsqrt": (ge.Rsqrt, [P], P**-0.5),
    "Sign": (ge.Sign, [X], torch.tensor([[-1.0, 0.0, 1.0], [1.0, 1.0, -1.0]])),
    "Sin": (ge.Sin, [X], (X - torch.pi / 2).cos()),
    "Sqrt": (ge.Sqrt, [P], P**0.5),
    "Square": (ge.Square, [X], X**2),
    "Tan": (ge.Tan, [X], X.sin() / X.cos()),
    "Tanh": (ge.Tanh, [X], X.tanh()),
    "Trunc": (ge.Trunc, [X], X.sign() * (X.abs() // 1)),
    "TensorMove": (ge.TensorMove, [X], X),
    "LogicalNot": (ge.LogicalNot, [B], ~B),
    "IsNan": (ge.IsNan, [SPECIAL], torch.tensor([False, False, True])),
    "IsInf": (ge.IsInf, [SPECIAL], torch.tensor([False, True, False])),
    "IsFinite": (ge.IsFinite, [SPECIAL], torch.tensor([True, False, False])),
    "Muls": (lambda x: ge.Muls(x, value=2.5), [X], X * 2.5),
    "Adds": (lambda x: ge.Adds(x, value=2.5), [X], X + 2.5),
    "Cast": (lambda x: ge.Cast(x, dst_type=torch_type_to_ge_type(torch.bfloat16)), [X / 3], (X / 3).bfloat16()),
    "Add": (ge.Add, [X, Y], X + Y),
    "AddV2": (ge.AddV2, [X, Y[0]], X + Y[0]),
    "Sub": (ge.Sub, [X, Y], X - Y),
    "Mul": (ge.Mul, [X, LR], X * 0.1),
    "Div": (ge.Div, [X, Y], X / Y),
    "RealDiv": (ge.RealDiv, [X, Y], X / Y),
    "Maximum": (ge.Maximum, [X, Y], torch.where(X > Y, X, Y)),
    "Minimum": (ge.Minimum, [X, Y], torch.where(X < Y, X, Y)),
    "Pow": (ge.Pow, [P, Y], torch.exp(Y * torch.log(P))),
    "LogicalAnd": (ge.LogicalAnd, [B, C], B & C),
    "LogicalOr": (ge.LogicalOr, [B, C], B | C),
    "AxpyV2": (ge.AxpyV2, [X, Y, LR], X + 0.1 * Y),
    "FusedMulAdd": (ge.FusedMulAdd, [X, Y, P], X * Y + P),
    "Lerp": (ge.Lerp, [X, Y, LR], torch.lerp(X, Y, 0.1)),
    "Addcmul": (ge.Addcmul, [X, Y, P, LR], torch.addcmul(X, Y, P, value=0.1)),
    "Addcdiv": (ge.Addcdiv, [X, Y, P, LR], torch.addcdiv(X, Y, P, value=0.1)),
    "ClipByValue": (ge.ClipByValue, [X, -LR, LR], X.clamp(-0.1, 0.1)),
    "ClipByValueV2": (ge.ClipByValueV2, [X, -LR, LR], X.clamp(-0.1, 0.1)),
    "Greater": (ge.Greater, [X, Y], X > Y),
    "GreaterEqual": (ge.GreaterEqual, [X, Y], X >= Y),
    "Less": (ge.Less, [X, Y], X < Y),
    "LessEqual": (ge.LessEqual, [X, Y], X <= Y),
    "Equal": (ge.Equal, [X, Y], X == Y),
    "NotEqual": (ge.NotEqual, [X, Y], X != Y),
    "Select": (ge.Select, [B, X, Y], torch.where(B, X, Y)),
    "SelectV2": (ge.SelectV2, [B[0], X, LR], torch.where(B[0], X, LR)),
    "ReduceSum": (lambda x: ge.ReduceSum(x, [1]), [X], X.sum(1)),
    "ReduceSumD": (lambda x: ge.ReduceSumD(x, axes=[0], keep_dims=True), [X], X.sum(0, keepdim=True)),
    "ReduceMax": (lambda x: ge.ReduceMax(x, [0, 1]), [X], X.max()),
    "ReduceMin": (lambda x: ge.ReduceMin(x, [0, 1]), [X], X.min()),
    "LpNormV2": (lambda x: ge.LpNormV2(x, p=2.0, axes=[], epsilon=0.0), [X], X.square().sum().sqrt()),
    "Reshape": (lambda x: ge.Reshape(x, [3, -1]), [X], X.view(3, 2)),
    "Transpose": (lambda x: ge.Transpose(x, [1, 0]), [X], torch.stack([X[0], X[1]], 1)),
    "MatMul": (lambda x, y: ge.MatMul(x, y, None, transpose_x2=True), [X, Y], torch.einsum("ik,jk->ij", X, Y)),
    "MatMulV2": (
        lambda x, y: ge.MatMulV2(x, y, None, None, transpose_x1=True), [X, Y], torch.einsum("ki,kj->ij", X, Y)
    ),
    "BroadcastTo": (lambda x: ge.BroadcastTo(x, [2, 3]), [X[0]], torch.stack([X[0], X[0]])),
    "Fill": (lambda x: ge.Fill([2, 2], x), [LR], torch.full((2, 2), 0.1)),
    "Concat": (lambda x, y: ge.Concat(1, [x, y], N=2), [X, Y], torch.cat([X, Y], 1)),
    "ConcatV2": (lambda x, y: ge.ConcatV2([x, y], concat_dim=1, N=2), [X, Y], torch.cat([X, Y], 1)),
    "ConcatD": (lambda x, y: ge.ConcatD([x, y], concat_dim=0, N=2), [X, Y], torch.cat([X, Y], 0)),
    "ConcatV2D": (lambda x, y: ge.ConcatV2D([x, y], concat_dim=1, N=2), [X, Y], torch.cat([X, Y], 1)),
    "Pack": (lambda x, y: ge.Pack([x, y], N=2, axis=1), [X, Y], torch.stack([X, Y], 1)),
    "Unpack": (lambda x: ge.Unpack(x, num=3, axis=1), [X], [X[:, 0], X[:, 1], X[:, 2]]),
    "Split": (lambda x: ge.Split(int32(1), x, num_split=3), [X], [X[:, :1], X[:, 1:2], X[:, 2:]]),
    "SplitD": (lambda x: ge.SplitD(x, split_dim=0, num_split=2), [X], [X[:1], X[1:]]),
    "SplitV": (lambda x: ge.SplitV(x, [1, -1], int32(1), num_split=2), [X], [X[:, :1], X[:, 1:]]),
    "SplitVD": (lambda x: ge.SplitVD(x, size_splits=[2, 1], split_dim=1, num_split=2), [X], [X[:, :2], X[:, 2:]]),
    "Slice": (lambda x: ge.Slice(x, [0, 1], [-1, 2]), [X], X[:, 1:]),
    "StridedSliceV2": (lambda x: ge.StridedSliceV2(x, [0, -2], [9, 3], [0, 1], [1, 2]), [X], X[:, 1:2]),
    "SliceD": (lambda x: ge.SliceD(x, offsets=[1, 0], size=[1, 2]), [X], X[1:, :2]),
    "ApplyAdamW": (lambda *x: ge.ApplyAdamW(*x, None), ADAM_W, adam(0.02, amsgrad=False)),
    "ApplyMomentumD": (lambda *x: ge.ApplyMomentumD(*x, use_nesterov=True), [X, X / 3, LR, Y, B1], sgd(nesterov=True)),
    "AdamApplyOneAssign": (ge.AdamApplyOneAssign, ADAM_ONE, [adam(0.0, amsgrad=False)[i] for i in (2, 1, 0)]),
    "FusedMulApplyMomentum": (
        lambda *x: ge.FusedMulApplyMomentum(*x, use_nesterov=True), [X, X / 3, LR, Y / 4, B1, LR / LR * 4], sgd(True)
    ),
    "ApplyAdamWithAmsgradV2": (ge.ApplyAdamWithAmsgradV2, AMSGRAD, adam(0.0, amsgrad=True)),
    **LISTS,
}  # fmt: skip


def emit(case: Case) -> Any:
    """A GE graph of one operation."""
    build, tensors, _ = case
    graph = GeGraph()
    with default_ge_graph(graph):
        data = [
            ge.Data(index=i, dtype=torch_type_to_ge_type(t.dtype), shape=list(t.shape), placement="NPU")
            for i, t in enumerate(tensors)
        ]
        for value, tensor in zip(data, tensors, strict=True):
            value.set_meta(tensor)
        outputs = build(*data)
        ge.NetOutput(list(outputs) if isinstance(outputs, (list, tuple)) else [outputs])
    return graph


def assert_as_torch(graph: Any, case: Case) -> None:
    _, tensors, expected = case
    got = interpreter.evaluate(graph, [t.contiguous() for t in tensors])
    wanted = [expected] if isinstance(expected, Tensor) else list(expected)
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-7)
