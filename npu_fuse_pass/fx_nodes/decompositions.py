"""What Dynamo makes of in-place operations, undone for graphs that run as they are."""

from __future__ import annotations

import torch
from torch import fx

from npu_fuse_pass.fx_nodes.effects import recorded

_IN_PLACE = {torch.mul: "addcmul_", torch.div: "addcdiv_"}


def undo_decompositions(gm: fx.GraphModule) -> None:
    """Make `addcmul_` and `addcdiv_` with a value one operation again, as the user wrote them.

    Dynamo 2.13 makes `copy_(x, fma(a * b, value, x))` of them, which is five operations, and rounds otherwise.
    """
    if not hasattr(torch.ops.prims, "fma"):  # Dynamo imports what defines it
        return
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.prims.fma.default)
    for node in found:
        product, value, target = node.args
        copy = node.next
        if (copy.op, copy.target) != ("call_method", "copy_") or copy.args != (target, node):
            continue
        if product is not node.prev or product.target not in _IN_PLACE or len(product.args) != 2 or product.kwargs:
            continue
        tensor = isinstance(value, fx.Node) and not isinstance(recorded(value), (torch.SymFloat, torch.SymInt))
        if tensor or any(len(n.users) != 1 for n in (product, node)):
            continue
        with gm.graph.inserting_before(copy):
            whole = gm.graph.call_method(_IN_PLACE[product.target], (target, *product.args), {"value": value})
        whole.meta = copy.meta
        copy.replace_all_uses_with(whole)
        for n in (copy, node, product):
            gm.graph.erase_node(n)
    if found:
        gm.recompile()
