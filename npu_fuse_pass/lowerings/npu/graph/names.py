"""Names of GE operations, prefixed with the name of their group: `update_1a2b3c4d/Mul_7`.

A profile of a device shows GE's names; the group's name leads from there to its formula in reports and dumps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import fx
from torch.fx import traceback

_GROUP = "npu_fused_group"


def mark(node: fx.Node, group: str) -> None:
    """Mark a fused node with its group."""
    node.meta[_GROUP] = group


def kept() -> AbstractContextManager[None]:
    """Keep the marks visible to torchair's converters inside the block."""
    return traceback.preserve_node_meta()


def naming(
    converter: Callable[..., list[Any]], group_of: Callable[[str], str] | None = None
) -> Callable[..., list[Any]]:
    """Wrap the converter of a fused node so that its operations are named after the group.

    Args:
        converter: its first argument that is text is a formula.
        group_of: maps a formula to a group's name, for unmarked nodes; None: formulas are not whole groups.
    """
    from torchair.ge._ge_graph import get_default_ge_graph

    @functools.wraps(converter)
    def named(tensors: list[Any], *args: Any, **given: Any) -> list[Any]:
        group = traceback.get_current_meta().get(_GROUP)
        if group is None and group_of is not None:
            group = group_of(next(a for a in args if isinstance(a, str)))
        if group is None:
            return converter(tensors, *args, **given)
        graph = get_default_ge_graph()  # under construction
        plain = graph.next_unique_name
        graph.next_unique_name = lambda name, op: plain(name, f"{group}/{op}")
        try:
            return converter(tensors, *args, **given)
        finally:
            del graph.next_unique_name

    return named
