"""The types that the stages hand to each other: expressions, updates, formulas, groups.

An expression is a node of a DAG over one parameter's update. A *tensor* expression has one value per element, a
*scalar* expression (0-dim) one per member, in float64. Writes to leaves are the roots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from .errors import Unsupported

Value = int | float | bool | torch.dtype | None

DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.bool: "bool",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
HALF = (torch.float16, torch.bfloat16)
REDUCTIONS = ("sum", "amax", "amin")


class Expr:
    """One node. `value` is the leaf's position (op "leaf"), the total's number ("total") or the constant ("const")."""

    __slots__ = ("args", "dtype", "op", "tensor", "value")

    def __init__(self, op: str, args: tuple[Expr, ...], value: Value, dtype: torch.dtype, tensor: bool) -> None:
        self.op = op
        self.args = args
        self.value = value
        self.dtype = dtype
        self.tensor = tensor

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.args)) if self.args else repr(self.value)
        return f"{self.op}({inner})"


class Builder:
    """Makes expressions, equal ones once (hash-consing; a + b and b + a are equal), with every cast written out."""

    def __init__(self) -> None:
        self._made: dict[object, Expr] = {}

    def make(self, op: str, args: tuple[Expr, ...], value: Value, dtype: torch.dtype, tensor: bool) -> Expr:
        ids = map(id, args)
        key = (op, tuple(sorted(ids) if op in COMMUTATIVE else ids), value, dtype, tensor)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = Expr(op, args, value, dtype, tensor)
        return found

    def leaf(self, position: int, dtype: torch.dtype, tensor: bool) -> Expr:
        """What a leaf holds before the step; 0-dim leaves are read as float64."""
        if tensor and dtype not in DTYPE_NAMES:
            raise Unsupported("leaf", f"a tensor of dtype {dtype} takes part in the update; floating-point ones can")
        return self.make("leaf", (), position, dtype if tensor else torch.float64, tensor)

    def const(self, value: float) -> Expr:
        """A number. Never shared, so that parameter groups whose constants happen to be equal get the same formula."""
        return Expr("const", (), float(value), torch.float64, False)

    def total(self, number: int) -> Expr:
        """The sum over all members' contributions with this number."""
        return self.make("total", (), number, torch.float64, False)

    def numel(self) -> Expr:
        """The number of elements of the member's tensors."""
        return self.make("numel", (), 0, torch.float64, False)

    def cast(self, x: Expr, dtype: torch.dtype) -> Expr:
        return x if x.dtype == dtype else self.make("cast", (x,), dtype, dtype, x.tensor)

    def op(self, name: str, *args: Expr) -> Expr:
        """A pointwise operation in the dtype of its tensor arguments; among scalars in float64."""
        tensors = [a for a in args if a.tensor and a.dtype != torch.bool]
        dtype = tensors[0].dtype if tensors else torch.float64
        if any(t.dtype != dtype for t in tensors):
            raise Unsupported(name, f"mixes {sorted({DTYPE_NAMES[t.dtype] for t in tensors})} without a cast")
        if name in LOGICAL:
            given = tuple(
                a if a.dtype == torch.bool else self.op("ne", a, self.make("zero", (), 0, a.dtype, False)) for a in args
            )
        elif name == "where":
            condition = args[0] if args[0].dtype == torch.bool else self.op("ne", args[0], self.const(0))
            given = (condition, self.cast(args[1], dtype), self.cast(args[2], dtype))
        else:
            given = tuple(self.cast(a, dtype) for a in args)
        result = torch.bool if name in COMPARISONS or name in LOGICAL else dtype
        return self.make(name, given, None, result, any(a.tensor for a in args))

    def reduce(self, name: str, x: Expr) -> Expr:
        """`sum`, `amax` or `amin` over all elements of one member's tensor: a scalar."""
        if not x.tensor:
            return self.cast(x, torch.float64)
        return self.make(name, (x,), None, torch.float64, False)


COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "isfinite")
LOGICAL = ("and", "or", "not", "xor")
COMMUTATIVE = ("add", "mul", "eq", "ne", "and", "or", "xor")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Something that an update reads or writes.

    Attributes:
        kind: "input" (argument `index` of the graph), "attribute" (of the graph module, `name`), "constant" (`value`),
            "total" (number `index`), "output" (a new tensor that the graph returns at `index`), "temporary" (a new
            tensor that an original operation reads) or "result" (what an original operation gives).
        fixed: its address does not change from step to step.
        optimizer: the handle of an optimizer of ours that holds it, at `index` of `inputs_of`; None: an argument.
    """

    kind: Literal["input", "attribute", "constant", "total", "output", "temporary", "result"]
    name: str
    index: int = -1
    value: float = 0.0
    dtype: torch.dtype = torch.float64
    shape: tuple[int, ...] = ()
    device: torch.device = torch.device("cpu")
    fixed: bool = False
    optimizer: int | None = None


@dataclasses.dataclass(frozen=True)
class Slot:
    """An input of a formula: a tensor of a stored dtype, or a scalar."""

    tensor: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return DTYPE_NAMES[self.dtype] if self.tensor else "scalar"


@dataclasses.dataclass
class Update:
    """All writes of one parameter as a template, and the members (one or more) that it holds for.

    Leaf expressions of the template hold positions in a member; a member names leaves of the program by index.
    `labels` are readable names of the positions, `slots` what lies there.
    """

    writes: list[tuple[int, Expr]]
    contributions: list[tuple[int, Expr]]
    members: list[tuple[int, ...]]
    labels: list[str]
    slots: list[Slot]


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """A canonical update: expressions whose leaves are slots. `text` identifies it and can be parsed back."""

    slots: tuple[Slot, ...]
    writes: tuple[tuple[int, Expr], ...]
    contributions: tuple[Expr, ...]
    text: str

    @property
    def roots(self) -> list[Expr]:
        return [*(e for _, e in self.writes), *self.contributions]

    @property
    def tensor_slots(self) -> list[int]:
        return [i for i, s in enumerate(self.slots) if s.tensor]

    @property
    def scalar_slots(self) -> list[int]:
        return [i for i, s in enumerate(self.slots) if not s.tensor]

    @property
    def written(self) -> list[int]:
        return [slot for slot, _ in self.writes]


@dataclasses.dataclass
class Group:
    """Updates that are the same computation: one kernel. `members[k][s]` is the program leaf in slot `s`."""

    name: str
    formula: Formula
    members: list[tuple[int, ...]]
    totals: list[tuple[int, ...]]  # per member: the totals to which its contributions go, in the formula's order
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unfused:
    """Something that stays outside fused kernels, and why."""

    op: str
    reason: str


@dataclasses.dataclass(frozen=True)
class LeafRef:
    """A leaf's value among the arguments of an original operation; `number`: as a Python number."""

    index: int
    number: bool = False


@dataclasses.dataclass
class Call:
    """An operation that stays as it is, between fused kernels: what is called, on which leaves, giving which."""

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int]
    several: bool  # the operation returns a list of tensors


@dataclasses.dataclass
class Stage:
    """Updates that make temporaries, then the original operations that read them."""

    updates: list[Update] = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Output:
    """What the graph returns at one place: a leaf's value, as a Python number of type `number` if that is set, or
    `literal`.
    """

    leaf: int | None = None
    number: type[int] | type[float] | None = None
    literal: object = None


@dataclasses.dataclass
class Captured:
    """The result of capture: leaves, stages before the last, the updates that write, and what is not fused."""

    leaves: list[Leaf]
    updates: list[Update]
    unfused: list[Unfused]
    n_totals: int = 0
    stages: list[Stage] = dataclasses.field(default_factory=list)
    returned: list[Output] = dataclasses.field(default_factory=list)
    moved: int = 0  # bytes that the original operations read and write, one after the other
    moved_by_calls: int = 0  # of these, those of operations that stay as they are


def postorder(roots: Sequence[Expr]) -> list[Expr]:
    """Every expression below `roots` once, arguments first."""
    seen: set[int] = set()
    found: list[Expr] = []
    stack = list(reversed(roots))
    while stack:
        e = stack[-1]
        if id(e) in seen:
            stack.pop()
            continue
        waiting = [a for a in e.args if id(a) not in seen]
        if waiting:
            waiting.reverse()
            stack += waiting
        else:
            seen.add(id(e))
            found.append(e)
            stack.pop()
    return found


def serialise(slots: Sequence[Slot], writes: Sequence[tuple[int, Expr]], contributions: Sequence[Expr]) -> str:
    """One line per expression, in order of first use: the identity of a formula."""
    lines = [f"slot {i}: {slot}" for i, slot in enumerate(slots)]
    names: dict[int, str] = {}
    for e in postorder([*(e for _, e in writes), *contributions]):
        if e.op == "leaf":
            names[id(e)] = f"${e.value}"
            continue
        names[id(e)] = name = f"%{len(lines) - len(slots)}"
        value = DTYPE_NAMES[e.value] if isinstance(e.value, torch.dtype) else ""
        inner = ", ".join([*(names[id(a)] for a in e.args), *([value] if value else [])])
        lines.append(f"{name}: {DTYPE_NAMES[e.dtype]}{'[]' if e.tensor else ''} = {e.op}({inner})")
    lines += [f"write ${slot} = {names[id(e)]}" for slot, e in writes]
    lines += [f"contribute {names[id(e)]}" for e in contributions]
    return "\n".join(lines)


def parse(text: str) -> Formula:
    """The formula that `serialise` wrote."""
    slots: list[Slot] = []
    made: dict[str, Expr] = {}
    writes: list[tuple[int, Expr]] = []
    contributions: list[Expr] = []

    def ref(name: str) -> Expr:
        if name.startswith("$") and name not in made:
            slot = slots[int(name[1:])]
            made[name] = Expr("leaf", (), int(name[1:]), slot.dtype, slot.tensor)
        return made[name]

    for line in text.splitlines():
        head, _, rest = line.partition(" ")
        if head == "slot":
            kind = rest.split(": ")[1]
            slots.append(Slot(kind != "scalar", DTYPES.get(kind, torch.float64)))
        elif head == "write":
            slot, name = rest.split(" = ")
            writes.append((int(slot[1:]), ref(name)))
        elif head == "contribute":
            contributions.append(ref(rest))
        else:
            kind, _, call = rest.partition(" = ")
            op, _, inner = call[:-1].partition("(")
            parts = [p for p in inner.split(", ") if p]
            value = DTYPES[parts.pop()] if op == "cast" else (0 if op in ("zero", "numel") else None)
            dtype = DTYPES[kind.removesuffix("[]")]
            made[head[:-1]] = Expr(op, tuple(map(ref, parts)), value, dtype, kind.endswith("[]"))
    return Formula(tuple(slots), tuple(writes), tuple(contributions), text)
