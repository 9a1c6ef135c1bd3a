"""Values of tensors while a graph is interpreted."""

from __future__ import annotations

import dataclasses

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import DTYPE_NAMES, Expr
from npu_fuse_pass.reasons import Code

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


class Cell:
    """A tensor while the graph is interpreted: its current value, and the leaf it is stored in, if any."""

    __slots__ = ("base", "leaf", "stale", "val")

    def __init__(self, val: Val, leaf: int | None = None, base: tuple[Cell, Val] | None = None) -> None:
        self.val = val
        self.leaf = leaf
        self.base = base  # of a view: its base, and the base's value then
        self.stale = False  # a view of it was written

    def read(self) -> Val:
        """The current value.

        Raises:
            Unsupported: it is a view whose base was written since; writes come after all original operations.
        """
        if self.stale or (self.base is not None and self.base[0].read() is not self.base[1]):
            raise Unsupported("view", "reads through a view what was written in place", Code.VIEW_STALE)
        return self.val
