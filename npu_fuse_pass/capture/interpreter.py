"""Symbolic interpretation of FX graphs: every tensor is a cell that holds its current value as an expression.

An in-place operation gives its cell another value; cells of leaves that were written are the roots of the updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.aten.pointwise import evaluate
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.values import Cell, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import Effects, recorded, storage_of
from npu_fuse_pass.ir.expr import DTYPE_NAMES, Builder, Expr, postorder
from npu_fuse_pass.ir.types import Call, Expanded, Leaf, LeafRef
from npu_fuse_pass.reasons import Code, Reason

Expansion = Callable[["Interpreter", fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""How a node is interpreted otherwise than by its name; NotImplemented: as any other."""

_ALIASES = {"detach", "alias", "_get_data_attr", "to", "type_as", "float", "double", "half", "bfloat16", "lift_fresh"}


@dataclasses.dataclass
class Level:
    """What original operations of one level read, and the operations."""

    writes: dict[int, Cell] = dataclasses.field(default_factory=dict)
    calls: list[Call] = dataclasses.field(default_factory=list)


class Interpreter:
    """Interprets graph nodes over cells. `written` lists leaves in the order of their first write.

    Args:
        expansions: how nodes of these names are interpreted.
        keeps: operations that have no row stay as they are instead of being refused.
    """

    def __init__(self, expansions: Mapping[str, Expansion], keeps: bool = True) -> None:
        self.expansions = expansions
        self.keeps = keeps
        self.builder = Builder()
        self.leaves: list[Leaf] = []
        self.written: dict[int, Cell] = {}
        self.stages: list[Level] = []
        self.kept: dict[tuple[str, str], Reason] = {}  # once for each operation and text
        self.effects = Effects()
        self.grad_enabled = False  # at the point that is being interpreted
        self.moved = 0  # bytes that the operations read and write so far, each by itself
        self.moved_by_calls = 0  # of these, those of operations that stay as they are
        self.expanded: dict[str, Expanded] = {}  # by the node's name
        self._levels: dict[int, int] = {}
        self._temporaries: dict[tuple[int, torch.dtype], int] = {}

    def add_leaf(self, leaf: Leaf, tensor: bool, number: bool = False) -> Cell:
        """A cell that holds a new leaf; `number`: a Python number, which decides no dtype."""
        expr = self.builder.leaf(len(self.leaves), leaf.dtype, tensor)
        cell = Cell(Val(expr, leaf.dtype, leaf.shape, number), len(self.leaves))
        self.leaves.append(leaf)
        return cell

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation; returns a cell, or a list of cells for `_foreach_` operations."""
        if name.startswith("_foreach_"):
            return self._foreach(name.removeprefix("_foreach_"), args, kwargs)
        out = kwargs.pop("out", None)
        if out is not None:
            return self._call_out(out, name, args, kwargs)
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if in_place else name
        values = tuple(_value(a) for a in args)
        result = self._evaluate(name, values, {k: _value(v) for k, v in kwargs.items()})
        if name in _ALIASES and result == args[0].val and not _copies(args, kwargs):
            return args[0]  # torch returns the tensor itself: what is written through it reaches the leaf
        if not in_place:
            return Cell(result)
        self._write(args[0], name, result)
        return args[0]

    def _call_out(self, out: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cell:
        result = self._evaluate(name, tuple(map(_value, args)), {k: _value(v) for k, v in kwargs.items()})
        if not isinstance(out, Cell) or result.shape != out.val.shape:
            raise Unsupported(name, "writes to an `out` of another shape", Code.SHAPES)
        self._write(out, name, result)
        return out

    def _evaluate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Val:
        if name in ("copy", "fill", "zero"):  # overwrite: the old value only gives dtype and shape
            kwargs.pop("non_blocking", None)
            source = args[1] if len(args) > 1 else kwargs.get("value", 0)
            if isinstance(source, Val) and source.dimmed and source.shape != args[0].shape:
                raise Unsupported(name, f"broadcasts {source.shape} to {args[0].shape}", Code.SHAPES)
            return source if isinstance(source, Val) else SHAPED["full_like"](self.builder, args[0], source)
        try:
            if name in SHAPED:
                result = SHAPED[name](self.builder, *args, **kwargs)
            else:
                result = evaluate(self.builder, name, args, kwargs)
            if result not in args:  # else an alias
                self.moved += _traffic(args, [result])
            return result
        except TypeError as e:
            words = str(e).rpartition("() ")[2]  # without the name of the function that has the row
            raise Unsupported(name, f"is called in a form that is not known: {words}", Code.FORM) from e

    def overwrite(self, cell: Cell, name: str, result: Any) -> None:
        """What an original operation gave takes the place of a tensor's value."""
        if not isinstance(result, Cell) or (result.val.shape, result.val.dtype) != (cell.val.shape, cell.val.dtype):
            raise Unsupported(name, "writes in place what has another shape or dtype", Code.SHAPES)
        self._write(cell, name, result.val)

    def keep(
        self,
        node: fx.Node,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: Reason,
        target: Callable[..., Any] | str | None = None,
    ) -> Any:
        """Leave an operation as it is: what it reads becomes a temporary, what it gives a leaf.

        Raises:
            Unsupported: what the operation gives is not known.
        """
        meta = recorded(node)
        fakes: list[Any] = list(meta) if isinstance(meta, (list, tuple)) else [meta]
        if not all(isinstance(fake, Tensor) for fake in fakes):
            raise Unsupported.of(reason)
        cells = [a for a in flatten((args, *kwargs.values())) if isinstance(a, Cell)]
        level = max((self._level(a.read().expr) for a in cells), default=0)
        while len(self.stages) <= level:
            self.stages.append(Level())
        given: Any = fx.node.map_aggregate(
            (args, kwargs), lambda a: self._reference(a, level) if isinstance(a, Cell) else a
        )
        bases = {storage_of(recorded(n)): c for n, c in zip(node.args, args, strict=True) if isinstance(n, fx.Node)}
        first = len(self.leaves)
        made = [self._result(name, fake, level, bases.get(storage_of(fake))) for fake in fakes]
        traffic = _traffic([a.val for a in cells], [made_cell.val for made_cell in made])
        self.moved, self.moved_by_calls = self.moved + traffic, self.moved_by_calls + traffic
        several = isinstance(meta, (list, tuple))
        results = list(range(first, len(self.leaves)))
        self.stages[level].calls.append(Call(target or node.target, given[0], given[1], results, several, node.name))
        self.kept.setdefault((name, reason.text), dataclasses.replace(reason, op=name))
        return made if several else made[0]

    def _result(self, name: str, fake: Any, level: int, base: Any) -> Cell:
        if fake.dtype not in DTYPE_NAMES:
            raise Unsupported(name, f"gives {fake.dtype}, which no kernel reads", Code.DTYPE)
        place = f"{name}_{len(self.leaves)}"
        leaf = Leaf("result", place, dtype=fake.dtype, shape=tuple(map(int, fake.shape)), device=fake.device)
        val = self.add_leaf(leaf, fake.ndim > 0).val
        self._levels[id(val.expr)] = level + 1
        return Cell(val, None, (base, base.val) if isinstance(base, Cell) else None)

    def _level(self, root: Expr) -> int:
        """How many stages have to run before an expression can be evaluated."""
        for e in postorder([root]):
            if id(e) not in self._levels:
                self._levels[id(e)] = max((self._levels[id(a)] for a in e.args), default=0)
        return self._levels[id(root)]

    def _reference(self, cell: Cell, level: int) -> LeafRef:
        """A leaf that holds a cell's current value when stage `level` runs its calls."""
        val = cell.read()
        if val.expr.op == "leaf" and (val.expr.tensor or val.shape == ()):
            assert isinstance(val.expr.value, int)
            return LeafRef(val.expr.value)
        if val.dtype == torch.bool and not val.shape:
            raise Unsupported("bool", "a 0-dim bool that an original operation reads", Code.DTYPE)
        key = (id(val.expr), val.dtype)
        if key not in self._temporaries:
            self._temporaries[key] = len(self.leaves)
            device = next((leaf.device for leaf in self.leaves if leaf.shape), torch.device("cpu"))
            leaf = Leaf("temporary", f"t{len(self.leaves)}", dtype=val.dtype, shape=val.shape, device=device)
            self.leaves.append(leaf)
            self.stages[level].writes[self._temporaries[key]] = Cell(val, self._temporaries[key])
        return LeafRef(self._temporaries[key])

    def _write(self, cell: Cell, name: str, result: Val) -> None:
        self._leave_base(cell, name)
        if result.dimmed and not cell.val.dimmed:
            raise Unsupported(name, "writes a tensor into a 0-dim one", Code.SHAPES)
        if result.shape not in ((), cell.val.shape):
            raise Unsupported(name, f"writes shape {result.shape} into {cell.val.shape}", Code.SHAPES)
        if cell.val.dimmed:
            expr = self.builder.cast(result.expr, cell.val.dtype)
            cell.val = Val(expr, cell.val.dtype, cell.val.shape)
        else:
            cell.val = Val(result.expr, cell.val.dtype, ())
        if cell.leaf is not None:
            self.written[cell.leaf] = cell

    def _leave_base(self, cell: Cell, name: str) -> None:
        """A view that is written: fine where nothing reads what it looked at any more."""
        base = cell.base[0] if cell.base is not None else None
        while base is not None:
            if base.leaf is not None:
                raise Unsupported(name, "writes in place through a view", Code.VIEW_WRITTEN)
            base.stale = True
            base = base.base[0] if base.base is not None else None
        cell.base = None

    def _foreach(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Cell]:
        lists = [a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))]
        count = len(lists[0])
        if any(len(x) != count for x in lists):
            raise Unsupported(f"_foreach_{name}", "lists of different lengths", Code.SHAPES)

        def pick(x: Any, i: int) -> Any:
            return x[i] if isinstance(x, (list, tuple)) else x

        return [
            self.call(name, tuple(pick(a, i) for a in args), {k: pick(v, i) for k, v in kwargs.items()})
            for i in range(count)
        ]


def _copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `to` is asked for a copy: its second bool (after non_blocking), or by name."""
    bools = [a for a in args if isinstance(a, bool)]
    return bool(kwargs.get("copy")) or bools[1:2] == [True]


def _value(x: Any) -> Any:
    return x.read() if isinstance(x, Cell) else x


def _traffic(args: Sequence[Any], results: Sequence[Val]) -> int:
    """Bytes that an operation reads and writes; a tensor that is given twice is read once, what is 0-dim is free."""
    vals = [*{id(a): a for a in args if isinstance(a, Val)}.values(), *results]
    return sum(math.prod(v.shape) * v.dtype.itemsize for v in vals if v.shape)


def flatten(values: Sequence[Any]) -> Iterator[Any]:
    """The entries of nested lists and tuples."""
    for v in values:
        if isinstance(v, (list, tuple)):
            yield from flatten(v)
        else:
            yield v
