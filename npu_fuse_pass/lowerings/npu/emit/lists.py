"""Members as GE's Foreach operations, a chunk of them at a time: the interface of `elementwise.Emitter`.

An expression that no list operation computes (`list_operations`) is an elementwise operation for each member.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.npu.emit import elementwise, list_operations
from npu_fuse_pass.lowerings.npu.emit.list_operations import COMMUTING, LISTS, ListOperation


def usable(formula: Formula) -> bool:
    """True if a formula is in float32 only and a list operation computes a part of it."""
    if {slot.dtype for slot in formula.slots if slot.tensor} != {torch.float32}:
        return False
    return any(_row(formula, e, ["s"] * len(e.args)) for e in postorder([e for _, e in formula.writes]))


def cost(formula: Formula, members: int, shared: Collection[int]) -> tuple[int, int]:
    """GE operations for a chunk of members, and bytes per element.

    `shared` are the scalar slots that have one number for all members of the chunk.
    """
    kinds: dict[int, str] = {}
    operations = size = 0
    for e in postorder([e for _, e in formula.writes]):
        below = [kinds[id(a)] for a in e.args]
        own = e.value in shared if e.op == "leaf" else "n" not in below
        apart = members > 1 and (e.op in REDUCTIONS or not own)
        kinds[id(e)] = "t" if e.tensor else "n" if apart else "s"
        found = _row(formula, e, below)
        if found is None:
            launches, moved = elementwise.cost_of(formula, e)
            operations, size = operations + launches * members, size + moved
            continue
        operations += 1
        size += 4 + 4 * sum(a.tensor for a in e.args)
    for launches, moved in elementwise.copies(formula):
        operations, size = operations + launches * members, size + moved
    return operations, size


def _row(formula: Formula, e: Expr, kinds: Sequence[str]) -> tuple[ListOperation, list[int]] | None:
    """The list operation for an expression, and the order of its operands; None if there is none."""
    if not e.tensor or elementwise.stored(formula, e) != torch.float32 or any(a.op == "zero" for a in e.args):
        return None
    order = list(range(len(e.args)))
    known = ["t" if a.tensor else kinds[i] for i, a in enumerate(e.args)]
    if e.op in COMMUTING:
        order[:2] = sorted(order[:2], key=lambda i: known[i] != "t")
    row = LISTS.get((e.op, "".join(known[i] for i in order)))
    return None if row is None else (row, order)


class Emitter(elementwise.Emitter):
    """Emits the writes of a formula for chunks of members. Tensors have one dimension, numbers the shape (1,)."""

    _keep_dims = True

    def __init__(
        self, ge: Any, ge_dtype: Callable[[torch.dtype], int], formula: Formula, operation: Callable[..., Any]
    ) -> None:
        super().__init__(ge, ge_dtype, formula)
        self._operation = operation

    def members(self, slots: Sequence[Mapping[int, Any]], shapes: Sequence[list[int]]) -> list[list[Any]]:
        """The results of `member` for each member."""
        size = list_operations.LONGEST
        chunks = [slice(begin, begin + size) for begin in range(0, len(slots), size)]
        return [row for chunk in chunks for row in self._chunk(slots[chunk], shapes[chunk])]

    def _chunk(self, slots: Sequence[Mapping[int, Any]], shapes: Sequence[list[int]]) -> list[list[Any]]:
        values: list[dict[int, Any]] = [{} for _ in slots]
        for e in self.order:
            operands = [[v[id(a)] for v in values] for a in e.args]
            kinds = ["n" if len({x.tensor for x in given}) > 1 else "s" for given in operands]
            row = _row(self._formula, e, kinds)
            if row is not None:
                found = self._emit_list(*row, operands, [a.tensor for a in e.args])
            else:
                given = zip(slots, shapes, strict=True)
                found = [self.value(e, [o[m] for o in operands], *at) for m, at in enumerate(given)]
            for v, x in zip(values, found, strict=True):
                v[id(e)] = x
        return [self.results(v, shape) for v, shape in zip(values, shapes, strict=True)]

    def _emit_list(
        self, row: ListOperation, order: list[int], operands: list[list[Any]], tensors: list[bool]
    ) -> list[Any]:
        inputs: dict[str, Any] = {}
        for name, what in row.inputs.items():
            if isinstance(what, str):
                inputs[name] = self._one()
            else:
                given = operands[order[what]]
                inputs[name] = given if tensors[order[what]] else given[0]
        found: list[Any] = self._operation(row.name, inputs=inputs, outputs=[("y", len(operands[0]))])
        return found

    def _one(self) -> Any:
        return self.once(("one",), lambda: self._ge.Const([1.0], self._ge_dtype(torch.float32)))
