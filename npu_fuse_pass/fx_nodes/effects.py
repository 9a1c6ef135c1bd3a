"""Whether a node of a graph writes into a tensor that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


class Effects:
    """Answers for the nodes of one graph; equal calls are tried out once."""

    def __init__(self) -> None:
        self._known: dict[object, bool] = {}

    def writes(self, node: fx.Node, name: str) -> bool:
        """Whether a node writes in place; `name` is that of the operation.

        The schema or the name tells, or the call itself (`relu(x, inplace=True)`), on tensors without memory. What
        cannot be tried out counts as writing.
        """
        if isinstance(node.target, torch._ops.OpOverload):
            return bool(node.target._schema.is_mutable)
        if (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None:
            return True
        given: list[Tensor] = []

        def stand_in(n: fx.Node) -> Any:
            value = recorded(n)
            if not isinstance(value, Tensor):
                return value
            given.append(torch.empty([int(s) for s in value.shape], dtype=value.dtype, device="meta"))
            return given[-1]

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), stand_in)
        key = (node.target, repr((args, kwargs)))
        if key not in self._known:
            self._known[key] = _writes(node.target, args, kwargs, given)
        return self._known[key]


def recorded(node: Any) -> Any:
    """What torch's own shape propagation recorded for a node: fake tensors, which alias as the real ones do."""
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else None


def _writes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> bool:
    versions = [t._version for t in given]
    try:
        with torch.no_grad():
            if isinstance(target, str):
                getattr(args[0], target)(*args[1:], **kwargs)
            else:
                target(*args, **kwargs)
    except Exception:  # whatever a function does with tensors that hold nothing
        return True
    return versions != [t._version for t in given]
