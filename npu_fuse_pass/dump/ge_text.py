"""05_ge.txt: GE graphs as lists of operations."""

from __future__ import annotations

from .contents import Contents


def listing(contents: Contents) -> str | None:
    """None without GE graphs."""
    return "\n".join(contents.ge_graphs.values()) or None
