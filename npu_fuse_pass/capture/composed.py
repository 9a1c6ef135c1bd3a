"""Operations that torch composes of others: with two reductions as results, deviations, `normalize`, a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.capture.interpreter import Expansion, Interpreter
from npu_fuse_pass.capture.values import Cell
from npu_fuse_pass.errors import Unsupported


def _aminmax(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 1 or not isinstance(args[0], Cell) or "out" in kwargs:
        return NotImplemented
    return [interpreter.call(name, args, dict(kwargs)) for name in ("amin", "amax")]


def _deviation(name: str) -> Expansion:
    """Deviation or variance computed in float64 and rounded once."""

    def expand(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = set(kwargs) <= {"dim", "correction", "keepdim"} and len(args) in (1, 2)
        if not known or not isinstance(args[0], Cell) or (len(args) == 2 and isinstance(args[1], bool)):
            return NotImplemented
        val, dims = args[0].read(), args[1] if len(args) == 2 else kwargs.get("dim")
        if not val.expr.tensor or not val.dtype.is_floating_point or not val.shape:
            return NotImplemented
        several = [] if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
        reduced = [val.shape[d] for d in several] or val.shape
        left = math.prod(reduced) - (1 if kwargs.get("correction") is None else kwargs["correction"])
        if left <= 0:
            return NotImplemented  # infinite or NaN, with a warning of torch's
        keep = {"keepdim": bool(kwargs.get("keepdim"))}
        wide = interpreter.call("to", (args[0], torch.float64), {})
        mean = interpreter.call("mean", (wide, dims), dict(keep))
        around = mean if dims is None else interpreter.call("mean", (wide, dims), {"keepdim": True})
        apart = interpreter.call("square", (interpreter.call("sub", (wide, around), {}),), {})
        made = interpreter.call("div", (interpreter.call("sum", (apart, dims), dict(keep)), left), {})
        if name.startswith("std"):
            made = interpreter.call("sqrt", (made,), {})
        results = [made, mean] if name.endswith("_mean") else [made]
        narrow = [interpreter.call("to", (r, val.dtype), {}) for r in results]
        return narrow if len(narrow) > 1 else narrow[0]

    return expand


_NORMALIZE = ("input", "p", "dim", "eps")
_COSINE = ("x1", "x2", "dim", "eps")


def _normalize(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = dict(p=2.0, dim=1, eps=1e-12) | dict(zip(_NORMALIZE, args, strict=False)) | kwargs
    if given.pop("out", None) is not None:
        return NotImplemented
    return _divided_by_norm(interpreter, given.pop("input"), **given)


def _divided_by_norm(interpreter: Interpreter, x: Cell, p: float, dim: Any, eps: float) -> Any:
    norm = interpreter.call("linalg_vector_norm", (x, p, dim), {"keepdim": True})
    return interpreter.call("div", (x, interpreter.call("clamp_min", (norm, eps), {})), {})


def _cosine_similarity(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = dict(dim=1, eps=1e-8) | dict(zip(_COSINE, args, strict=False)) | kwargs
    x, y, dim, eps = (given[name] for name in _COSINE)
    if not (isinstance(x, Cell) and isinstance(y, Cell)) or (x.val.shape, x.val.dtype) != (y.val.shape, y.val.dtype):
        return NotImplemented  # they are broadcast
    x, y = (_divided_by_norm(interpreter, each, 2, dim, eps) for each in (x, y))
    return interpreter.call("sum", (interpreter.call("mul", (x, y), {}), dim), {})


def _where_known(expand: Expansion) -> Expansion:
    """Leave the operation to torch where a part of it cannot be fused."""

    def apply(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if interpreter.dimensions is None:
            return NotImplemented
        try:
            return expand(interpreter, node, args, kwargs)
        except Unsupported:
            return NotImplemented

    return apply


COMPOSED: dict[str, Expansion] = {
    "aminmax": _where_known(_aminmax),
    "normalize": _where_known(_normalize),
    "cosine_similarity": _where_known(_cosine_similarity),
    **{name: _where_known(_deviation(name)) for name in ("std", "var", "std_mean", "var_mean")},
}
