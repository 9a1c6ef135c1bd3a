"""Numbers of several parameters in one vector (`torch.stack` of norms, `torch.tensor` of step sizes), entry by entry.

Nothing is stacked: pointwise operations on the vector become one on every entry, `unbind` gives the entries, and a sum
or norm of them is a number of all parameters. That has to hold for everything that the vector meets, so all of it is
checked before the first operation is read this way.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.aten.fills import as_number, cast
from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.interpreter import Expansion, Interpreter
from npu_fuse_pass.capture.values import Cell, Scalars, Val, View
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import recorded, storage_of
from npu_fuse_pass.fx_nodes.names import in_order, operation_name
from npu_fuse_pass.reasons import Code

OF_SCALARS = ("linalg_vector_norm", "norm", "sum", "max", "amax", "min", "amin")
_ORDERS = (1, 2, math.inf)
_SOURCES = ("stack", "cat", "concat", "tensor", "as_tensor")
_TAKEN = ("unbind", "split")
_SAME = ("detach", "float", "double")  # the vector itself, where it has that dtype already
_ENTRYWISE = {*ROWS, "clone", *_SAME} - {"max.other", "fma"}


def order_of(user: fx.Node) -> Any:
    """The order of a norm."""
    named = user.kwargs.get("ord", user.kwargs.get("p", 2))
    return user.args[1] if "norm" in str(user.target) and len(user.args) > 1 else named


def _stack(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cells: Sequence[Cell] = args[0]
    if any(c.val.shape or c.val.expr.tensor for c in cells) or not _all_entrywise(interpreter, node):
        return NotImplemented
    return _vector(interpreter, node, [c.read() for c in cells])


def _cat(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.cat` of numbers that tensors of one element hold."""
    cells: Sequence[Cell] = args[0]
    if any(c.val.shape != (1,) or c.val.expr.tensor for c in cells) or not _all_entrywise(interpreter, node):
        return NotImplemented
    b = interpreter.builder
    return _vector(interpreter, node, [as_number(b, c.read()) for c in cells])


def _vector(interpreter: Interpreter, node: fx.Node, entries: Sequence[Val]) -> Scalars:
    """Entries in the vector's dtype, which is the one that all of theirs fit in."""
    dtype = getattr(recorded(node), "dtype", None)
    return Scalars(tuple(v if dtype is None else cast(interpreter.builder, v, dtype) for v in entries))


def _split(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`vector.split(1)`: the entries as tensors of one element."""
    if not isinstance(args[0], Scalars):
        return NotImplemented
    b = interpreter.builder
    return [Cell(Val(b.cast(e.expr, e.dtype), e.dtype, (1,))) for e in args[0].entries]


def _numbers(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.tensor([a, b])` of different numbers; of the same one it is a constant."""
    given = args[0] if args else None
    if not isinstance(given, (list, tuple)) or len({id(g) for g in given}) < 2 or not _all_entrywise(interpreter, node):
        return NotImplemented
    values = [g.read() if isinstance(g, Cell) else g for g in given]
    dtype = recorded(node).dtype
    return Scalars(tuple(SHAPED["tensor"](interpreter.builder, v, dtype) for v in values))


def _entrywise(
    name: str, interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    vectors = [a for a in (*args, *kwargs.values()) if isinstance(a, Scalars)]
    if not vectors:
        return NotImplemented
    several = [a.val for a in (*args, *kwargs.values()) if isinstance(a, Cell) and a.val.shape]
    plain, count = name.removesuffix("_"), len(vectors[0].entries)
    args = in_order(node, args)
    if several or any(len(v.entries) != count for v in vectors):
        raise Unsupported(name, "meets a vector of numbers that is a tensor of its own", Code.SHAPES)

    def entry(x: Any, i: int) -> Any:
        return Cell(x.entries[i]) if isinstance(x, Scalars) else x

    made: list[Val] = [
        interpreter.call(plain, tuple(entry(a, i) for a in args), {k: entry(v, i) for k, v in kwargs.items()}).read()
        for i in range(count)
    ]
    if name == plain:
        return args[0] if plain in _SAME and tuple(made) == vectors[0].entries else Scalars(tuple(made))
    target: Scalars = args[0]
    b = interpreter.builder
    target.entries = tuple(cast(b, new, old.dtype) for new, old in zip(made, target.entries, strict=True))
    return target


def _unbind(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return [Cell(e) for e in args[0].entries] if isinstance(args[0], Scalars) else NotImplemented


def _getitem(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Cell(args[0].entries[args[1]]) if isinstance(args[0], Scalars) else NotImplemented


def _all_entrywise(interpreter: Interpreter, source: fx.Node) -> bool:
    """True if everything that a vector meets, directly or through others, can be read entry by entry."""
    if all(operation_name(u) in OF_SCALARS and order_of(u) in _ORDERS for u in source.users):
        return True
    first = recorded(source)
    if not isinstance(first, Tensor) or first.dim() != 1 or first.dtype not in (torch.float32, torch.float64):
        return False
    found = all_met(source, lambda node: _met(node, first, interpreter.numbers))
    return found is not None and _views_come_last(found)


def all_met(source: fx.Node, met: Callable[[fx.Node], list[fx.Node] | None]) -> set[fx.Node] | None:
    """A node and all that it meets, directly or through others; None where `met` of one of them is None."""
    found, waiting = {source}, [source]
    while waiting:
        nodes = met(waiting.pop())
        if nodes is None:
            return None
        new = [n for n in nodes if n not in found]
        found.update(new)
        waiting += new
    return found


def _met(node: fx.Node, like: Tensor, numbers: bool) -> list[fx.Node] | None:
    """The other vectors that a vector's operation reads, and those computed from it; None where one does not fit."""
    vector = recorded(node)
    if not isinstance(vector, Tensor) or vector.shape != like.shape or vector.dtype not in (like.dtype, torch.bool):
        return None
    name = operation_name(node)
    met: list[fx.Node] = []
    if name in _SOURCES:
        items = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else ()
        dims = 1 if name in ("cat", "concat") else 0
        if dims and not numbers:
            return None
        if len(node.args) > 1 or set(node.kwargs) - {"dtype", "device"} or not all(_is_number(i, dims) for i in items):
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
        elif name in _TAKEN or user.target is operator.getitem:
            asked: dict[Any, Any] = {**dict(enumerate(user.args[1:])), **user.kwargs}
            if asked not in _ENTRIES.get(name, ()) and not (name == "getitem" and type(asked[0]) is int):
                return None
        elif name.removesuffix("_") in _ENTRYWISE:
            met.append(user)
        else:
            return None
    return met


# how the entries of a vector are taken, one by one
_ENTRIES: dict[str, tuple[dict[Any, Any], ...]] = {
    "unbind": ({}, {0: 0}, {"dim": 0}),
    "split": ({0: 1}, {"split_size": 1}),
}


def _is_number(item: Any, dims: int) -> bool:
    """True if a source may take this item. Of tensors of one element `_cat` checks that they hold a number."""
    value = recorded(item) if isinstance(item, fx.Node) else item
    if not isinstance(value, Tensor):
        return not dims and not isinstance(value, bool)
    return value.dim() == dims and value.numel() == 1 and value.is_floating_point()


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """The results of an index or of `unbind`: its list, and the tensors in it."""
    yield node
    if operation_name(node) in _TAKEN:
        yield from (user for user in node.users if user.target is operator.getitem)


def _writes(view: fx.Node) -> Iterator[fx.Node]:
    """The operations that may write to an entry in place, and so to the vector."""
    for user in view.users:
        first: list[fx.Node] = []
        if operation_name(user).endswith("_"):
            fx.node.map_arg((user.args[:1], user.kwargs.get("self")), first.append)
        fx.node.map_arg(user.kwargs.get("out"), first.append)
        if view in first:
            yield user


def _views_come_last(vectors: set[fx.Node]) -> bool:
    """True if entries are taken at the end: they are values here, views in torch.

    No vector is written after an entry of it was taken. One whose entries are written is not read afterwards, and they
    were taken once.
    """
    places = {n: i for i, n in enumerate(next(iter(vectors)).graph.nodes)}
    taken = [u for n in vectors for u in n.users if operation_name(u) in _TAKEN or u.target is operator.getitem]
    for t in taken:
        same = [n for n in vectors if storage_of(recorded(n)) == storage_of(recorded(t.args[0]))]
        if any(places[n] > places[t] for n in same if operation_name(n).endswith("_")):
            return False
        written = min((places[w] for view in _views(t) for w in _writes(view)), default=None)
        readers = {u for n in same for u in n.users} - {t}
        if written is not None and any(places[u] > written or u in taken for u in readers):
            return False
    return True


def reshaped(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A computed number as a tensor of one element, or the other way round: it meets tensors of any shape.

    torch records the final shape of a tensor: `squeeze_` changes the shape in place.
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
        return Cell(new, None, View(args[0], args[0].val))
    args[0].val, args[0].view = new, args[0].view and View(args[0].view.base, args[0].view.seen)
    return args[0]


STACKED: dict[str, Expansion] = {
    **{name + end: functools.partial(_entrywise, name + end) for name in sorted(_ENTRYWISE) for end in ("", "_")},
    "stack": _stack,
    **dict.fromkeys(("cat", "concat"), _cat),
    "split": _split,
    "tensor": _numbers,
    "as_tensor": _numbers,
    "unbind": _unbind,
    "getitem": _getitem,
    **dict.fromkeys(("squeeze_", "unsqueeze_"), reshaped),
}
