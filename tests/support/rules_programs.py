"""Random update rules as data, and running them: in a loop, over lists, or without writing anything.

A program is a list of statements over the tensors of one parameter: "p", "g", states "m0", "m1", ..., a counter "t" of
its own, and 0-dim tensors that all share: "lr", a counter "n", and "total", a number in (0, 1] made of all gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.rules_ops import OPS, Interval

SHAPE = tuple[int, ...]
Ref = tuple[str, Any]  # ("v", number of a statement), ("r", role) or ("c", index of a constant)


def _from_sum(grads: Sequence[Any]) -> Any:
    return 1 / (1 + sum((g.double() * g.double()).sum() for g in grads))


def _from_norms(grads: Sequence[Any]) -> Any:
    """As clip_grad_norm_."""
    norms = torch._foreach_norm(list(grads))
    norm = torch.linalg.vector_norm(torch.stack([norms[i].to(torch.float64) for i in range(len(grads))]))
    return torch.clamp(1.0 / (norm + 1e-6), max=1.0)


TOTALS: dict[str, Callable[[Sequence[Any]], Any]] = {"sum": _from_sum, "norms": _from_norms}


@dataclasses.dataclass(frozen=True)
class Statement:
    """A value, or a write where `role` is given (its old value is the first argument)."""

    op: str
    args: tuple[Ref, ...]
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """One update rule.

    Args:
        constants: from where each number is drawn.
        dtypes: of every role of its own.
        writes: every role that is written, with the roles that its new value depends on.
        operations: names of those that what is written depends on.
    """

    statements: tuple[Statement, ...]
    constants: tuple[Interval, ...]
    dtypes: tuple[tuple[str, torch.dtype], ...]
    writes: tuple[tuple[str, frozenset[str]], ...]
    operations: tuple[str, ...]

    @property
    def reads(self) -> frozenset[str]:
        """Roles that what is written depends on."""
        return frozenset().union(*(roles for _, roles in self.writes))

    @property
    def one_update_of_0_dim(self) -> bool:
        """Whether a 0-dim parameter is one update, too.

        Nothing tells whose a 0-dim tensor is that several updates read, nor a 0-dim parameter that depends on itself
        alone from a counter.
        """
        writes = dict(self.writes)
        states = [role for role in writes if role != "p"]
        if not states:
            return bool(self.reads - {"p"})
        return len(states) == 1 and (states[0] in writes["p"] or "p" in writes[states[0]])

    def touches(self, role: str) -> bool:
        """Whether its update reads or writes it."""
        return role in self.reads or role in dict(self.writes)

    @property
    def counts_unread(self) -> bool:
        """Whether its counter is counted for nothing."""
        return "t" in dict(self.dtypes) and "t" not in self.reads

    def __repr__(self) -> str:
        lines = [str({role: str(dtype) for role, dtype in self.dtypes})]
        for i, s in enumerate(self.statements):
            args = ", ".join(str(x) if kind == "r" else f"{kind}{x}" for kind, x in s.args)
            lines.append(f"{s.role or f'v{i}'} {'<-' if s.role else '='} {s.op}({args})")
        return "\n    ".join(lines)


@dataclasses.dataclass(frozen=True)
class Family:
    """One program for some parameters, in groups that differ in their constants."""

    program: Program
    members: tuple[tuple[SHAPE, int], ...]  # shape, group
    constants: tuple[tuple[float, ...], ...]  # of each group


@dataclasses.dataclass(frozen=True)
class Member:
    """One parameter."""

    program: Program
    shape: SHAPE
    constants: tuple[float, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Problem:
    """One step.

    Args:
        lists: in foreach form.
        counter: "n" is counted.
        total: how "total" is computed, a name in TOTALS; or empty.
    """

    families: tuple[Family, ...]
    lists: bool
    counter: bool
    total: str
    seed: int

    @property
    def members(self) -> list[Member]:
        return [Member(f.program, shape, f.constants[group]) for f in self.families for shape, group in f.members]

    def __repr__(self) -> str:
        lines = [f"Problem(lists={self.lists}, counter={self.counter}, total={self.total!r}, seed={self.seed})"]
        return "\n  ".join([*lines, *(f"{f.members} {f.constants}\n    {f.program}" for f in self.families)])

    def tensors(self) -> list[Tensor]:
        """lr, n, and the roles of every member."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(shape: SHAPE) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator)

        made = [uniform(()) / 4 + 0.05, torch.tensor(3.0, dtype=torch.float64)]
        for member in self.members:
            for role, dtype in member.program.dtypes:
                value = (uniform(()) * 8).ceil() if role == "t" else uniform(member.shape) * 4 - 2
                made.append(value.to(dtype))
        return made

    def environments(self, tensors: Sequence[Any]) -> list[dict[str, Any]]:
        """The roles of every member, of what `tensors` has made."""
        own = iter(tensors[2:])
        shared = {"lr": tensors[0], "n": tensors[1]}
        envs = [shared | {role: next(own) for role, _ in m.program.dtypes} for m in self.members]
        if self.total:
            total = TOTALS[self.total]([env["g"] for env in envs])
            envs = [env | {"total": total} for env in envs]
        return envs

    def groups(self) -> int:
        """How many groups there are: one per program, 0-dim parameters apart.

        Counters that nothing reads join the parameters if there are as many for each, and are one group otherwise;
        the shared counter joins the only parameter that reads it. Gradients that only a total reads are a group for
        each dtype.
        """
        members = self.members
        summed = self.total and any("total" in m.program.reads for m in members)
        alone = {m.program.dtypes[1] for m in members if summed and not m.program.touches("g")}
        unread = sum(m.program.counts_unread for m in members)
        unread += self.counter and sum("n" in m.program.reads for m in members) != 1
        return len({(m.program, m.shape == ()) for m in members}) + (unread % len(members) != 0) + len(alone)

    def plan(self, order: Sequence[int]) -> list[tuple[Member, list[int]]]:
        """What is done together, in the order in which it is done: members alone, or lists of equal ones."""
        if not self.lists:
            return [(self.members[i], [i]) for i in order]
        lists: dict[tuple[Program, tuple[float, ...]], list[int]] = {}
        for i in order:
            lists.setdefault((self.members[i].program, self.members[i].constants), []).append(i)
        return [(self.members[several[0]], several) for several in lists.values()]

    def step(self, order: Sequence[int] | None = None) -> Callable[..., None]:
        """A function that does the step on `tensors()`, in place, for the members in some order."""
        plan = self.plan(range(len(self.members)) if order is None else order)

        def run(*tensors: Any) -> None:
            envs = self.environments(tensors)
            if self.counter:
                tensors[1].add_(1)
            for member, several in plan:
                execute(member.program, member.constants, [envs[i] for i in several], self.lists)

        return run


def execute(program: Program, constants: Sequence[float], envs: list[dict[str, Any]], lists: bool) -> None:
    """Write what a program says, for several members one operation at a time."""
    for env in envs:
        if "t" in env:
            env["t"].add_(1)
    values: dict[Ref, list[Any]] = {("r", role): [env[role] for env in envs] for role in envs[0]}
    for number, s in enumerate(program.statements):
        args = [constants[r[1]] if r[0] == "c" else values[r] for r in s.args]
        op = OPS[s.op]
        if lists and op.has_foreach:
            made = op.foreach(args, in_place=bool(s.role))
            if not s.role:
                values["v", number] = [made[i] for i in range(len(envs))]
            continue
        each = [[a[i] if isinstance(a, list) else a for a in args] for i in range(len(envs))]
        if s.role:
            for a in each:
                op.in_place(a)
        else:
            values["v", number] = [op.call(a) for a in each]


class Exactly:
    """How `apply` computes: as it is written. `rules_noise.Noisy` adds errors."""

    def call(self, number: int, statement: Statement, args: Sequence[Any]) -> Any:
        return OPS[statement.op].call(args)


def apply(
    program: Program, constants: Sequence[float], roles: Mapping[str, Any], how: Exactly | None = None
) -> dict[str, Any]:
    """The same for one member and without writing anything: the new roles. "t" has been counted."""
    how = how or Exactly()
    values: dict[Ref, Any] = {("r", role): x for role, x in roles.items()}
    for number, s in enumerate(program.statements):
        args = [constants[r[1]] if r[0] == "c" else values[r] for r in s.args]
        values["r" if s.role else "v", s.role or number] = how.call(number, s, args)
    return {role: values["r", role] for role in roles}
