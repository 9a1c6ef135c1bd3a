"""A matched group as one dedicated GE operation per member: the choice, its operands, and its emission.

`choose` decides for a group; `dedicated_operations` has the table and the reasons. The operands are expressions over
the group's slots: numbers are computed on the host in float64 and packed as all others, inputs that have to be computed
first (grad + weight_decay·param) are elementwise operations ahead of the dedicated one. Everything is float32 on the
device; tensors of another dtype are cast before and after.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import HALF, Builder, Expr, postorder
from npu_fuse_pass.ir.fused_op import member_values
from npu_fuse_pass.ir.types import Formula, Group
from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.emit.dedicated_operations import OPERATIONS, Operation, candidates, series
from npu_fuse_pass.lowerings.npu.emit.split import Split, split_operands
from npu_fuse_pass.match.result import Match, NoMatch

_BY_NAME = {o.name: o for o in OPERATIONS}


@dataclasses.dataclass(frozen=True, eq=False)
class Dedicated:
    """A group's dedicated operation.

    Attributes:
        operation: the row of the table.
        split: the host's part, and the operands in the order of the operation's inputs.
        written: the slots of `split.device` that it writes, in the order of its outputs.
        call: the operation's name and the attributes that are set, as in `Emitter`.
        cost: GE operations on tensors per member, and bytes that they read and write per element.
        note: for the report.
    """

    operation: Operation
    split: Split
    written: tuple[int, ...]
    call: str
    cost: tuple[int, int]
    note: str


def choose(
    group: Group, found: Match | NoMatch | None, totals: Collection[int], chip: str, kernels: str
) -> Dedicated | str:
    """Choose the dedicated operation of a group. Returns it, or why the group is emitted elementwise.

    Args:
        group: the group.
        found: the kernel that computes it.
        totals: scalar slots whose values exist on the device only.
        chip: the chip's name.
        kernels: the option, "auto", "dedicated" or "elementwise".
    """
    if kernels == "elementwise":
        return 'kernels="elementwise"'
    if not isinstance(found, Match):
        return f"no dedicated operation: {'not asked for' if found is None else found.reason}"
    stored = {slot.dtype for slot in group.formula.slots if slot.tensor}
    if torch.float64 in stored:
        return "dedicated operations have no float64"
    if any(_rounds(e, group.formula.slots[slot].dtype) for slot, e in group.formula.writes):
        return "the step rounds to half precision ahead of what it writes; dedicated operations compute in float32"
    read = {e.value for e in postorder([e for _, e in group.formula.writes]) if e.op == "leaf"}
    if not read.issuperset(found.outputs.values()):
        return "the step overwrites a tensor that it does not read; times 0, as an operation has it, NaN would stay"
    if series(chip) is None:
        return f"no document used here names this chip, {chip or 'which torch_npu cannot tell'}"
    operations = candidates(found.kernel.name, kernels)
    if isinstance(operations, str):
        return operations
    try:
        made = [_dedicate(group.formula, found, o, totals) for o in operations]
    except Unsupported as e:
        return f"{operations[0].name}: {e.reason.text}"
    return min(made, key=lambda d: d.cost)


def _rounds(e: Expr, written: torch.dtype) -> bool:
    """True if a value is made of one that was rounded to half precision, other than that in which it is written."""
    return any(x.op == "cast" and x.tensor and x.dtype in HALF and x.dtype != written for x in postorder([e]))


def _dedicate(formula: Formula, found: Match, operation: Operation, totals: Collection[int]) -> Dedicated:
    """Raises:
    Unsupported: what has to be computed first has no GE operation.
    """
    operands, constants = _operands(found, operation)
    results = [found.outputs[name] for name in operation.outputs]
    made = split_operands(formula, operands, results, constants, totals)
    elementwise.check(made.device)
    ahead, size = elementwise.cost(made.device)
    size += sum(4 for e in operands if e.tensor) + 4 * len(results)
    casts = [s for s in results if formula.slots[s].dtype != torch.float32]
    size += sum(4 + formula.slots[s].dtype.itemsize for s in casts)
    call = " ".join([operation.name, *operation.attributes.get(found.kernel.name, ())])
    within = f"{operation.name}, within {found.tolerance:g}"
    note = f"{within} except that {operation.deviation}" if operation.deviation else within
    place = {slot: i for i, slot in enumerate(made.tensor_slots)}
    written = tuple(place[s] for s in results)
    return Dedicated(operation, made, written, call, (ahead + 1 + len(casts), size), note)


def _operands(found: Match, operation: Operation) -> tuple[list[Expr], dict[int, float]]:
    """The operation's inputs over the slots of the match, behind them one for the number 1."""
    builder = Builder()
    one = len(found.slots)
    constants = {**found.constants, one: 1.0}
    given = dict(found.inputs)
    grad = given["grad"]
    if operation.scales and grad.op == "mul" and not grad.args[0].tensor:
        given["grad_scale"], given["grad"] = grad.args
    given = {name: builder.cast(e, torch.float32) if e.tensor else e for name, e in given.items()}
    given |= {n: e for n, e in found.scalars.items() if constants.get(_leaf(e)) != 0.0 or n != "weight_decay"}
    terms = {name: _Term(builder, e) for name, e in given.items()}
    arguments = operation.arguments[found.kernel.name](terms, _Term(builder, builder.leaf(one, torch.float64, False)))
    return [arguments[name].expr for name in operation.inputs], constants


def _leaf(e: Expr) -> int:
    return e.value if e.op == "leaf" and isinstance(e.value, int) else -1


class _Term:
    """An expression with Python's arithmetic operators."""

    def __init__(self, builder: Builder, expr: Expr) -> None:
        self._builder = builder
        self.expr = expr

    def _op(self, name: str, *others: _Term) -> _Term:
        return _Term(self._builder, self._builder.op(name, self.expr, *(o.expr for o in others)))

    __add__ = functools.partialmethod(_op, "add")
    __sub__ = functools.partialmethod(_op, "sub")
    __mul__ = functools.partialmethod(_op, "mul")
    __truediv__ = functools.partialmethod(_op, "div")
    sqrt = functools.partialmethod(_op, "sqrt")


class Emitter(elementwise.Emitter):
    """Emits a dedicated operation for one member after another, behind its operands.

    `formula`: the operands are its contributions. `call`: the operation's name and the attributes that are set.
    `written`: the slots that it writes.
    """

    def __init__(
        self, ge: Any, ge_dtype: Callable[[torch.dtype], int], formula: Formula, call: str, written: Sequence[int]
    ) -> None:
        super().__init__(ge, ge_dtype, formula, torch.float32)
        self._operation, self._attributes = _called(call)
        self._dtypes = [formula.slots[s].dtype for s in written]

    def member(self, slots: Mapping[int, Any], shape: list[int]) -> list[Any]:
        """New values of the written slots. `slots` are GE's tensors, those of scalar slots of shape (1,)."""
        inputs = dict(zip(self._operation.inputs, super().member(slots, shape), strict=True))
        absent = dict.fromkeys(self._operation.absent)
        results = getattr(self._ge, self._operation.name)(**inputs, **absent, **self._attributes)
        return [
            r if dtype == torch.float32 else self._ge.Cast(r, dst_type=self._ge_dtype(dtype))
            for r, dtype in zip(results, self._dtypes, strict=True)
        ]


def evaluate(
    formula: Formula, call: str, written: Sequence[int], tensors: Sequence[Tensor], scalars: Sequence[Tensor]
) -> list[Tensor]:
    """Compute the operation for one member with torch: for torchair's `run_eagerly`."""
    operation, attributes = _called(call)
    values = member_values(formula, tensors, scalars)
    results = operation.function(*(values[id(e)].float() for e in formula.contributions), **attributes)
    return [r.to(formula.slots[s].dtype) for r, s in zip(results, written, strict=True)]


def _called(call: str) -> tuple[Operation, dict[str, bool]]:
    name, *attributes = call.split()
    return _BY_NAME[name], dict.fromkeys(attributes, True)
