"""Numbers of several parameters in one vector (`torch.stack` of norms, `torch.tensor` of step sizes), entry by entry.

Nothing is stacked: pointwise operations on the vector become one on every entry, `unbind` gives the entries, and a sum
or norm of them is a number of all parameters. That has to hold for everything that the vector meets, so all of it is
looked at before the first operation is read this way.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.aten.fills import cast
from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.interpreter import Expansion, Interpreter
from npu_fuse_pass.capture.values import Cell, Scalars, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.fx_nodes.names import REFLECTED, operation_name
from npu_fuse_pass.reasons import Code

OF_SCALARS = ("linalg_vector_norm", "norm", "sum", "max", "amax", "min", "amin")
_ORDERS = (1, 2, math.inf)
_SOURCES = ("stack", "tensor", "as_tensor")
_SAME = ("detach", "float", "double")  # the vector itself, where it has that dtype already
_ENTRYWISE = {*ROWS, "div", "divide", "true_divide", "clone", *_SAME} - {"max.other", "fma"}


def order_of(user: fx.Node) -> Any:
    """The order of a norm."""
    named = user.kwargs.get("ord", user.kwargs.get("p", 2))
    return user.args[1] if "norm" in str(user.target) and len(user.args) > 1 else named


def _stack(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cells: Sequence[Cell] = args[0]
    if any(c.val.shape or c.val.expr.tensor for c in cells) or not _all_entrywise(node):
        return NotImplemented
    return Scalars(tuple(c.read() for c in cells))


def _numbers(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.tensor([a, b])` of different numbers; of the same one it is a constant."""
    given = args[0] if args else None
    if not isinstance(given, (list, tuple)) or len({id(g) for g in given}) < 2 or not _all_entrywise(node):
        return NotImplemented
    values = [g.read() if isinstance(g, Cell) else g for g in given]
    dtype = recorded(node).dtype
    return Scalars(tuple(SHAPED["tensor"](interpreter.builder, v, dtype) for v in values))


def _entrywise(name: str) -> Expansion:
    plain = name.removesuffix("_")

    def apply(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        vectors = [a for a in (*args, *kwargs.values()) if isinstance(a, Scalars)]
        if not vectors:
            return NotImplemented
        several = [a.val for a in (*args, *kwargs.values()) if isinstance(a, Cell) and a.val.shape]
        count = len(vectors[0].entries)
        args = args[::-1] if node.target in REFLECTED else args
        if several or any(len(v.entries) != count for v in vectors):
            raise Unsupported(name, "meets a vector of numbers that is a tensor of its own", Code.SHAPES)

        def entry(x: Any, i: int) -> Any:
            if isinstance(x, Scalars):
                return Cell(x.entries[i])
            return x

        made: list[Val] = [
            interpreter.call(
                plain, tuple(entry(a, i) for a in args), {k: entry(v, i) for k, v in kwargs.items()}
            ).read()
            for i in range(count)
        ]
        if name == plain:
            return args[0] if plain in _SAME and tuple(made) == vectors[0].entries else Scalars(tuple(made))
        target: Scalars = args[0]
        b = interpreter.builder
        target.entries = tuple(cast(b, new, old.dtype) for new, old in zip(made, target.entries, strict=True))
        return target

    return apply


def _unbind(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return [Cell(e) for e in args[0].entries] if isinstance(args[0], Scalars) else NotImplemented


def _getitem(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Cell(args[0].entries[args[1]]) if isinstance(args[0], Scalars) else NotImplemented


def _all_entrywise(source: fx.Node) -> bool:
    """Whether everything that a vector meets, directly or through others, can be read entry by entry."""
    if all(operation_name(u) in OF_SCALARS and order_of(u) in _ORDERS for u in source.users):
        return True
    first = recorded(source)
    if not isinstance(first, Tensor) or first.dim() != 1 or first.dtype not in (torch.float32, torch.float64):
        return False
    found, waiting = {source}, [source]
    while waiting:
        node = waiting.pop()
        met = _met(node, first)
        if met is None:
            return False
        new = [n for n in met if n not in found]
        found.update(new)
        waiting += new
    return _views_come_last(found)


def _met(node: fx.Node, like: Tensor) -> list[fx.Node] | None:
    """The other vectors that a vector's operation reads, and those computed from it; None where one does not fit."""
    vector = recorded(node)
    if not isinstance(vector, Tensor) or vector.shape != like.shape or vector.dtype not in (like.dtype, torch.bool):
        return None
    name = operation_name(node)
    met: list[fx.Node] = []
    if name in _SOURCES:
        items = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else ()
        if len(node.args) > 1 or set(node.kwargs) - {"dtype", "device"} or not all(map(_is_number, items)):
            return None
    elif name.removesuffix("_") in _ENTRYWISE and "out" not in node.kwargs:
        for given in node.all_input_nodes:
            if isinstance(recorded(given), Tensor) and recorded(given).dim():
                met.append(given)
    else:
        return None
    for user in node.users:
        name = operation_name(user)
        if name in OF_SCALARS:
            if order_of(user) not in _ORDERS:
                return None
        elif name == "unbind" or user.target is operator.getitem:
            index = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
            if type(index) is not int or (name == "unbind" and index != 0) or any(map(_is_written, _views(user))):
                return None
        elif name.removesuffix("_") in _ENTRYWISE:
            met.append(user)
        else:
            return None
    return met


def _is_number(item: Any) -> bool:
    value = recorded(item) if isinstance(item, fx.Node) else item
    return (
        (value.dim() == 0 and value.is_floating_point()) if isinstance(value, Tensor) else not isinstance(value, bool)
    )


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """What an index gives, or `unbind`: its list, and the tensors in it."""
    yield node
    if operation_name(node) == "unbind":
        yield from (user for user in node.users if user.target is operator.getitem)


def _is_written(view: fx.Node) -> bool:
    """Whether an operation may write to one entry in place, and so to the vector."""
    first: list[fx.Node] = []
    for user in view.users:
        if operation_name(user).endswith("_"):
            fx.node.map_arg((user.args[:1], user.kwargs.get("self"), user.kwargs.get("out")), first.append)
    return view in first


def _views_come_last(vectors: set[fx.Node]) -> bool:
    """Whether no vector is written after an entry of it was taken: entries are values here, in torch they are views."""
    if not any(operation_name(n).endswith("_") for n in vectors):
        return True
    places = {n: i for i, n in enumerate(next(iter(vectors)).graph.nodes)}
    taken = [u for n in vectors for u in n.users if operation_name(u) == "unbind" or u.target is operator.getitem]
    last = max(places[n] for n in vectors if operation_name(n).endswith("_"))
    return all(places[t] > last for t in taken)


def reshaped(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A computed number as a tensor of one element, or the other way round: it meets tensors of any shape.

    What torch has recorded is the shape that a tensor has at the end: `squeeze_` changes that of the tensor itself.
    """
    made, in_place = recorded(node), operation_name(node).endswith("_")
    if not args or not isinstance(args[0], Cell) or not isinstance(made, Tensor):
        return NotImplemented
    val, b = args[0].read(), interpreter.builder
    if val.expr.tensor or val.number or not val.dtype.is_floating_point or made.dtype != val.dtype:
        return NotImplemented
    shape = tuple(map(int, made.shape))
    if math.prod(val.shape) != 1 or math.prod(shape) != 1 or (in_place and args[0].leaf is not None):
        return NotImplemented
    expr = b.cast(val.expr, val.dtype)
    new = val if shape == val.shape else Val(expr if shape else b.cast(expr, torch.float64), val.dtype, shape)
    if not in_place:
        return Cell(new, None, (args[0], args[0].val))
    args[0].val = new
    return args[0]


STACKED: dict[str, Expansion] = {
    **{name + end: _entrywise(name + end) for name in sorted(_ENTRYWISE) for end in ("", "_")},
    "stack": _stack,
    "tensor": _numbers,
    "as_tensor": _numbers,
    "unbind": _unbind,
    "getitem": _getitem,
    **dict.fromkeys(("squeeze_", "unsqueeze_"), reshaped),
}
