"""Converters for operations that torchair lacks and that may stay around fused groups, with `fuse_pass` as its hook.

A list becomes one GE operation for each tensor: those are documented for every Atlas SoC, where CANN's Foreach
operations are not (none on Atlas training series; lists of at most 50). Every emitted type is in
`elementwise.DOCUMENTS`. Converters that work in torchair, in any version, are not replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from npu_fuse_pass.private_torch import find

Converter = Callable[..., Any]

# aten list operation -> GE operation on each of its tensors
_EACH = {"_foreach_sqrt": "Sqrt", "_foreach_neg": "Neg", "_foreach_reciprocal": "Reciprocal", "_foreach_sign": "Sign"}
_WITHOUT_BF16 = ("Sign",)  # by its prototype; float32 in between changes nothing

REPLACED: dict[Any, Any] = {}
"""Operations that `register` gave a converter -> the one before: None, or one that is not implemented."""


def lacks(op: object) -> bool:
    """True if torchair has no converter for an operation, or only one that raises NotImplementedError."""
    converter = getattr(op, "_ge_converter", None)
    code = getattr(getattr(converter, "__wrapped__", None), "__code__", None)
    return converter is None or any("is not implemented" in str(c) for c in getattr(code, "co_consts", ()))


def register(torchair: Any, ge: Any) -> None:
    """Register missing converters. `ge`: torchair's module of GE operations."""
    for op, converter in converters(ge).items():
        if lacks(op):
            REPLACED[op] = getattr(op, "_ge_converter", None)
            torchair.register_fx_node_ge_converter(op)(converter)


def converters(ge: Any) -> Mapping[Any, Converter]:
    """All converters by operation, also those that torchair has."""
    find("torch._inductor.inductor_prims")  # defines prims.fma, which Dynamo 2.13 makes of addcmul_
    aten = torch.ops.aten
    each = {name: functools.partial(_each, ge, operation) for name, operation in _EACH.items()}
    each["_foreach_copy"] = functools.partial(_copy, ge)
    found: dict[Any, Converter] = {
        getattr(aten, name).default: converter for name, converter in each.items() if hasattr(aten, name)
    }
    if hasattr(torch.ops.prims, "fma"):
        found[torch.ops.prims.fma.default] = functools.partial(_fma, ge)
    return found


def _each(ge: Any, operation: str, tensors: list[Any], meta_outputs: Any = None) -> list[Any]:
    emit, f32, bf16 = getattr(ge, operation), ge.DataType.DT_FLOAT, ge.DataType.DT_BF16
    found = []
    for t in tensors:
        widen = t.dtype == bf16 and operation in _WITHOUT_BF16
        found.append(ge.Cast(emit(ge.Cast(t, dst_type=f32)), dst_type=bf16) if widen else emit(t))
    return found


def _fma(ge: Any, a: Any, b: Any, c: Any, meta_outputs: Any = None) -> Any:
    """a·b + c, rounded twice: GE has no fused form."""
    a, b, c = (_cast(ge, t, meta_outputs.dtype) for t in (a, b, c))
    return ge.Add(ge.Mul(a, b), c)


def _copy(
    ge: Any, targets: list[Any], sources: list[Any], non_blocking: bool = False, meta_outputs: Any = None
) -> list[Any]:
    """The sources, with the targets' shapes and dtypes."""
    found = []
    for target, source in zip(targets, sources, strict=True):
        value = _cast(ge, source, target.dtype)
        spread = source.symsize != target.symsize
        found.append(ge.BroadcastTo(value, list(target.symsize)) if spread else value)
    return found


def _cast(ge: Any, value: Any, dtype: int) -> Any:
    return value if value.dtype == dtype else ge.Cast(value, dst_type=dtype)
