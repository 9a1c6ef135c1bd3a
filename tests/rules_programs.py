"""Random update rules as data, and running them: in a loop or over lists, in place or not, exactly or with noise.

A program is a list of statements over the tensors of one parameter: "p", "g", states "m0", "m1", ..., a counter "t" of
its own, and scalars that all share: "lr" and a counter "n". The strategy follows where every value lies, so that
nothing overflows, and from which tensors it comes, so that it knows how many groups there are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rules_ops import MOST, OPS, Interval

HALF = (torch.float16, torch.bfloat16)
SHAPES = [(5,), (3, 4), (7,), (2, 3, 4), (MOST,), (1,), (4, 5)]
SHARED = {"lr", "n", "t", "total"}  # 0-dim
Ref = tuple[str, Any]  # ("v", index of a value), ("r", role) or ("c", index of a constant)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A value, or a write where `role` is given (its old value is the first argument)."""

    op: str
    args: tuple[Ref, ...]
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    statements: tuple[Statement, ...]
    constants: tuple[Interval, ...]
    dtypes: tuple[tuple[str, torch.dtype], ...]  # of every role of its own
    reads: frozenset[str]  # roles that what is written depends on
    operations: tuple[str, ...]  # those that what is written depends on


@dataclasses.dataclass(frozen=True)
class Family:
    """One program for some parameters, in groups that differ in their constants."""

    program: Program
    members: tuple[tuple[tuple[int, ...], int], ...]  # shape, group
    constants: tuple[tuple[float, ...], ...]  # of each group


@dataclasses.dataclass(frozen=True, repr=False)
class Problem:
    families: tuple[Family, ...]
    lists: bool  # foreach form
    counter: bool  # "n" is counted
    seed: int

    @property
    def members(self) -> list[tuple[Family, tuple[int, ...], int]]:
        return [(f, shape, group) for f in self.families for shape, group in f.members]

    def __repr__(self) -> str:
        lines = [f"Problem(lists={self.lists}, counter={self.counter}, seed={self.seed})"]
        for f in self.families:
            lines.append(f"  {f.members} {dict(f.program.dtypes)}")
            for i, s in enumerate(f.program.statements):
                args = [f.constants[0][r[1]] if r[0] == "c" else f"v{r[1]}" if r[0] == "v" else r[1] for r in s.args]
                lines.append(f"    {s.role or f'v{i}'} {'<-' if s.role else '='} {s.op}({', '.join(map(str, args))})")
        return "\n".join(lines)

    def tensors(self) -> list[Tensor]:
        """lr, n, and the roles of every member."""
        torch.manual_seed(self.seed)
        made = [torch.rand((), dtype=torch.float64) / 4 + 0.05, torch.tensor(3.0, dtype=torch.float64)]
        for family, shape, _ in self.members:
            for role, dtype in family.program.dtypes:
                value = torch.randint(1, 9, ()) if role == "t" else torch.rand(shape, dtype=torch.float64) * 4 - 2
                made.append(value.to(dtype))
        return made

    def groups(self) -> int:
        """How many groups there are: one per program, 0-dim parameters apart; counters that nothing reads join
        the parameters if there are as many for each, and are one group otherwise."""
        keys = {(f.program, shape == ()) for f, shape, _ in self.members}
        unread = sum("t" in dict(f.program.dtypes) and "t" not in f.program.reads for f, _, _ in self.members)
        unread += self.counter and sum("n" in f.program.reads for f, _, _ in self.members) != 1
        return len(keys) + (unread % len(self.members) != 0)


# Running -------------------------------------------------------------------------------------------------------------

Hook = Callable[[Statement, Any], Any]


def execute(
    problem: Problem, tensors: Sequence[Any], order: Sequence[int] | None = None, hook: Hook | None = None
) -> None:
    """Write what the programs say; `order` is the order of the members in a loop, `hook` sees and changes values."""
    given = iter(tensors[2:])
    envs = []
    for family, _, _ in problem.members:
        envs.append({role: next(given) for role, _ in family.program.dtypes} | {"lr": tensors[0], "n": tensors[1]})
    if problem.counter:
        tensors[1].add_(1)
    for env in envs:
        if "t" in env:
            env["t"].add_(1)
    chosen = list(order if order is not None else range(len(envs)))
    members = problem.members
    keys = [(members[i][0], members[i][2]) if problem.lists else i for i in chosen]
    numbered = sorted(zip(map(keys.index, keys), chosen, strict=True), key=lambda x: x[0])
    for _, several in itertools.groupby(numbered, key=lambda x: x[0]):
        ids = [i for _, i in several]
        family, _, group = members[ids[0]]
        _run_lists(family.program, family.constants[group], [envs[i] for i in ids], problem.lists, hook)


def _run_lists(
    program: Program, constants: Sequence[float], envs: list[dict[str, Any]], lists: bool, hook: Hook | None
) -> None:
    values: dict[Ref, list[Any]] = {("r", role): [env[role] for env in envs] for role in envs[0]}
    for number, s in enumerate(program.statements):
        args = [constants[r[1]] if r[0] == "c" else values[r] for r in s.args]
        each = [[a[i] if isinstance(a, list) else a for a in args] for i in range(len(envs))]
        if lists and (s.op == "copy" or OPS[s.op].has_foreach):
            several = torch._foreach_copy_(*args) if s.op == "copy" else OPS[s.op].foreach(args, in_place=bool(s.role))
            made = values["r", s.role] if s.role else [several[i] for i in range(len(envs))]
        elif s.op == "copy":
            made = [a.copy_(b) for a, b in each]
        else:
            made = [OPS[s.op].in_place(a) if s.role else OPS[s.op].call(a) for a in each]
        if not s.role:
            values["v", number] = list(made)
        if hook is not None:
            for i, x in enumerate(made):
                changed = hook(s, x)
                if s.role:
                    x.copy_(changed)
                else:
                    values["v", number][i] = changed


def apply(
    program: Program, constants: Sequence[float], roles: dict[str, Any], hook: Hook | None = None
) -> dict[str, Any]:
    """The same without writing anything: the new roles."""
    values: dict[Ref, Any] = {("r", role): x for role, x in roles.items()}
    for number, s in enumerate(program.statements):
        args = [constants[r[1]] if r[0] == "c" else values[r] for r in s.args]
        made = args[1] if s.op == "copy" else OPS[s.op].call(args)
        values["r" if s.role else "v", s.role or number] = made if hook is None else hook(s, made)
    return {role: values["r", role] for role in roles}
