"""The interpreter, operation by operation: against torch, and with an error planted, which must be noticed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import interpreter
import kernels
import pytest
import torch
from ge_cases import (
    ADAM_W,
    B1,
    CASES,
    LR,
    WITHOUT_WRAPPER,
    X,
    Y,
    adam,
    assert_as_torch,
    emit,
    ge,
    sgd,
    torch_type_to_ge_type,
)


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(kernels.KERNELS)


@pytest.mark.parametrize("name", CASES)
def test_operation_is_used_as_its_prototype_says(name: str) -> None:
    """CANN's prototype, in the docstring of torchair's wrapper, names inputs, outputs and attributes."""
    documented = f"{name}Inplace" if name in WITHOUT_WRAPPER else name
    prototype = inspect.getdoc(getattr(ge, documented)) or ""
    assert f"REG_OP({documented})" in prototype
    op = the(name, emit(CASES[name]))
    kinds, names = zip(*re.findall(r"\.(\w+)\((\w+),", prototype), strict=True)
    assert {d.name.rstrip("0123456789") for d in op.input_desc} <= {n.rstrip("0123456789") for n in names}
    assert "DYNAMIC_OUTPUT" in kinds or name in WITHOUT_WRAPPER or len(op.output_desc) == kinds.count("OUTPUT")
    assert {a for a in op.attr if not a.startswith("_")} <= set(names)


@pytest.mark.parametrize("name", CASES)
def test_operation(name: str) -> None:
    graph = emit(CASES[name])
    assert name in {op.type for op in graph.op}
    assert_as_torch(graph, CASES[name])


def test_other_forms() -> None:
    nesterov_off = (ge.ApplyMomentumD, [X, X / 3, LR, Y, B1], sgd(nesterov=False))
    assert_as_torch(emit(nesterov_off), nesterov_off)
    plain = (ge.FusedMulApplyMomentum, [X, X / 3, LR, Y, B1, LR / LR], sgd(nesterov=False))
    assert_as_torch(emit(plain), plain)
    base_two = (lambda x: ge.Exp(x, base=2.0, scale=3.0, shift=1.0), [X], 2 ** (3 * X + 1))
    assert_as_torch(emit(base_two), base_two)
    maximize = (lambda *x: ge.ApplyAdamW(*x, None, maximize=True), [*ADAM_W[:10], -Y], adam(0.02, amsgrad=False))
    assert_as_torch(emit(maximize), maximize)


# What another operation of the family, exchanged operands, or another attribute must not hide behind.
SIBLINGS = {
    "Abs": "Neg", "Exp": "Tanh", "Floor": "Abs", "Identity": "Neg", "Log": "Exp", "Neg": "Abs", "Reciprocal": "Rsqrt",
    "Rsqrt": "Reciprocal", "Sign": "Abs", "Sqrt": "Rsqrt", "Square": "Abs", "Tanh": "Exp", "TensorMove": "Abs",
    "Add": "Sub", "AddV2": "Mul", "Sub": "Add", "Mul": "RealDiv", "Div": "Mul", "RealDiv": "Sub", "Maximum": "Minimum",
    "Minimum": "Maximum", "Pow": "Mul", "LogicalAnd": "LogicalOr", "LogicalOr": "LogicalAnd", "AxpyV2": "FusedMulAdd",
    "FusedMulAdd": "AxpyV2", "Lerp": "AxpyV2", "Addcmul": "Addcdiv", "Addcdiv": "Addcmul", "ClipByValue": "Lerp",
    "ClipByValueV2": "Lerp", "Greater": "GreaterEqual", "GreaterEqual": "Greater", "Less": "LessEqual",
    "LessEqual": "Less", "Equal": "NotEqual", "NotEqual": "Equal", "ReduceSum": "ReduceMax", "ReduceMax": "ReduceSum",
    "Ceil": "Floor", "Cos": "Sin", "Erf": "Tanh", "Rint": "Floor", "Sin": "Cos", "Tan": "Tanh", "Trunc": "Floor",
    "IsNan": "IsInf", "IsInf": "IsNan", "ReduceMin": "ReduceMax", "LogicalNot": "Identity",
    "IsFinite": "LogicalNot", "ConcatD": "Pack", "SplitD": "Unpack", "ForeachAddScalar": "ForeachMulScalar",
    "ForeachSubScalar": "ForeachAddScalar", "ForeachMulScalar": "ForeachDivScalar",
    "ForeachDivScalar": "ForeachSubScalar", "ForeachAddList": "ForeachSubList",
    "ForeachSubList": "ForeachAddList", "ForeachMulList": "ForeachDivList", "ForeachDivList": "ForeachMulList",
    "ForeachMaximumList": "ForeachMinimumList", "ForeachMinimumList": "ForeachMaximumList",
    "ForeachAddcmulScalar": "ForeachLerpScalar", "ForeachLerpScalar": "ForeachAddList", "ForeachSqrt": "ForeachAbs",
    "ForeachNeg": "ForeachAbs", "ForeachAbs": "ForeachNeg", "ForeachReciprocal": "ForeachSqrt",
}  # fmt: skip
EXCHANGED = [
    "Sub", "Div", "RealDiv", "Pow", "AxpyV2", "FusedMulAdd", "Lerp", "Addcmul", "Addcdiv", "ClipByValue", "Greater",
    "GreaterEqual", "Less", "LessEqual", "Select", "SelectV2", "Concat", "ConcatV2", "ConcatD", "ConcatV2D", "Pack",
    "MatMul", "MatMulV2",
    "ApplyAdamW", "ApplyMomentumD", "ApplyAdamWithAmsgradV2", "AdamApplyOneAssign", "FusedMulApplyMomentum",
]  # fmt: skip
CHANGED: dict[str, Callable[[Any], None]] = {
    "Muls": lambda op: setattr(op.attr["value"], "f", -2.5),
    "Adds": lambda op: setattr(op.attr["value"], "f", -2.5),
    "Cast": lambda op: setattr(op.attr["dst_type"], "i", torch_type_to_ge_type(torch.float16)),
    "ReduceSumD": lambda op: setattr(op.attr["keep_dims"], "b", False),
    "LpNormV2": lambda op: setattr(op.attr["p"], "f", 1.0),
    "MatMul": lambda op: setattr(op.attr["transpose_x2"], "b", False),
    "MatMulV2": lambda op: setattr(op.attr["transpose_x1"], "b", False),
    "ConcatD": lambda op: setattr(op.attr["N"], "i", 3),
    "ConcatV2D": lambda op: setattr(op.attr["concat_dim"], "i", 0),
    "Pack": lambda op: setattr(op.attr["axis"], "i", 0),
    "Unpack": lambda op: setattr(op.attr["num"], "i", 2),
    "SplitD": lambda op: setattr(op.attr["num_split"], "i", 1),
    "SplitVD": lambda op: op.attr["size_splits"].list.i.__setitem__(slice(None), [1, 2]),
    "SliceD": lambda op: op.attr["offsets"].list.i.__setitem__(slice(None), [0, 0]),
    "ApplyMomentumD": lambda op: setattr(op.attr["use_nesterov"], "b", False),
    "ApplyAdamW": lambda op: setattr(op.attr["maximize"], "b", True),
    "FusedMulApplyMomentum": lambda op: setattr(op.attr["use_nesterov"], "b", False),
}
CONSTANTS = [
    "ReduceSum",
    "ReduceMax",
    "Reshape",
    "Transpose",
    "BroadcastTo",
    "Fill",
    "Concat",
    "ConcatV2",
    "Split",
    "SplitV",
    "Slice",
    "StridedSliceV2",
]


def the(name: str, graph: Any) -> Any:
    return next(op for op in graph.op if op.type == name)


def assert_noticed(graph: Any, name: str) -> None:
    with pytest.raises((AssertionError, interpreter.GeError)):
        assert_as_torch(graph, CASES[name])


def test_every_operation_has_a_planted_error() -> None:
    planted = {*SIBLINGS, *EXCHANGED, *CHANGED, *CONSTANTS}
    assert planted == set(kernels.KERNELS)


@pytest.mark.parametrize("name", SIBLINGS)
def test_another_operation_is_noticed(name: str) -> None:
    graph = emit(CASES[name])
    the(name, graph).type = SIBLINGS[name]
    assert_noticed(graph, name)


@pytest.mark.parametrize("name", EXCHANGED)
def test_exchanged_operands_are_noticed(name: str) -> None:
    graph = emit(CASES[name])
    op = the(name, graph)
    op.input[0], op.input[-1 if op.input[-1] else -2] = op.input[-1 if op.input[-1] else -2], op.input[0]
    assert_noticed(graph, name)


@pytest.mark.parametrize("name", CHANGED)
def test_another_attribute_is_noticed(name: str) -> None:
    graph = emit(CASES[name])
    CHANGED[name](the(name, graph))
    assert_noticed(graph, name)


@pytest.mark.parametrize("name", CONSTANTS)
def test_another_constant_is_noticed(name: str) -> None:
    graph = emit(CASES[name])
    value = the("Const", graph).attr["value"].t
    first = (value.data[0] + 1) % 3
    value.data = bytes([first]) + value.data[1:]
    assert_noticed(graph, name)


def test_mixed_dtypes_are_refused() -> None:
    graph = emit((ge.Mul, [X, LR.double()], X))
    with pytest.raises(interpreter.GeError, match="different dtypes"):
        interpreter.evaluate(graph, [X, LR.double()])


def test_a_dtype_that_the_prototype_does_not_list_is_refused() -> None:
    with pytest.raises(interpreter.GeError, match="float64; the prototype lists"):
        interpreter.evaluate(emit((ge.Lerp, [X.double()] * 3, X)), [X.double()] * 3)


def test_an_undeclared_shape_is_refused() -> None:
    with pytest.raises(interpreter.GeError, match="declared"):
        interpreter.evaluate(emit(CASES["Abs"]), [X.reshape(3, 2)])


def test_an_unknown_operation_is_named() -> None:
    graph = emit(CASES["Abs"])
    the("Abs", graph).type = "Frobnicate"
    with pytest.raises(interpreter.GeError, match="Frobnicate"):
        interpreter.evaluate(graph, [X])


def test_use_before_definition_is_refused() -> None:
    graph = emit(CASES["Abs"])
    the("Abs", graph).input[0] = "Later:0"
    with pytest.raises(interpreter.GeError, match="come later or never"):
        interpreter.evaluate(graph, [X])
