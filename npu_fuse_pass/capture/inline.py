"""Expansion of `rule_update` nodes: the step of a rule optimizer inside a larger captured graph.

The rule is traced once per kind of parameter, as for a step by itself, and its expressions are put over what the graph
has computed so far: a gradient that was clipped before, a parameter that is averaged afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import fx

from npu_fuse_pass.capture.interpreter import Interpreter
from npu_fuse_pass.capture.rule import capture_batches
from npu_fuse_pass.capture.values import Cell, Val
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Expanded, Leaf, Update
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.rules.batch import inputs_of


def expand_rule(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Interpret `rule_update(params, grads, found_inf, optimizer)`: new values of parameters, gradients and states.

    Raises:
        Unsupported: the rule, or what the graph holds in its place, cannot be expressed.
    """
    params, grads, found_inf, handle = args
    if any(leaf.optimizer == handle for leaf in interpreter.leaves):  # states of the first step would be read again
        raise Unsupported("step", "one optimizer steps more than once in this function", Code.STEPS_TWICE)
    optimizer = core_op.optimizer_of(handle)
    batches = optimizer._prelude.batches
    if any(batch.is_dtensors for batch in batches):
        raise Unsupported("rule_update", "the parameters are DTensors; compile the step by itself", Code.NO_MEMORY)
    if any(batch.rounding.names for batch in batches):
        words = "rounds stochastically, which a step by itself can do in a kernel"
        raise Unsupported("rule_update", words, Code.OPERATION, "compile opt.step by itself")
    own = optimizer._surface.present()
    if len(own) != len(params):
        raise Unsupported(
            "rule_update", "other parameters have gradients than when the graph was captured", Code.GRADIENTS
        )
    given = [*own, *(p.grad for p in own)]
    cells = {id(t): cell for t, cell in zip(given, [*params, *grads], strict=True)}
    captured = capture_batches(batches)
    if captured.unfused:
        raise Unsupported.of(captured.unfused[0])
    interpreter.moved += captured.moved
    # by leaf; None: a gradient that is missing. What the graph does not hold becomes a leaf that the optimizer fills
    inputs = inputs_of(batches)
    found = {i: None if t is None else cells[id(t)] for i, t in enumerate(inputs) if t is None or id(t) in cells}
    expansion = _Expansion(interpreter, handle, captured.leaves, found)
    updates = [expansion.present(update) for update in captured.updates]
    expansion.run(updates, found_inf)
    at = {id(t): divmod(i, len(own)) for i, t in enumerate(given)}
    places = {i: at[id(t)] for i, t in enumerate(inputs) if id(t) in at}
    interpreter.expanded[node.name] = Expanded(tuple(updates), places, expansion.kept)


class _Expansion:
    """The updates of one optimizer, applied to the cells of a graph."""

    def __init__(
        self, interpreter: Interpreter, handle: str, leaves: Sequence[Leaf], cells: dict[int, Cell | None]
    ) -> None:
        self._interpreter = interpreter
        self._b = interpreter.builder
        self._handle = handle
        self._leaves = leaves
        self._cells = cells
        self.kept: dict[int, int] = {}  # leaves that the optimizer fills, as leaves of the graph

    def present(self, update: Update) -> Update:
        """An update without the members that have no gradient."""
        missing = {leaf for leaf, cell in self._cells.items() if cell is None}
        return dataclasses.replace(update, members=[m for m in update.members if missing.isdisjoint(m)])

    def run(self, updates: Sequence[Update], found_inf: Cell | None) -> None:
        """Interpret all members of all updates; totals first, because every member may read them."""
        members = [(update, member) for update in updates for member in update.members]
        sums: dict[int, list[Expr]] = {}
        for update, member in members:
            made = self._rebuilt([e for _, e in update.contributions], member, {})
            for (number, _), e in zip(update.contributions, made, strict=True):
                sums.setdefault(number, []).append(e)
        totals = {n: functools.reduce(functools.partial(self._b.op, "add"), parts) for n, parts in sums.items()}
        keep = None if found_inf is None else self._b.op("ne", found_inf.read().expr, self._b.const(0))
        written = []
        for update, member in members:
            made = self._rebuilt([e for _, e in update.writes], member, totals)
            written += [(member[position], e) for (position, _), e in zip(update.writes, made, strict=True)]
        for leaf, e in written:  # all are computed from what was there before the step
            self._write(leaf, e, keep)

    def _cell(self, leaf: int) -> Cell | None:
        """The cell of a leaf; states, counters and numbers become leaves of the graph that the optimizer fills."""
        if leaf not in self._cells:
            own = dataclasses.replace(self._leaves[leaf], index=leaf, optimizer=self._handle)
            self.kept[leaf] = len(self._interpreter.leaves)
            self._cells[leaf] = self._interpreter.add_leaf(own, tensor=bool(own.shape))
        return self._cells[leaf]

    def _write(self, leaf: int, new: Expr, keep: Expr | None) -> None:
        cell = self._cell(leaf)
        assert cell is not None
        val = cell.read()
        if keep is not None:
            new = self._b.op("where", keep, val.expr, new)
        self._interpreter.overwrite(cell, "rule_update", Cell(Val(new, val.dtype, val.shape)))

    def _rebuilt(self, roots: Sequence[Expr], member: tuple[int, ...], totals: dict[int, Expr]) -> list[Expr]:
        """Expressions over positions of a member as expressions over the graph's cells."""
        made: dict[int, Expr] = {}
        for e in postorder(roots):
            if e.op == "leaf":
                made[id(e)] = self._read(e, member)
            elif e.op == "total":
                made[id(e)] = totals[e.value]  # type: ignore[index]
            else:
                args = tuple(made[id(a)] for a in e.args)
                scalar = e.tensor or e.op in REDUCTIONS
                scalar = scalar and not any(a.tensor for a in args)  # of a 0-dim parameter
                made[id(e)] = self._of_scalars(e, args) if scalar else self._b.again(e, made)
        return [made[id(e)] for e in roots]

    def _of_scalars(self, e: Expr, args: tuple[Expr, ...]) -> Expr:
        """An operation of a rule on 0-dim tensors, which graphs hold as float64 scalars; they round when stored."""
        return args[0] if e.op == "cast" or e.op in REDUCTIONS else self._b.op(e.op, *args)

    def _read(self, e: Expr, member: tuple[int, ...]) -> Expr:
        assert isinstance(e.value, int)
        cell = self._cell(member[e.value])
        assert cell is not None
        expr = cell.read().expr
        if cell.val.shape and (expr.tensor != e.tensor or expr.dtype != e.dtype):
            raise Unsupported("rule_update", "a gradient that the graph computed as one constant", Code.CONSTANT)
        return expr
