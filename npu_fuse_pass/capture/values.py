"""Values of tensors while a graph is interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import fx

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import recorded, storage_of
from npu_fuse_pass.ir.expr import DTYPE_NAMES, Expr
from npu_fuse_pass.reasons import Code, Reason

F = TypeVar("F")
STALE = "reads through a view what was written in place"
COUNTERS = (torch.int64, torch.int32)  # integers that expressions compute with, as float64, where they are 0-dim


@dataclasses.dataclass(frozen=True)
class Val:
    """An expression with its dtype and shape in torch. A 0-dim value of the scalar part has shape ().

    `number`: a Python number that the graph is given or computes, not a 0-dim tensor; int64 where it is an int.
    """

    expr: Expr
    dtype: torch.dtype
    shape: tuple[int, ...]
    number: bool = False

    @property
    def dimmed(self) -> bool:
        """True if it decides result dtypes, as tensors with dimensions do in torch's promotion."""
        return self.expr.tensor or self.shape != ()

    @property
    def opaque(self) -> bool:
        """True if only original operations can read it, no expression. Its expression is a leaf."""
        return self.dtype not in DTYPE_NAMES and (self.expr.tensor or self.dtype not in COUNTERS)


@dataclasses.dataclass
class Scalars:
    """0-dim tensors stacked into one vector, which is read and written entry by entry."""

    entries: tuple[Val, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """How a tensor is a view of another one.

    Attributes:
        seen: the base's value that the view's value is of.
        again: gives the view's value from a value of its base; None where that is not known.
        put: gives the base's value from the one that it had, and the view's; None where that is not known.
        reason: what wrote through the view last.
    """

    base: Cell
    seen: Val
    again: Callable[[Val], Val] | None = None
    put: Callable[[Val, Val, Reason], Val] | None = None
    reason: Reason | None = None


class Cell:
    """A tensor while the graph is interpreted: its current value, and the leaf it is stored in, if any.

    A tensor and its views are brought up to date when they are read. At most one of its views is ahead of a tensor.
    """

    __slots__ = ("ahead", "leaf", "val", "view")

    def __init__(self, val: Val, leaf: int | None = None, view: View | None = None) -> None:
        self.val = val
        self.leaf = leaf
        self.view = view
        self.ahead: Cell | None = None  # the view through which it was written since its value was made

    def read(self) -> Val:
        """The current value.

        Raises:
            Unsupported: memory that it shares was written, and it is not known how it looks through this tensor.
        """
        if self.ahead is not None:
            view, val = self.ahead.view, self.ahead.read()
            assert view is not None and view.reason is not None
            self.val = _known(view.put)(self.val, val, view.reason)
            self.ahead.view, self.ahead = dataclasses.replace(view, seen=self.val), None
        elif self.view is not None and self.view.base.ahead is not self:
            now = self.view.base.read()
            if now is not self.view.seen:
                self.val = _known(self.view.again)(now)
                self.view = dataclasses.replace(self.view, seen=now)
        return self.val

    def lineage(self) -> list[Cell]:
        """Itself, what it is a view of, and so on."""
        return [self] if self.view is None else [self, *self.view.base.lineage()]


def in_shape(node: fx.Node, base: Cell, shape: tuple[int, ...]) -> Cell:
    """All elements of a tensor in the order of their indices: a view of it, or a copy, as torch has recorded."""
    whole, val = base.val.shape, dataclasses.replace(base.val, shape=shape)
    memories = [storage_of(recorded(n)) for n in (node, node.args[0])]
    if None in memories:
        return Cell(val, None, View(base, base.val))
    if memories[0] != memories[1]:
        return Cell(val)
    again, put = (lambda v: dataclasses.replace(v, shape=shape)), (lambda _, v, __: dataclasses.replace(v, shape=whole))
    return Cell(val, None, View(base, base.val, again, put))


def _known(function: F | None) -> F:
    if function is None:
        raise Unsupported("view", STALE, Code.VIEW_STALE)
    return function
