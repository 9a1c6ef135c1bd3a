"""Plans: the members of a group that the graph updates as one, and what that costs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Span:
    """Members that the graph updates as one, in memory order.

    The tensors in `gathered` slots lie apart: each is a separate input, and the graph concatenates them.
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
        """The layout in the report: "flat", "gathered" (flat except gradients), "list", or several of these."""
        kinds = {("gathered" if span.gathered else "flat") if len(span.members) > 1 else "list" for span in self.spans}
        return " + ".join(k for k in ("flat", "gathered", "list") if k in kinds) or "list"


@dataclasses.dataclass
class LayoutCost:
    """The layout of a group and its cost; fields as in `report.GroupReport`."""

    name: str
    reason: str
    launches: int
    bytes_per_element: int
