"""What a tensor is while a graph is interpreted."""

from __future__ import annotations

from npu_fuse_pass.capture.aten.pointwise import Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.reasons import Code


class Cell:
    """A tensor while the graph is interpreted: its current value, and the leaf it is stored in, if any."""

    __slots__ = ("base", "leaf", "stale", "val")

    def __init__(self, val: Val, leaf: int | None = None, base: tuple[Cell, Val] | None = None) -> None:
        self.val = val
        self.leaf = leaf
        self.base = base  # of a view: the tensor it looks at, and that one's value then
        self.stale = False  # a view of it was written

    def read(self) -> Val:
        """The current value.

        Raises:
            Unsupported: it is a view of something that was written since; writes come after all original operations.
        """
        if self.stale or (self.base is not None and self.base[0].read() is not self.base[1]):
            raise Unsupported("view", "reads through a view what was written in place", Code.VIEW_STALE)
        return self.val
