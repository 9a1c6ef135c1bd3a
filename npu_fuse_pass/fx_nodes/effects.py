"""Whether a node of a graph writes into a tensor that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.fx_nodes.names import operation_name


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


def writes_leaves(graph: fx.Graph, of_parameters: bool = False) -> bool:
    """Whether in-place operations write floating-point arguments or attributes of a graph, also through views.

    What a model's layers write by themselves (batch norm its averages, `relu(x, inplace=True)`) is no update. Counters
    are none without something that they count.

    Args:
        of_parameters: only what autograd tracks counts.
    """
    own = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    storages = {key for n in own if (key := storage_of(recorded(n))) is not None}
    for node in graph.nodes:
        if node.op.startswith("call_"):
            for target in _written(node):
                value = recorded(target)
                if value is None and target in own:
                    return True  # nobody knows what it is
                if isinstance(value, Tensor) and (target in own or storage_of(value) in storages):
                    counts = value.is_floating_point() or value.is_complex()
                    if counts and (value.requires_grad or not of_parameters):
                        return True
    return False


def _written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an in-place operation writes."""
    name = operation_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = [*zip(arguments, node.args, strict=False), *((a, node.kwargs.get(a.name)) for a in arguments)]
        written: list[Any] = [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]
    else:
        in_place = name.endswith("_") and not name.endswith("__")
        written = [*(node.args[:1] if in_place else ()), node.kwargs.get("out")]
    found: list[fx.Node] = []
    fx.node.map_arg(written, found.append)
    return found


def storage_of(fake: Any) -> int | None:
    """What tensors that share memory have in common."""
    return fake.untyped_storage()._cdata if isinstance(fake, Tensor) else None


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
