"""Symbolic interpretation of FX graphs: every tensor is a cell that holds its current value as an expression.

An in-place operation gives its cell another value; cells of leaves that were written are the roots of the updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.capture.aten.fills import as_number, cast
from npu_fuse_pass.capture.aten.pointwise import evaluate
from npu_fuse_pass.capture.aten.shaped import REAL, SHAPED
from npu_fuse_pass.capture.dimensions import Dimensions
from npu_fuse_pass.capture.originals import Originals
from npu_fuse_pass.capture.values import Cell, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import entries
from npu_fuse_pass.fx_nodes.names import operation_name
from npu_fuse_pass.fx_nodes.places import source_of
from npu_fuse_pass.ir.expr import DTYPE_NAMES, HALF, Builder, postorder
from npu_fuse_pass.ir.types import Expanded, Leaf
from npu_fuse_pass.reasons import Code, Reason

Expansion = Callable[["Interpreter", fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""Interprets a node in place of the row of its name; returns NotImplemented to fall back to that."""

# torch returns the tensor itself where it already is what is asked for
_ALIASES = {"detach", "alias", "_get_data_attr", "to", "type_as", "float", "double", "half", "bfloat16", "lift_fresh"}
_ALIASES |= {"as_tensor", *REAL}
_COUNTED = 2**31
_REAL_PARAMETERS = "train real parameters, and take torch.view_as_complex of them in the model"
# torch's names of arguments that may be given by name, and where they stand otherwise
_PLACES = dict.fromkeys(("input", "self", "start", "size", "condition", "data"), 0)
_PLACES |= dict.fromkeys(("other", "exponent", "end", "tensor1", "scalar", "fill_value", "mask"), 1)
_PLACES |= dict.fromkeys(("tensor2", "weight"), 2)
_PLACES_OF = {"where": {"condition": 0, "input": 1, "self": 1, "other": 2}, "masked_fill": {**_PLACES, "value": 2}}


class Interpreter:
    """An interpreter of graph nodes over cells. `written` lists leaves in the order of their first write.

    Args:
        expansions: how nodes of these names are interpreted.
        keeps: operations that have no row stay as they are instead of being refused.
        dimensions: reductions over some of the dimensions, and broadcasting, are computed by stages of their own.
    """

    def __init__(self, expansions: Mapping[str, Expansion], keeps: bool = True, dimensions: bool = False) -> None:
        self.expansions = expansions
        self.keeps = keeps
        self.builder = Builder()
        self.leaves: list[Leaf] = []
        self.written: dict[int, Cell] = {}
        self.originals = Originals(self)
        self.dimensions = Dimensions(self.builder, self.leaves, self.originals.temporary) if dimensions else None
        self.numbers = False  # whether tensors of one element that are used as numbers are read as numbers
        self.reductions_stay = False  # whether sums, norms and the like of all elements stay as they are
        self.node: fx.Node | None = None  # that is being interpreted
        self.grad_enabled = False  # at the point that is being interpreted
        self.moved = 0  # bytes that the operations read and write so far, each by itself
        self.moved_by_calls = 0  # of these, those of operations that stay as they are
        self.copied = 0  # bytes that copies move which the step does not make, for writes through views
        self.expanded: dict[str, Expanded] = {}  # by the node's name

    def add_leaf(self, leaf: Leaf, tensor: bool, number: torch.dtype | None = None) -> Cell:
        """A cell that holds a new leaf; `number`: a Python number, int64 or float64, which decides no dtype."""
        if not self.keeps and tensor and leaf.dtype not in DTYPE_NAMES:
            raise _not_floating("leaf", leaf.dtype)
        expr = self.builder.leaf(len(self.leaves), leaf.dtype, tensor)
        cell = Cell(Val(expr, number or leaf.dtype, leaf.held or leaf.shape, number is not None), len(self.leaves))
        self.leaves.append(leaf)
        return cell

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Interpret one operation; returns a cell, or a list of cells for `_foreach_` operations."""
        args, kwargs = _placed(name, args, kwargs)
        if name.startswith("_foreach_"):
            return self._foreach(name.removeprefix("_foreach_"), args, kwargs)
        out = kwargs.pop("out", None)
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if in_place else name
        result = self._evaluate(name, tuple(map(_value, args)), {k: _value(v) for k, v in kwargs.items()})
        if out is not None:
            if not isinstance(out, Cell) or result.shape != out.val.shape:
                raise Unsupported(name, "writes to an `out` of another shape", Code.SHAPES)
            self._write(out, name, result)
            return out
        first = args[0] if args else None
        if name in _ALIASES and isinstance(first, Cell) and result == first.val and not _copies(args, kwargs):
            return args[0]  # torch returns the tensor itself: what is written through it reaches the leaf
        if not in_place:
            return Cell(result)
        self._write(args[0], name, result)
        return args[0]

    def _evaluate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Val:
        opaque = next((a for a in entries((args, kwargs)) if isinstance(a, Val) and a.opaque), None)
        if opaque is not None:
            raise _not_floating(name, opaque.dtype)
        if name in ("copy", "fill", "zero"):  # overwrite: the old value only gives dtype and shape
            kwargs.pop("non_blocking", None)
            source = args[1] if len(args) > 1 else kwargs.get("value", 0)
            self.moves([source], [args[0]], fused=True)
            if isinstance(source, Val) and source.dimmed and source.shape != args[0].shape:
                if self.dimensions is not None:
                    return self.dimensions.expanded(name, source, args[0].shape)
                raise Unsupported(name, f"broadcasts {source.shape} to {args[0].shape}", Code.SHAPES)
            return source if isinstance(source, Val) else SHAPED["full_like"](self.builder, args[0], source)
        try:
            result = None
            if self.dimensions is not None:
                args, kwargs = self.dimensions.broadcast(name, args, kwargs)
                result = self.dimensions.reduced(name, args, kwargs)
            if result is None:
                shaped = SHAPED.get(name)
                result = shaped(self.builder, *args, **kwargs) if shaped else evaluate(self.builder, name, args, kwargs)
            self._check_integer(name, result)
            if self.reductions_stay and not result.dimmed and any(isinstance(a, Val) and a.dimmed for a in args):
                raise Unsupported(name, "stays where updates read numbers of other tensors", Code.ACROSS_PARAMETERS)
            if name == "clone" or result not in args:  # else an alias
                self.moves(args, [result], fused=True)
            return result
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
            words = str(e).rpartition("() ")[2]  # without the name of the function that has the row
            raise Unsupported(name, f"is called in a form that is not known: {words}", Code.FORM) from e

    def _check_integer(self, name: str, result: Val) -> None:
        """Leave arithmetic to torch where integers may exceed float64's exact range: hashes, not counters."""
        if result.dtype.is_floating_point or result.dtype == torch.bool or result.number or result.expr.op == "leaf":
            return
        for e in postorder([result.expr]):
            original = e.op == "leaf" and self.leaves[e.value].kind == "result"  # type: ignore[index]
            if original or (e.op == "const" and abs(e.value) > _COUNTED):  # type: ignore[arg-type]
                raise Unsupported(name, "computes with integers that may be large", Code.DTYPE)

    def here(self, reason: Reason) -> Reason:
        """A reason with the place of the node that is being interpreted."""
        return Unsupported.of(reason).at(self.node.name, source_of(self.node)).reason if self.node else reason

    def overwrite(self, cell: Cell, name: str, result: Any) -> None:
        """Replace a tensor's value by a computed one."""
        if not isinstance(result, Cell) or (result.val.shape, result.val.dtype) != (cell.val.shape, cell.val.dtype):
            raise Unsupported(name, "writes in place what has another shape or dtype", Code.SHAPES)
        self._write(cell, name, result.val)

    def moves(self, given: Sequence[Val], made: Sequence[Val], fused: bool) -> None:
        """Count the bytes that one operation reads and writes by itself."""
        traffic = _traffic(given, made)
        self.moved += traffic
        self.moved_by_calls += 0 if fused else traffic

    def copies(self, given: Sequence[Val], made: Sequence[Val]) -> None:
        """Count the bytes of a copy that the step does not make."""
        self.copied += _traffic(given, made)

    def _write(self, cell: Cell, name: str, result: Val) -> None:
        if cell.val.opaque:
            raise _not_floating(name, cell.val.dtype)
        if result.dimmed and not cell.val.dimmed:
            raise Unsupported(name, "writes a tensor into a 0-dim one", Code.SHAPES)
        if result.shape not in ((), cell.val.shape):
            raise Unsupported(name, f"writes shape {result.shape} into {cell.val.shape}", Code.SHAPES)
        if cell.leaf is not None and self.leaves[cell.leaf].held:
            expr = cast(self.builder, as_number(self.builder, result), cell.val.dtype).expr
            val = Val(expr, cell.val.dtype, cell.val.shape)
        elif cell.val.dimmed:
            expr = self.builder.cast(result.expr, cell.val.dtype)
            val = Val(expr, cell.val.dtype, cell.val.shape)
        elif not cell.val.dtype.is_floating_point:
            val = cast(self.builder, dataclasses.replace(result, number=False), cell.val.dtype)
        else:
            val = Val(result.expr, cell.val.dtype, ())
        self.replace(cell, val)

    def _narrowed(self, number: Any, like: Val) -> Any:
        """A number as ATen takes it in half precision where a tensor is multiplied in place by a Scalar: first factor.

        Python's `x.mul_(0.9)` is another overload, whose number stays in float32.
        """
        if like.dtype not in HALF or not like.dimmed:
            return number
        if isinstance(number, float):
            return float(torch.tensor(number, dtype=like.dtype, device="cpu"))
        if not isinstance(number, Cell) or not number.val.number:
            return number
        half = self.builder.cast(number.val.expr, like.dtype)
        return Cell(dataclasses.replace(number.val, expr=self.builder.cast(half, torch.float64)))

    def replace(self, cell: Cell, val: Val) -> None:
        """Give a tensor its new value, ahead of what it is a view of."""
        cell.read()
        *views, whole = cell.lineage()
        if views:
            name = operation_name(self.node) if self.node else ""
            remedy = _REAL_PARAMETERS if whole.val.dtype.is_complex else None  # which torch updates as real ones
            reason = self.here(Code.VIEW_WRITTEN("writes in place through a view", name, remedy))
            if whole.leaf is not None and not all(v.view.put is not None for v in views if v.view is not None):
                raise Unsupported.of(reason)
            for v in views:
                assert v.view is not None
                v.view, v.view.base.ahead = dataclasses.replace(v.view, reason=reason), v
        if whole.leaf is not None:
            self.written[whole.leaf] = whole
        cell.val = val

    def _foreach(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Cell]:
        lists = [a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))]
        count = len(lists[0])
        if any(len(x) != count for x in lists):
            raise Unsupported(f"_foreach_{name}", "lists of different lengths", Code.SHAPES)

        def pick(x: Any, i: int) -> Any:
            given = x[i] if isinstance(x, (list, tuple)) else x
            return self._narrowed(given, args[0][i].val) if name == "mul_" and x is not args[0] else given

        return [
            self.call(name, tuple(pick(a, i) for a in args), {k: pick(v, i) for k, v in kwargs.items()})
            for i in range(count)
        ]


def _not_floating(name: str, dtype: torch.dtype) -> Unsupported:
    text = f"a tensor of dtype {dtype} takes part in the update; floating-point ones can"
    return Unsupported(name, text, Code.DTYPE, _REAL_PARAMETERS if dtype.is_complex else None)


def _copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if `to` is asked for a copy: by its second bool (after non_blocking), or by name."""
    bools = [a for a in args if isinstance(a, bool)]
    return bool(kwargs.get("copy")) or bools[1:2] == [True]


def _value(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_value(v) for v in x]
    return x.read() if isinstance(x, Cell) else x


def _traffic(args: Sequence[Any], results: Sequence[Val]) -> int:
    """Bytes that an operation reads and writes; a tensor given twice counts once, 0-dim ones not at all."""
    vals = [*{id(a): a for a in args if isinstance(a, Val)}.values(), *results]
    return sum(math.prod(v.shape) * v.dtype.itemsize for v in vals if v.shape)


def _placed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, those given by torch's names moved to their positions."""
    places = _PLACES_OF.get(name, _PLACES)
    named = sorted((places[k], k) for k in kwargs if k in places)
    for place, k in named:
        if place == len(args):
            args, kwargs = (*args, kwargs[k]), {n: v for n, v in kwargs.items() if n != k}
    return args, kwargs
