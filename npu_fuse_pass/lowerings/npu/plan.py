"""Which members of a group the graph updates as one."""

from __future__ import annotations

import dataclasses

from torch import Tensor

Values = list[Tensor | None]


@dataclasses.dataclass(frozen=True)
class Span:
    """Members that the graph updates as one, in the order in which they lie in memory.

    The tensors in `gathered` slots lie apart: each is an input of its own, and the graph concatenates them.
    """

    members: tuple[int, ...]
    gathered: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The spans of a group, and why some members stay alone ("" if none do)."""

    spans: tuple[Span, ...]
    reason: str = ""

    @property
    def name(self) -> str:
        """How the report calls it: "flat", "gathered" (flat, but for the gradients), "list", or several of them."""
        kinds = {("gathered" if span.gathered else "flat") if len(span.members) > 1 else "list" for span in self.spans}
        return " + ".join(k for k in ("flat", "gathered", "list") if k in kinds) or "list"
