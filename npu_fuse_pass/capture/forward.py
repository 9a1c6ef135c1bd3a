"""Forward passes, which Dynamo hands over beside steps (of a closure, of a compiled train function)."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.fx_nodes.names import operation_name


def records(node: fx.Node) -> bool:
    """True if autograd, where enabled, records a node's operation; indexing a list is not one."""
    value = recorded(node)
    picks = node.target is operator.getitem and not isinstance(recorded(node.args[0]), Tensor)
    results = value if isinstance(value, (list, tuple)) else [value]
    return not picks and any(isinstance(x, Tensor) and x.requires_grad for x in results)


def is_forward_pass(graph: fx.Graph) -> bool:
    """True if autograd records an operation of a graph."""
    enabled = torch.is_grad_enabled()
    for node in graph.nodes:
        if operation_name(node) == "_set_grad_enabled":
            enabled = bool(node.args[0])
        elif enabled and node.op.startswith("call_") and records(node):
            return True
    return False
