"""Whole tensors in another shape (`reshape(-1)`, `flatten`, `view_as`), read as the tensors that they are views of.

The same elements meet in either shape, as long as everything that meets such a view comes from tensors of one shape,
and only numbers and tensors of that shape leave it. This is checked before the first view is read this way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.stacked import all_met
from npu_fuse_pass.capture.values import Cell, in_shape
from npu_fuse_pass.fx_nodes.effects import recorded, storage_of
from npu_fuse_pass.fx_nodes.names import operation_name

VIEWS = ("reshape", "view", "flatten", "ravel", "view_as", "reshape_as", "squeeze", "unsqueeze")
_SAME = ("to", "type_as", "float", "double", "detach", "clone", "masked_fill")
_ENTRYWISE = {*ROWS, *_SAME} - {"max.other", "fma"}
_NUMBERS = ("sum", "mean", "norm", "linalg_vector_norm", "dot", "amax", "amin")


def whole_view(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """A view of a whole tensor as the tensor itself, where that holds for everything computed from it."""
    made = recorded(node)
    if not args or not isinstance(args[0], Cell) or not isinstance(made, Tensor):
        return NotImplemented
    val = args[0].read()
    if not val.expr.tensor or not val.dtype.is_floating_point or made.dtype != val.dtype:
        return NotImplemented
    shape = tuple(map(int, made.shape))
    if shape == val.shape:
        return args[0]
    if made.numel() < 2 or not (_is_end(node) or _is_apart(node)):
        return NotImplemented
    return in_shape(node, args[0], shape)


def _is_apart(view: fx.Node) -> bool:
    """True if computations from a view meet only views of tensors of one shape, and return only such tensors."""
    one, other = _shape(view.args[0]), _shape(view)
    if one is None or one == other:
        return False
    found = all_met(view, lambda node: _met(node, one, other))
    if found is None:
        return False
    looked_at = {storage_of(recorded(n.args[0])) for n in found if operation_name(n) in VIEWS}
    return not any(_writes(n) and storage_of(recorded(n.args[0])) in looked_at for n in found)


def _met(node: fx.Node, one: Any, other: Any) -> list[fx.Node] | None:
    """The nodes of the other shape that a node reads, and those that read it; None where one does not fit."""
    name = operation_name(node)
    met: list[fx.Node] = []
    if name in VIEWS:
        if _shape(node.args[0]) != one:
            return None
    elif name.removesuffix("_") in _ENTRYWISE and "out" not in node.kwargs:
        met = [n for n in node.all_input_nodes if _shape(n)]
        if any(_shape(n) != other for n in met):
            return None
    else:
        return None
    for user in node.users:
        if operation_name(user) in VIEWS and user.args[0] is node:
            if _shape(user) != one:
                return None
        elif _shape(user) == other:
            met.append(user)
        elif _shape(user) != () or operation_name(user) not in _NUMBERS:
            return None
    return met


def _is_end(view: fx.Node) -> bool:
    """True if a view restores the shape that the reshaped tensors had before."""
    if not isinstance(source := view.args[0], fx.Node):
        return False
    found, waiting = {source}, [source]
    while waiting:
        node = waiting.pop()
        if operation_name(node) in VIEWS and _shape(node.args[0]) == _shape(view):
            return _is_apart(node)
        new = [n for n in node.all_input_nodes if _shape(n) == _shape(source) and n not in found]
        found.update(new)
        waiting += new
    return False


def _shape(node: Any) -> tuple[int, ...] | None:
    value = recorded(node)
    return tuple(map(int, value.shape)) if isinstance(value, Tensor) else None


def _writes(node: fx.Node) -> bool:
    return operation_name(node).endswith("_")
