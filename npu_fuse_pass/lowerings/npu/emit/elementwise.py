"""GE operations for a device formula: its expressions, one after another, as elementwise operations.

Every operation type that is emitted stands in `DOCUMENTS`. Operands of one GE operation have one dtype, so casts
are written out. What the formula holds in float64 (norms, sums) is float32 here unless a tensor of the group is
float64: the NPU's vector unit has no float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.npu.emit import list_operations
from npu_fuse_pass.lowerings.npu.emit.dedicated_operations import OPERATIONS
from npu_fuse_pass.reasons import Code

# IR operation -> GE operation with the same operands in the same order
_DIRECT = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "RealDiv", "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt",
    "rsqrt": "Rsqrt", "reciprocal": "Reciprocal", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos",
    "tan": "Tan", "tanh": "Tanh", "erf": "Erf", "floor": "Floor", "ceil": "Ceil", "trunc": "Trunc",
    "round": "Rint", "sign": "Sign", "maximum": "Maximum", "minimum": "Minimum", "pow": "Pow", "lerp": "Lerp",
    "where": "SelectV2", "lt": "Less", "le": "LessEqual", "gt": "Greater", "ge": "GreaterEqual", "eq": "Equal",
    "ne": "NotEqual", "isnan": "IsNan", "isinf": "IsInf", "isfinite": "IsFinite", "and": "LogicalAnd",
    "or": "LogicalOr", "not": "LogicalNot",
}  # fmt: skip
_REDUCE = {"sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
_ARRANGING = ("Cast", "BroadcastTo", "ConcatV2", "Fill", "Pack", "Reshape", "Unpack")
_OTHER = ("leaf", "cast", "fma", "zero")

DOCUMENTS: dict[str, str] = {
    "Data": "a graph's input",
    "Const": "a constant of the graph",
    "NetOutput": "a graph's output",
    **{
        name: f"CANN operator specifications, {name}"
        for name in sorted({*_DIRECT.values(), *_REDUCE.values(), *_ARRANGING})
    },
    **{o.name: o.document for o in OPERATIONS},
    **list_operations.DOCUMENTS,
}
"""The whitelist: GE operation type -> the document that defines it. Nothing else may appear in a graph."""


def check(formula: Formula) -> None:
    """Check that there is a GE operation for everything in a device formula.

    Raises:
        Unsupported: the first operation that has none.
    """
    for e in postorder(formula.roots):
        if e.op not in _DIRECT and e.op not in _REDUCE and e.op not in _OTHER:
            raise Unsupported(e.op, "has no GE operation in the whitelist", Code.GE_OPERATION)
        if e.op == "trunc" and e.tensor and stored(formula, e) == torch.float64:
            raise Unsupported(e.op, "GE's Trunc has no float64", Code.GE_OPERATION)


def wide_dtype(formula: Formula) -> torch.dtype:
    """The device's dtype for float64 in a formula: float64 only if a tensor has it, else float32."""
    has_double = any(slot.tensor and slot.dtype == torch.float64 for slot in formula.slots)
    return torch.float64 if has_double else torch.float32


def cost(formula: Formula) -> tuple[int, int]:
    """GE operations on tensors per member, and the bytes that they read and write per element."""
    costs = [*(cost_of(formula, e) for e in postorder(formula.roots)), *copies(formula)]
    return sum(operations for operations, _ in costs), sum(size for _, size in costs)


def copies(formula: Formula) -> list[tuple[int, int]]:
    """The cost of each write of a value that is no result of its own, as in `cost_of`; see `Emitter.results`."""
    found: list[tuple[int, int]] = []
    taken = {id(e) for e in postorder(formula.roots) if e.op == "leaf"}
    for slot, e in formula.writes:
        size = formula.slots[slot].dtype.itemsize
        while e.op == "cast" and stored(formula, e) == stored(formula, e.args[0]):
            (e,) = e.args
        if formula.slots[slot].tensor and (id(e) in taken or not e.tensor):
            found.append((1, size + size * e.tensor))
        taken.add(id(e))
    return found


def cost_of(formula: Formula, e: Expr) -> tuple[int, int]:
    """The cost of one expression, as in `cost`."""
    tensors = [a for a in (*e.args, e) if a.tensor]
    same = e.op == "cast" and stored(formula, e) == stored(formula, e.args[0])
    if e.op == "leaf" or same or not tensors:
        return 0, 0
    size = sum(stored(formula, a).itemsize for a in tensors)
    if e.op == "fma":
        return 2, size + 2 * stored(formula, e).itemsize  # the product in between
    return 1, size


def stored(formula: Formula, e: Expr) -> torch.dtype:
    """The dtype that an expression has on the device."""
    return wide_dtype(formula) if e.dtype == torch.float64 else e.dtype


class Emitter:
    """Emits the writes of a formula and its contributions for one member after another.

    Numbers that members share are computed once. `ge` is torchair's module of GE operations and `ge_dtype` gives
    GE's number of a dtype. `number_dtype` is that of numbers on the device: `wide_dtype` for a device formula (None),
    float64 for a whole one.
    """

    _keep_dims = False  # whether reductions give tensors with one element, not with no dimension

    def __init__(
        self, ge: Any, ge_dtype: Callable[[torch.dtype], int], formula: Formula, number_dtype: torch.dtype | None = None
    ) -> None:
        self._ge = ge
        self._ge_dtype = ge_dtype
        self._formula = formula
        self._wide = wide_dtype(formula)
        self._number_dtype = number_dtype or self._wide
        self.order = postorder(formula.roots)
        self._numbers: dict[tuple[object, ...], Any] = {}

    def members(self, slots: Sequence[Mapping[int, Any]], shapes: Sequence[list[int]]) -> list[list[Any]]:
        """The results of `member` for each member."""
        return [self.member(*given) for given in zip(slots, shapes, strict=True)]

    def member(self, slots: Mapping[int, Any], shape: list[int]) -> list[Any]:
        """New values of the written slots, then the contributions.

        `slots` are GE's tensors, those of scalar slots 0-dim; `shape` is that of the member's tensors.
        """
        values: dict[int, Any] = {}
        for e in self.order:
            values[id(e)] = self.value(e, [values[id(a)] for a in e.args], slots, shape)
        return self.results(values, shape)

    def value(self, e: Expr, args: list[Any], slots: Mapping[int, Any], shape: list[int]) -> Any:
        """Emit one expression of a member from its arguments."""
        if e.op == "leaf":
            return self._cast(slots[e.value], slots[e.value].dtype, self._dtype(e))  # type: ignore[index]
        if e.tensor or e.op in REDUCTIONS:
            return self._emit(e, args, shape)
        return self.once((e.op, e.dtype, *(a.tensor for a in args)), lambda: self._emit(e, args, shape))

    def once(self, key: tuple[object, ...], emit: Callable[[], Any]) -> Any:
        """Emit a value that members share, once per key."""
        if key not in self._numbers:
            self._numbers[key] = emit()
        return self._numbers[key]

    def results(self, values: Mapping[int, Any], shape: list[int]) -> list[Any]:
        """The results of a member, picked from all values by `id`; what is written to tensors are GE's tensors apart.

        torchair knows by its name where a tensor is written, so that of two targets of one only the last is written.
        """
        results = []
        taken = {values[id(e)].tensor for e in self.order if e.op == "leaf"}
        for slot, e in self._formula.writes:
            value = values[id(e)]
            if self._formula.slots[slot].tensor and (value.tensor in taken or not e.tensor):
                value = self._ge.BroadcastTo(value, shape)
            taken.add(value.tensor)
            results.append(value)
        return results + [values[id(e)] for e in self._formula.contributions]

    def _dtype(self, e: Expr) -> torch.dtype:
        if e.dtype != torch.float64:
            return e.dtype
        return self._wide if e.tensor else self._number_dtype

    def _axes(self, rank: int) -> Any:
        return self.once(("axes", rank), lambda: self._ge.Const(list(range(rank)), self._ge_dtype(torch.int64)))

    def _cast(self, value: Any, have: int, want: torch.dtype) -> Any:
        wanted = self._ge_dtype(want)
        return value if have == wanted else self._ge.Cast(value, dst_type=wanted)

    def _emit(self, e: Expr, args: list[Any], shape: list[int]) -> Any:
        ge = self._ge
        if e.op == "cast":
            return self._cast(args[0], self._ge_dtype(self._dtype(e.args[0])), self._dtype(e))
        if e.op == "zero":
            return ge.Const(0.0, self._ge_dtype(self._dtype(e)))
        if e.op == "lerp" and self._dtype(e) == torch.float64:  # which GE's Lerp does not take
            return ge.Add(ge.Mul(args[2], ge.Sub(args[1], args[0])), args[0])
        if e.op == "fma":
            return ge.Add(ge.Mul(args[0], args[1]), args[2])
        if e.op in REDUCTIONS:
            reduced = args[0]
            if shape:
                reduced = getattr(ge, _REDUCE[e.op])(args[0], self._axes(len(shape)), keep_dims=self._keep_dims)
            return self._cast(reduced, self._ge_dtype(self._dtype(e.args[0])), self._dtype(e))
        return getattr(ge, _DIRECT[e.op])(*args)
