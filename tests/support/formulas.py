"""Random formulas for property tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from npu_fuse_pass.ir.expr import Builder, Expr
from npu_fuse_pass.ir.text import serialise
from npu_fuse_pass.ir.types import Formula, Slot

SLOTS = (
    *(Slot(tensor=True, dtype=torch.float64) for _ in range(3)),
    *(Slot(tensor=False, dtype=torch.float64) for _ in range(2)),
)
LABELS = ("p", "g", "m", "lr", "c")
# operations that are rounded in one way only
_UNARY = ("neg", "abs", "reciprocal", "sign", "square")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
_COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")
_Tree = Any  # a leaf's number, or (operation, *trees); 0-2 are tensors, 3 and 4 scalars, 5 and 6 are reductions


def _trees(leaves: Sequence[int], unary: Sequence[str], binary: Sequence[str]) -> st.SearchStrategy[_Tree]:
    def larger(inner: st.SearchStrategy[_Tree]) -> st.SearchStrategy[_Tree]:
        condition = st.tuples(st.sampled_from(_COMPARED), inner, inner)
        conditions = condition | st.tuples(st.sampled_from(["and", "or"]), condition, condition)
        return (
            st.tuples(st.sampled_from(unary), inner)
            | st.tuples(st.sampled_from(binary), inner, inner)
            | st.tuples(st.just("fma"), inner, inner, inner)
            | st.tuples(st.just("where"), conditions, inner, inner)
        )

    return st.recursive(st.sampled_from(leaves), larger, max_leaves=12)


def _formulas(exact: bool) -> st.SearchStrategy[Formula]:
    unary = _UNARY if exact else (*_UNARY, "sqrt", "exp")
    binary = _BINARY if exact else (*_BINARY, "pow")
    most = st.sampled_from(["amax", "amin"])
    reductions = [
        st.tuples(most, _trees(leaves, unary, binary))
        | st.tuples(st.just("sum"), st.sampled_from(leaves[:3]) if exact else _trees(leaves, unary, binary))
        for leaves in (range(3), range(6))
    ]
    everything, scalars = _trees(range(7), unary, binary), _trees(range(3, 7), unary, binary)
    parts = {
        "reductions": st.tuples(*reductions),
        "first": everything,
        "second": st.none() | everything,
        "scalar": st.none() | scalars,
        "contribution": st.none() | st.tuples(most if exact else st.just("sum"), _trees(range(6), unary, binary)),
    }
    return st.fixed_dictionaries(parts).map(_formula)


def _built(b: Builder, leaves: list[Expr], tree: _Tree) -> Expr:
    if isinstance(tree, int):
        return leaves[tree]
    args = [_built(b, leaves, t) for t in tree[1:]]
    return b.op("mul", args[0], args[0]) if tree[0] == "square" else b.op(tree[0], *args)


def _formula(parts: dict[str, Any]) -> Formula:
    b = Builder()
    leaves = [b.leaf(i, slot.dtype, slot.tensor) for i, slot in enumerate(SLOTS)]
    for name, tree in parts["reductions"]:
        leaves.append(b.reduce(name, _built(b, leaves, tree)))
    targets = {"first": 0, "second": 2, "scalar": 4}
    writes = [(slot, _built(b, leaves, parts[k])) for k, slot in targets.items() if parts[k] is not None]
    contributions = []
    if parts["contribution"] is not None:
        name, tree = parts["contribution"]
        contributions.append(b.reduce(name, _built(b, leaves, tree)))
    return Formula(SLOTS, tuple(writes), tuple(contributions), serialise(SLOTS, writes, contributions))


# One or two writes of tensors, perhaps one of a scalar, perhaps a contribution to a total; equal parts are one node.
FORMULAS = _formulas(exact=False)
# Of operations that have one right result only; sums of whole inputs only.
EXACT_FORMULAS = _formulas(exact=True)
