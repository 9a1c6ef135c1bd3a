"""Operations on lists of tensors other than "x on every element": rows by name, tried before all other rows.

A row gets the interpreter, the node and its arguments as cells; it returns NotImplemented for operations that the other
rows handle.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.capture.aten.fills import cast
from npu_fuse_pass.capture.aten.pointwise import evaluate
from npu_fuse_pass.capture.composed import COMPOSED
from npu_fuse_pass.capture.dimensions import in_another_shape
from npu_fuse_pass.capture.flat import VIEWS, whole_view
from npu_fuse_pass.capture.interpreter import Expansion, Interpreter
from npu_fuse_pass.capture.stacked import OF_SCALARS, STACKED, order_of, reshaped
from npu_fuse_pass.capture.values import Cell, Scalars
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.ir.expr import HALF
from npu_fuse_pass.reasons import Code


def _of_scalars(
    name: str, interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not isinstance(args[0], Scalars):
        return NotImplemented
    if set(kwargs) - {"ord", "p", "dtype"} or len(args) > 2:
        raise Unsupported(name, "over some of the dimensions of stacked scalars", Code.REDUCTION)
    b, entries = interpreter.builder, args[0].entries
    order = order_of(node) if "norm" in name else None
    made = getattr(recorded(node), "dtype", None)
    if made in HALF:  # ATen adds up in float32, and rounds what it stores
        entries = tuple(cast(b, v, torch.float32) for v in entries)
    if order == 2:
        entries = tuple(evaluate(b, "mul", (v, v), {}) for v in entries)
    elif order is not None:
        entries = tuple(evaluate(b, "abs", (v,), {}) for v in entries)
    pairwise = {"max": "maximum", "amax": "maximum", "min": "minimum", "amin": "minimum"}.get(name, "add")
    pairwise = "maximum" if order == math.inf else pairwise
    whole = functools.reduce(lambda x, y: evaluate(b, pairwise, (x, y), {}), entries)
    whole = evaluate(b, "sqrt", (whole,), {}) if order == 2 else whole
    return Cell(cast(b, whole, made) if made in HALF else whole)


def _unscale(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)`, as torch.amp.GradScaler calls it."""
    grads, found, scale = args
    b = interpreter.builder
    counts = []
    for grad in grads:
        bad = b.op("where", b.op("isfinite", grad.read().expr), b.const(0), b.const(1))
        counts.append(b.reduce("sum", bad))
        interpreter.call("mul_", (grad, scale), {})
    if counts:
        some = b.op("gt", functools.reduce(functools.partial(b.op, "add"), counts), b.const(0))
        new = b.op("where", some, b.const(1), found.read().expr)
        interpreter.call("copy_", (found, Cell(dataclasses.replace(found.read(), expr=new))), {})
    return None


def _setitem(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x[mask] = number`; other parts of a tensor are left to torch."""
    target, mask, value = args
    cells = all(isinstance(x, Cell) and x.val.expr.tensor for x in (target, mask))
    number = isinstance(value, (int, float)) or (isinstance(value, Cell) and not value.val.dimmed)
    if not cells or not number or mask.val.dtype != torch.bool or mask.val.shape != target.val.shape:
        return NotImplemented
    if not target.val.dtype.is_floating_point:
        return NotImplemented
    return interpreter.call("masked_fill_", (target, mask, value), {})


def _view(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor in another shape: a number, or a whole tensor."""
    number = reshaped(interpreter, node, args, kwargs)
    if number is not NotImplemented:
        return number
    return whole_view(node, args) if interpreter.dimensions is None else in_another_shape(node, args)


LISTS: dict[str, Expansion] = {
    **STACKED,
    **COMPOSED,
    **dict.fromkeys(VIEWS, _view),
    **{name: functools.partial(_of_scalars, name) for name in OF_SCALARS},
    "setitem_": _setitem,
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
}
