"""Reductions over some of the dimensions, broadcasting, and tensors in another shape, as values of small tensors.

A reduction is computed by a separate stage, ahead of its readers; its result is a temporary, as the result of an
original operation is a leaf. A broadcast tensor is a temporary too, of which every element reads its own (`expand`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.values import Cell, Val, in_shape
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.ir.dimensions import EXPAND, Layout, layout_of
from npu_fuse_pass.ir.expr import DTYPE_NAMES, REDUCTIONS, Builder, Expr, postorder
from npu_fuse_pass.ir.types import Leaf
from npu_fuse_pass.reasons import Code

# where the arguments `dim` and `keepdim` stand
_PLACES = {
    **dict.fromkeys(("sum", "mean", "amax", "amin"), (1, 2)),
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), (2, 3)),
}
_ENTRYWISE = {*ROWS, "masked_fill", "max", "min"}
_CHEAP = ("neg", "cast", "add", "sub", "mul")
_FEW = 5  # of them, with what they read
_ALTERNATE = "{} dimensions that are not adjacent, in shape {}; at most two stretches of them can fuse"


class Dimensions:
    """Small tensors of one graph; `temporary` stores a value ahead of its readers."""

    def __init__(self, builder: Builder, leaves: Sequence[Leaf], temporary: Callable[[Val], Expr]) -> None:
        self._builder, self._leaves, self._temporary = builder, leaves, temporary
        self._stored: dict[object, Expr] = {}
        self._sizes: dict[Layout, tuple[Expr, ...]] = {}

    def broadcast(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a pointwise operation, tensors expanded to the shape of its result."""
        vals = [a for a in (*args, *kwargs.values()) if isinstance(a, Val) and a.dimmed]
        tensors = {v.shape for v in vals if v.expr.tensor}
        if name not in _ENTRYWISE or not tensors:
            return args, kwargs
        try:
            shape = tuple(torch.broadcast_shapes(*(v.shape for v in vals)))
        except RuntimeError:
            return args, kwargs
        if tensors == {shape}:
            return args, kwargs

        def given(x: Any) -> Any:
            apart = isinstance(x, Val) and x.expr.tensor and x.shape != shape
            return self.expanded(name, x, shape) if apart else x

        return tuple(map(given, args)), {k: given(v) for k, v in kwargs.items()}

    def expanded(self, name: str, x: Val, shape: tuple[int, ...]) -> Val:
        """A tensor in a larger shape.

        Raises:
            Unsupported: its missing dimensions are not stretches of `shape`, or it does not broadcast to `shape`.
        """
        own = (1,) * (len(shape) - len(x.shape)) + x.shape
        if len(own) > len(shape) or any(size not in (1, full) for size, full in zip(own, shape, strict=True)):
            raise Unsupported(name, f"broadcasts {x.shape} to {shape}", Code.SHAPES)
        layout = layout_of(shape, [d for d, size in enumerate(own) if size == shape[d]])
        if layout is None:
            raise Unsupported(name, _ALTERNATE.format("broadcasts", shape), Code.SHAPES)
        if not x.expr.tensor:
            return Val(x.expr, x.dtype, shape)
        return Val(self._spread(x, self._of(layout)), x.dtype, shape)

    def _spread(self, x: Val, sizes: tuple[Expr, ...]) -> Expr:
        """The expression that every element of a larger tensor reads.

        A few cheap operations, again for every element, cost less than a stage that computes them once.
        """
        order, b = postorder([x.expr]), self._builder
        tensors = [e for e in order if e.tensor]
        made = all(self._is_made(e) if e.op == "leaf" else e.op in _CHEAP for e in tensors)
        if not made or len(tensors) > _FEW or any(e.op in REDUCTIONS for e in order):
            return b.make(EXPAND, (self._leaf(x), *sizes), None, x.dtype, True)
        spread: dict[int, Expr] = {}
        for e in order:
            if not e.tensor:
                spread[id(e)] = e
            elif e.op == "leaf":
                spread[id(e)] = b.make(EXPAND, (e, *sizes), None, e.dtype, True)
            else:
                spread[id(e)] = b.again(e, spread)
        return spread[id(x.expr)]

    def _is_made(self, leaf: Expr) -> bool:
        """True if an earlier stage made the value of a leaf, so that no kernel writes it while others read it."""
        return self._leaves[leaf.value].kind in ("temporary", "result")  # type: ignore[index]

    def reduced(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Val | None:
        """The result of a reduction over given dimensions; None for an operation of another kind."""
        if name not in _PLACES or not args or not isinstance(x := args[0], Val) or not x.expr.tensor:
            return None
        places, kwargs = _PLACES[name], dict(kwargs)
        named = [kwargs.pop(k, None) for k in ("dim", "axis", "keepdim")]
        given = [args[place] if len(args) > place else None for place in places]
        chosen = next((d for d in (given[0], *named[:2]) if d is not None), None)
        keep = bool(given[1] if given[1] is not None else named[2])
        rest = args[1 : places[0]]
        if (chosen is None and not keep) or len(args) > places[1] + 1:
            return None
        rank = len(x.shape)
        several = [] if chosen is None else chosen if isinstance(chosen, (list, tuple)) else [chosen]
        dims = {d % rank for d in several} or set(range(rank))
        kept = [d for d in range(rank) if d not in dims]
        shape = tuple(1 if d in dims else size for d, size in enumerate(x.shape) if keep or d not in dims)
        if not kept:
            whole: Val = SHAPED[name](self._builder, x, *rest, **kwargs)
            expr = self._builder.cast(whole.expr, whole.dtype)
            return dataclasses.replace(whole, expr=expr, shape=shape) if shape else whole
        if name == "linalg_norm":
            if len(dims) > 1 and (rest or kwargs.get("ord") is not None):
                return None  # another norm, of matrices
            name = "linalg_vector_norm"
            rest, kwargs = tuple(r for r in rest if r is not None), {k: v for k, v in kwargs.items() if v is not None}
        layout = layout_of(x.shape, kept)
        if layout is None:
            raise Unsupported(name, _ALTERNATE.format("reduces", x.shape), Code.REDUCTION)
        return self._over(name, x, layout, shape, rest, kwargs)

    def _over(
        self, name: str, x: Val, layout: Layout, shape: tuple[int, ...], rest: Sequence[Any], kwargs: dict[str, Any]
    ) -> Val:
        b = self._builder
        count = b.const(layout[0] * layout[2])
        over = _Over(b, self._of(layout), count)
        made: Val = SHAPED[name](over, x, *rest, **kwargs)
        if made.dtype not in DTYPE_NAMES:
            raise Unsupported(name, f"gives {made.dtype}", Code.DTYPE)
        val = Val(b.cast(made.expr, made.dtype), made.dtype, shape)
        return Val(self._leaf(val), made.dtype, shape)

    def _of(self, layout: Layout) -> tuple[Expr, ...]:
        """The four sizes of a layout as constants, shared between equal layouts."""
        if layout not in self._sizes:
            self._sizes[layout] = tuple(self._builder.const(size) for size in layout)
        return self._sizes[layout]

    def _leaf(self, x: Val) -> Expr:
        """A value as a leaf that no kernel of the step's last stage writes: a temporary."""
        e = x.expr
        if e.op == "leaf" and self._is_made(e) and e.dtype == x.dtype:
            return e
        key = id(e), x.dtype
        if key not in self._stored:
            self._stored[key] = self._temporary(x)
        return self._stored[key]


class _Over:
    """A builder whose reductions are over some of the dimensions, for use by the ordinary rows of reductions."""

    def __init__(self, builder: Builder, sizes: tuple[Expr, ...], count: Expr) -> None:
        self._builder = builder
        self._sizes = sizes
        self._count = count

    def __getattr__(self, name: str) -> Callable[..., Expr]:
        made: Callable[..., Expr] = getattr(self._builder, name)
        return made

    def reduce(self, name: str, x: Expr) -> Expr:
        return self._builder.make(f"{name}_over", (x, *self._sizes), None, torch.float64, True)

    def numel(self) -> Expr:
        return self._count


def in_another_shape(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """A view of all elements in the order of their indices."""
    made = recorded(node)
    if not args or not isinstance(args[0], Cell) or not isinstance(made, Tensor):
        return NotImplemented
    val, shape = args[0].read(), tuple(map(int, made.shape))
    if (
        not val.expr.tensor
        or val.opaque
        or made.dtype != val.dtype
        or not shape
        or made.numel() != math.prod(val.shape)
    ):
        return NotImplemented
    if shape == val.shape:
        return args[0]
    return in_shape(node, args[0], shape)
