"""Every operation of the lowering's table, through torchair and the interpreter, and errors planted in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from npu_fuse_pass import errors
from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.environment import require
from tests.support.graphs import fused


def test_an_operation_without_a_document_is_refused() -> None:
    with pytest.raises(errors.Unsupported, match="atan2"):
        on_graph(lambda x, y, w: x.copy_(torch.atan2(x, y)))


X = torch.tensor([[-1.5, 0.0, 0.25, 0.75], [2.0, 3.5, -4.0, 2.0]])
Y = torch.tensor([[0.5, -2.0, 1.25, 0.75], [2.0, -3.0, 7.0, -0.25]])
W = torch.tensor(0.3, dtype=torch.float64)
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y, w: x + y,
    "sub": lambda x, y, w: x - y,
    "mul": lambda x, y, w: x * y,
    "div": lambda x, y, w: x / y,
    "neg": lambda x, y, w: -x + 0 * y,
    "abs": lambda x, y, w: x.abs() * y,
    "sqrt": lambda x, y, w: (x * x + y * y).sqrt(),
    "rsqrt": lambda x, y, w: (x * x + y * y).rsqrt(),
    "reciprocal": lambda x, y, w: y.reciprocal() + x,
    "exp": lambda x, y, w: x.exp() + y,
    "log": lambda x, y, w: (x * x + y * y).log(),
    "sin": lambda x, y, w: x.sin() + y,
    "cos": lambda x, y, w: x.cos() + y,
    "tan": lambda x, y, w: x.tan() + y,
    "tanh": lambda x, y, w: x.tanh() + y,
    "erf": lambda x, y, w: x.erf() + y,
    "floor": lambda x, y, w: x.floor() + y,
    "ceil": lambda x, y, w: x.ceil() + y,
    "trunc": lambda x, y, w: x.trunc() + y,
    "round": lambda x, y, w: (2 * x).round() + y,
    "sign": lambda x, y, w: x.sign() + y,
    "maximum": lambda x, y, w: torch.maximum(x, y),
    "minimum": lambda x, y, w: torch.minimum(x, y),
    "pow": lambda x, y, w: torch.pow(x.abs() + 1, y),
    "lerp": lambda x, y, w: torch.lerp(x, y, w),
    "where": lambda x, y, w: torch.where(x > y, x, y * 2),
    "lt": lambda x, y, w: torch.where(x < y, x, 0.0),
    "le": lambda x, y, w: torch.where(x <= y, x, 0.0),
    "gt": lambda x, y, w: torch.where(x > y, x, 0.0),
    "ge": lambda x, y, w: torch.where(x >= y, x, 0.0),
    "eq": lambda x, y, w: torch.where(x == y, x, 0.0),
    "ne": lambda x, y, w: torch.where(x != y, x, 0.0),
    "isnan": lambda x, y, w: torch.where((x / x).isnan(), y, x),
    "isinf": lambda x, y, w: torch.where((y / x).isinf(), y, x),
    "isfinite": lambda x, y, w: torch.where((y / x).isfinite(), y, x),
    "and": lambda x, y, w: torch.where(torch.logical_and(x > 0, y > 0), x, 0.0),
    "or": lambda x, y, w: torch.where(torch.logical_or(x > 0, y > 0), x, 0.0),
    "not": lambda x, y, w: torch.where(torch.logical_not(x > y), x, 0.0),
    "fma": lambda x, y, w: torch.addcmul(x, y, y, value=3.0),
    "sum": lambda x, y, w: x * y.sum(),
    "amax": lambda x, y, w: x * y.amax(),
    "amin": lambda x, y, w: x * y.amin(),
    "cast": lambda x, y, w: x.half().float() + y,
}


def on_graph(
    function: Callable[..., Any], dtype: torch.dtype = torch.float32, w: Tensor = W
) -> tuple[Tensor, harness.GeGraph]:
    """What a graph that writes its first argument makes of X, Y and w."""
    examples = [X.to(dtype, copy=True), Y.to(dtype, copy=True), w.clone()]
    captured, groups = fused(lambda x, y, w: [function(x, y, w)][1:] or None, *examples)
    values = [examples[leaf.index] if leaf.kind == "input" else None for leaf in captured.leaves]
    with harness.record() as graphs:
        npu.Program(captured.leaves, groups)(values, complete=True)
    return examples[0], graphs[0]


def test_every_operation_of_the_table_has_a_case() -> None:
    assert set(OPERATIONS) == {*elementwise._DIRECT, *elementwise._REDUCE, "fma", "cast"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    got, graph = on_graph(lambda x, y, w: x.copy_(OPERATIONS[name](x, y, w)))
    torch.testing.assert_close(got, OPERATIONS[name](X, Y, W), rtol=1e-6, atol=1e-7, equal_nan=True)
    emitted = {**elementwise._DIRECT, **elementwise._REDUCE, "fma": "Mul", "cast": "Cast"}[name]
    assert emitted in graph.counts()


def test_float64_where_the_ge_operation_has_none() -> None:
    got, graph = on_graph(lambda x, y, w: x.copy_(torch.lerp(x, y, w)), torch.float64)
    torch.testing.assert_close(got, torch.lerp(X.double(), Y.double(), W), rtol=1e-14, atol=0)
    assert "Lerp" not in graph.counts()
    with pytest.raises(errors.Unsupported, match="Trunc has no float64"):
        on_graph(lambda x, y, w: x.copy_(x.trunc()), torch.float64)


def branches(
    weight: float | None = None, rest: float = 1.0, limit: float = 0.5, rounded: bool = False
) -> Callable[..., Tensor]:
    """Torch's lerp, spelled out, and others that look like it; `weight` instead of the one of the low branch."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        given = w if weight is None else w * weight
        low = torch.addcmul(x, y - x, given.half().double() if rounded else given)
        return torch.where(w.abs() < limit, low, torch.addcmul(y, -(y - x), rest - w))

    return function


LERPS: dict[str, tuple[Callable[..., Tensor], dict[str, int]]] = {
    "weight at run time": (lambda x, y, w: torch.lerp(x, y, w), {"Lerp": 1}),
    "small weight": (lambda x, y, w: torch.lerp(x, y, 0.3), {"Lerp": 1}),
    "large weight": (lambda x, y, w: torch.lerp(x, y, 0.7), {"Lerp": 1}),
    "the other sign": (lambda x, y, w: torch.add(x, -(x - y), alpha=0.1), {"Lerp": 1}),
    "no lerp": (lambda x, y, w: torch.add(x, y - x.abs(), alpha=0.1), {"Abs": 1, "Sub": 1, "Mul": 1, "Add": 1}),
    "from the other end": (lambda x, y, w: torch.add(x, x - y, alpha=0.1), {"Sub": 1, "Mul": 1, "Add": 1}),
    "two of them, by a condition": (
        lambda x, y, w: torch.where(w > 0.5, torch.add(x, y - x, alpha=0.25), torch.add(y, -(y - x), alpha=0.1)),
        {"Lerp": 2, "SelectV2": 1},
    ),
    "spelled out": (branches(), {"Lerp": 1}),
    "2 - w": (branches(rest=2.0), {"Lerp": 2, "SelectV2": 1}),
    "another limit": (branches(limit=0.75), {"Lerp": 2, "SelectV2": 1}),
    "another weight below": (branches(weight=0.5), {"Lerp": 2, "SelectV2": 1}),
    "a weight rounded below": (branches(rounded=True), {"Lerp": 2, "SelectV2": 1}),
}


@pytest.mark.parametrize("weight", [0.3, 0.7])
@pytest.mark.parametrize("name", LERPS)
def test_interpolations_are_one_operation(name: str, weight: float) -> None:
    function, emitted = LERPS[name]
    w = torch.tensor(weight, dtype=torch.float64)
    got, graph = on_graph(lambda x, y, w: x.copy_(function(x, y, w)), w=w)
    torch.testing.assert_close(got, function(X, Y, w), rtol=1e-6, atol=1e-6)
    on_numbers = {*harness.NOT_COMPUTE, "Unpack", "NotEqual"}
    assert {k: v for k, v in graph.counts().items() if k not in on_numbers} == emitted


@pytest.mark.parametrize("rest", [1.0, 2.0])
def test_an_interpolation_of_one_parameter_is_not_taken_for_all(rest: float) -> None:
    """Two parameters of one group, whose constants differ unless `rest` is 1."""

    def step(a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> None:
        a.copy_(branches()(a, b, w))
        c.copy_(branches(rest=rest)(c, d, w))

    examples = [X.clone(), Y.clone(), X + 1, Y + 1, torch.tensor(0.7, dtype=torch.float64)]
    wanted = [t.clone() for t in examples]
    step(*wanted)
    captured, groups = fused(step, *examples)
    assert [len(g.members) for g in groups] == [2]
    with harness.record() as graphs:
        values = [examples[leaf.index] if leaf.kind == "input" else None for leaf in captured.leaves]
        npu.Program(captured.leaves, groups)(values, complete=True)
    torch.testing.assert_close(examples, wanted, rtol=1e-6, atol=1e-6)
    assert graphs[0].counts()["Lerp"] == (2 if rest == 1 else 4)


# An error planted in the table of the lowering: another operation with as many operands.
PLANTED = {
    "add": "Sub", "sub": "Add", "mul": "RealDiv", "div": "Mul", "neg": "Abs", "abs": "Neg", "sqrt": "Rsqrt",
    "exp": "Abs", "floor": "Rint", "sign": "Abs", "maximum": "Minimum", "minimum": "Maximum", "pow": "Mul",
    "where": "Lerp", "lt": "LessEqual", "ge": "Greater", "eq": "NotEqual", "and": "LogicalOr", "not": "IsNan",
    "lerp": "SelectV2", "isnan": "IsFinite",
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(elementwise._DIRECT, name, PLANTED[name])
    with pytest.raises((AssertionError, errors.GraphRefused)):
        test_operation(name)


@pytest.mark.parametrize("name", elementwise._REDUCE)
def test_a_planted_error_in_a_reduction_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"sum": "ReduceMax", "amax": "ReduceMin", "amin": "ReduceSum"}
    monkeypatch.setitem(elementwise._REDUCE, name, other[name])
    with pytest.raises((AssertionError, errors.GraphRefused)):
        test_operation(name)


def test_torchair_knows_every_operation() -> None:
    """Otherwise it runs the whole fused node, on new tensors of all sizes on the device, to infer shapes."""
    require()
    from torchair._ge_concrete_graph import ge_apis

    assert [name for name in elementwise.DOCUMENTS if not hasattr(ge_apis, name)] == []
