"""The types that the stages hand to each other: leaves, updates, formulas, groups.

Writes to leaves are the roots of expressions (expr.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from npu_fuse_pass.fx_nodes.effects import entries
from npu_fuse_pass.ir.expr import DTYPE_NAMES, Expr
from npu_fuse_pass.reasons import Reason


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor or number that an update reads or writes.

    Attributes:
        kind: "input" (argument `index` of the graph), "attribute" (of the graph module, `name`), "constant" (`value`),
            "total" (number `index`), "output" (a new tensor that the graph returns at `index`), "temporary" (a new
            tensor that an original operation reads) or "result" (what an original operation gives or writes).
        fixed: its address does not change from step to step.
        optimizer: the handle of the rule optimizer that holds it, at `index` of `inputs_of`; None: an argument.
        strides: how it lies in memory, or would without fusion; None: not known, or as its member does.
        across: the process groups over which its other elements are spread, where reductions are of all of them.
        whole: how many elements it has with these.
        held: of a number that a tensor of one element holds: the shape of that tensor.
    """

    kind: Literal["input", "attribute", "constant", "total", "output", "temporary", "result"]
    name: str
    index: int = -1
    value: float = 0.0
    dtype: torch.dtype = torch.float64
    shape: tuple[int, ...] = ()
    device: torch.device = torch.device("cpu")
    fixed: bool = False
    optimizer: str | None = None
    strides: tuple[int, ...] | None = None
    across: tuple[Any, ...] = ()
    whole: int = 0
    held: tuple[int, ...] = ()


LeafValues = list[Tensor | None]
"""What all leaves of a step hold, one after another: None for a missing gradient, and for what is not made yet."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """An input of a formula: a tensor of a stored dtype, or a scalar; `total`: it holds a total, in every member."""

    tensor: bool
    dtype: torch.dtype
    total: bool = False

    def __str__(self) -> str:
        return DTYPE_NAMES[self.dtype] if self.tensor else "total" if self.total else "scalar"


@dataclasses.dataclass(frozen=True)
class Traced:
    """A rule as it was traced for one parameter.

    Attributes:
        rule: its name.
        update: a graph that gives the new values of the first positions in `Update.writes`.
        contributions: graphs, each of what the parameter adds to a total.
        arguments: of all these graphs; a position in a member, or "step" (the count after this step), or
            "total <number>", which only `update` has.
    """

    rule: str
    update: fx.GraphModule
    contributions: tuple[fx.GraphModule, ...]
    arguments: tuple[int | str, ...]


@dataclasses.dataclass
class Update:
    """All writes of one parameter as a template, and the members (one or more) that it holds for.

    Leaf expressions of the template hold positions in a member; a member names leaves of the program by index.
    `labels` are readable names of the positions, `slots` what lies there. `traced` is the rule that it was read from.
    `needs` are positions without which a member is left out, read or not.
    """

    writes: list[tuple[int, Expr]]
    contributions: list[tuple[int, Expr]]
    members: list[tuple[int, ...]]
    labels: list[str]
    slots: list[Slot]
    traced: Traced | None = None
    needs: tuple[int, ...] = ()


def group_name(text: str) -> str:
    """The name of the group with a formula: report, dump, kernel, profiler's range, FX node and GE node have it."""
    return f"update_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
    def total_slots(self) -> list[int]:
        return [i for i, s in enumerate(self.slots) if s.total]

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

    @property
    def of_params(self) -> bool:
        """True if one of the tensors that it writes is known as a parameter."""
        return any(self.labels[slot] == "param" for slot in self.formula.written)


@dataclasses.dataclass(frozen=True)
class GroupedSegment:
    """Groups that make temporaries, then the original operations that read them."""

    groups: tuple[Group, ...]
    calls: tuple[Call, ...]


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A captured step as groups.

    Attributes:
        leaves: those of the captured step, then the constants and totals that groups read.
        segments: those before the last, in order.
        groups: of the last segment; they write parameters and states.
        stores: leaves that get the values of others then, see `Captured`.
    """

    leaves: tuple[Leaf, ...] = ()
    segments: tuple[GroupedSegment, ...] = ()
    groups: tuple[Group, ...] = ()
    stores: tuple[tuple[int, int], ...] = ()

    @property
    def all_groups(self) -> list[Group]:
        """The groups of all segments, in the order in which they run."""
        return [*(g for segment in self.segments for g in segment.groups), *self.groups]


@dataclasses.dataclass(frozen=True)
class LeafRef:
    """A leaf's value among the arguments of an original operation; `number`: as a Python number of this type."""

    index: int
    number: type[int] | type[float] | type[bool] | None = None


def references(value: Any) -> list[LeafRef]:
    """The leaves among an original operation's arguments, in order."""
    return [x for x in entries(value) if isinstance(x, LeafRef)]


@dataclasses.dataclass
class Call:
    """An operation that stays as it is, between fused kernels: what is called, on which leaves, giving which.

    The step's own tensors are written by the last kernels only. So what the operation writes in place are tensors that
    nothing else reads, and what it leaves there are leaves of kind "result".

    Attributes:
        node: its name in the captured graph.
        copies: pairs of a leaf and one that holds a copy of it before the call, for what is written in place.
        written: pairs of a leaf that the call writes in place and the leaf that stands for its new value.
        number: it gives a Python number.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int]
    several: bool  # the operation returns a list of tensors
    node: str = ""
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    written: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    number: bool = False


@dataclasses.dataclass
class Segment:
    """Updates that make temporaries, then the original operations that read them."""

    updates: list[Update] = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Output:
    """What the graph returns at one place: a leaf's value, as a Python number of type `number` if that is set, or
    `literal`; `detached`: as a tensor object of its own.
    """

    leaf: int | None = None
    number: type | None = None
    literal: object = None
    detached: bool = False


@dataclasses.dataclass(frozen=True)
class Expanded:
    """What a node stands for that is the step of a rule optimizer.

    Attributes:
        updates: its own; members name leaves of its own.
        given: leaves that the node gets, and where: its argument, and the position there.
        kept: the other leaves as leaves of the captured graph.
    """

    updates: tuple[Update, ...]
    given: dict[int, tuple[int, int]]
    kept: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Decided:
    """What a step computes depends on whether a number is 0; `zero`: the updates are for where it is."""

    leaf: Leaf
    label: str
    zero: bool

    def __str__(self) -> str:
        return f"{self.label} {'==' if self.zero else '!='} 0"


@dataclasses.dataclass
class Captured:
    """The result of capture: leaves, segments before the last, the updates that write, and what is not fused.

    `decided`: the numbers for which the updates hold, see `passes.specialise`. `stores`: leaves whose dtype no kernel
    writes, each with the leaf of kind "result" that holds its new value. `put_right`: see `ir.expr.Builder`.
    """

    leaves: list[Leaf]
    updates: list[Update]
    unfused: list[Reason]
    segments: list[Segment] = dataclasses.field(default_factory=list)
    returned: list[Output] = dataclasses.field(default_factory=list)
    moved: int = 0  # bytes that the original operations read and write, one after the other
    moved_by_calls: int = 0  # of these, those of operations that stay as they are
    expanded: dict[str, Expanded] = dataclasses.field(default_factory=dict)  # by the node's name
    decided: tuple[Decided, ...] = ()
    stores: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    put_right: bool = False

    @property
    def summary(self) -> str:
        """How much there is of it, in a line."""
        members = sum(len(u.members) for u in self.updates)
        return f"{members} updates of {len(self.leaves)} leaves; {len(self.unfused)} operations unfused"
