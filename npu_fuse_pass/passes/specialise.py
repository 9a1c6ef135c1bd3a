"""The stage before group, on platforms that gain from it: tests of numbers against 0 are decided before lowering.

A rule treats 0 as a special case with `where(weight_decay == 0, grad, grad + weight_decay * param)`. In a program for
every weight decay both branches are computed for all elements; with the outcome known, one is left. So a program is
made for one outcome of these tests. Only another outcome needs another program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from npu_fuse_pass.ir.expr import Builder, Expr, postorder
from npu_fuse_pass.ir.types import Captured, Decided, Leaf, Update


def decide(captured: Captured, number: Callable[[Leaf], Tensor | None]) -> Captured:
    """A captured step whose tests of numbers against 0 are replaced by the branches that they choose.

    A test is decided where all members share its number, the step does not write it, and it is in the host's memory.

    Args:
        captured: the step.
        number: the value of a leaf; None where it is not known.
    """
    decided: dict[int, Decided] = {}
    updates = [_decide(update, captured.leaves, number, decided) for update in captured.updates]
    return dataclasses.replace(captured, updates=updates, decided=tuple(decided.values()))


def _decide(
    update: Update, leaves: Sequence[Leaf], number: Callable[[Leaf], Tensor | None], decided: dict[int, Decided]
) -> Update:
    order = postorder([e for _, e in (*update.writes, *update.contributions)])
    written = {position for position, _ in update.writes}
    zero: dict[int, bool] = {}
    for position in {p for e in order if (p := _tested(e)) is not None} - written:
        leaf, *others = {member[position] for member in update.members}
        value = None if others else number(leaves[leaf])
        if value is not None and value.device.type == "cpu":
            zero[position] = value.item() == 0
            decided[leaf] = Decided(leaves[leaf], update.labels[position], zero[position])
    if not zero:
        return update
    made = _branches(order, zero)
    return dataclasses.replace(
        update,
        writes=[(position, made[id(e)]) for position, e in update.writes],
        contributions=[(number, made[id(e)]) for number, e in update.contributions],
    )


def _tested(e: Expr) -> int | None:
    """The position of the number that a `where` tests against 0."""
    if e.op != "where" or e.args[0].op not in ("eq", "ne") or e.args[0].tensor:
        return None
    number, other = sorted(e.args[0].args, key=lambda a: a.op != "leaf")
    zero = other.op in ("const", "zero") and other.value == 0
    return number.value if number.op == "leaf" and zero and isinstance(number.value, int) else None


def _branches(order: Sequence[Expr], zero: dict[int, bool]) -> dict[int, Expr]:
    """Every expression without the tests of these positions, by `id`."""
    builder, made = Builder(), dict[int, Expr]()
    for e in order:
        position = _tested(e)
        if position in zero:
            branch = e.args[1] if zero[position] == (e.args[0].op == "eq") else e.args[2]
            if branch.tensor == e.tensor:  # one number for all elements would have to be spread over them
                made[id(e)] = made[id(branch)]
                continue
        args = tuple(made[id(a)] for a in e.args)
        made[id(e)] = e if e.op == "const" else builder.make(e.op, args, e.value, e.dtype, e.tensor)
    return made
