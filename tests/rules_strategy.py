"""Hypothesis strategies for random update rules, and running them: in a loop or over lists, exactly or with noise.

A program is a list of statements over the tensors of one parameter: "p", "g", states "m0", "m1", ..., a counter "t" of
its own, and scalars that all share: "lr" and a counter "n". The strategy follows where every value lies, so that
nothing overflows, and from which tensors it comes, so that it knows how many groups there are.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .rules_ops import ANY, CASTS, MOST, NO_HALF, OPS, WRITES, Interval

HALF = (torch.float16, torch.bfloat16)
SHAPES = [(5,), (3, 4), (7,), (2, 3, 4), (MOST,), (1,), (4, 5)]
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


@dataclasses.dataclass(frozen=True)
class Problem:
    families: tuple[Family, ...]
    lists: bool  # foreach form
    counter: bool  # "n" is counted
    seed: int

    @property
    def members(self) -> list[tuple[Family, tuple[int, ...], int]]:
        return [(f, shape, group) for f in self.families for shape, group in f.members]

    def tensors(self) -> list[Tensor]:
        """lr, n, and the roles of every member."""
        torch.manual_seed(self.seed)
        made = [torch.rand((), dtype=torch.float64) / 4 + 0.05, torch.tensor(3.0, dtype=torch.float64)]
        for family, shape, _ in self.members:
            for role, dtype in family.program.dtypes:
                made.append(
                    (torch.rand(shape, dtype=torch.float64) * 4 - 2 if role != "t" else torch.randint(1, 9, ())).to(
                        dtype
                    )
                )
        return made

    def groups(self) -> int:
        """How many groups there are: one per program, 0-dim parameters apart; counters that nothing reads join
        the parameters if there are as many for each, and are one group otherwise."""
        keys = {(f.program, shape == ()) for f, shape, _ in self.members}
        unread = sum("t" in dict(f.program.dtypes) and "t" not in f.program.reads for f, _, _ in self.members)
        unread += self.counter and sum("n" in f.program.reads for f, _, _ in self.members) != 1
        return len(keys) + (unread % len(self.members) != 0)


# Drawing -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Value:
    kind: str
    interval: Interval
    dtype: torch.dtype
    roles: frozenset[str]  # what it depends on
    ops: frozenset[int]  # statements that it depends on
    flat: bool = False  # a tensor of one value, which nothing reduces


class _Writer:
    """Draws one program."""

    def __init__(self, chance: random.Random, counter: bool) -> None:
        self.chance = chance
        self.dtypes = self._dtypes()
        self.statements: list[Statement] = []
        self.constants: list[Interval] = []
        self.env: dict[Ref, _Value] = {}
        for role, dtype in self.dtypes.items():
            kind, where = ("s", (1.0, 11.0)) if role == "t" else ("t", (-2.0, 2.0))
            self.env["r", role] = _Value(kind, where, dtype, frozenset([role]), frozenset())
        shared = {"lr": (0.05, 0.3), **({"n": (4.0, 4.0)} if counter else {})}
        for role, where in shared.items():
            self.env["r", role] = _Value("s", where, torch.float64, frozenset([role]), frozenset())
        self.written: set[str] = set()

    def _dtypes(self) -> dict[str, torch.dtype]:
        single, double = torch.float32, torch.float64
        half = self.chance.choice(HALF)
        param, state = self.chance.choice(
            [
                *[(single, single)] * 6,
                (double, double),
                (double, double),
                (single, double),
                (half, half),
                (half, single),
            ]
        )
        states = {f"m{i}": self.chance.choice([state, param]) for i in range(self.chance.choice([0, 1, 1, 2, 2, 3]))}
        counter = {"t": self.chance.choice([double, double, single])} if self.chance.random() < 0.6 else {}
        return {"p": param, "g": param, **states, **counter}

    def program(self, steps: int) -> Program:
        usable = [n for n in OPS if not (n in NO_HALF and self.dtypes["p"] in HALF)]
        states = [r for r in self.dtypes if r not in ("t", "g")]
        for _ in range(steps):
            self.emit(self.chance.choice(usable))
            if self.chance.random() < 0.12:
                self.write(self.chance.choice([*states, "g"] if self.chance.random() < 0.2 else states))
        for role in states[1:]:
            if self.chance.random() < 0.8:
                self.write(role)
        self.write("p")
        self._connect()
        last = [self.env["r", role] for role in self.written]
        used = sorted(frozenset().union(*(v.ops for v in last)))
        return Program(
            tuple(self.statements), tuple(self.constants), tuple(self.dtypes.items()),
            frozenset().union(*(v.roles for v in last)), tuple(self.statements[i].op for i in used),
        )  # fmt: skip

    def emit(self, name: str, role: str = "") -> Ref:
        """One statement on arguments of the right kinds; a write where a role is given."""
        op = OPS[name]
        refs: list[Ref] = []
        for kind, domain in zip(op.kinds, op.domains, strict=True):
            if role and not refs:
                refs.append(("r", role))
                continue
            same = self.env[refs[0]].dtype if op.same_dtype and refs else None
            refs.append(self._constant(domain) if kind == "c" else self._pick(kind, domain, same, op.gives == "s"))
        return self._append(name, refs, role)

    def _append(self, name: str, refs: list[Ref], role: str) -> Ref:
        op, given = OPS[name], [self.env[r] for r in refs if r[0] != "c"]
        where = op.interval([self.constants[r[1]] if r[0] == "c" else self.env[r].interval for r in refs])
        tensors = [v.dtype for v in given if v.kind == "t"]
        dtype = torch.float64
        for i, d in enumerate(tensors or [v.dtype for v in given if v.kind == "s"]):
            dtype = d if i == 0 else torch.promote_types(dtype, d)
        reads = [] if name.endswith("_like") else given
        number = len(self.statements)
        self.statements.append(Statement(name, tuple(refs), role))
        ref: Ref = ("r", role) if role else ("v", number)
        self.env[ref] = _Value(
            "t" if role else op.gives, where, self.dtypes.get(role, CASTS.get(name, dtype)),
            frozenset().union(*(v.roles for v in reads)), frozenset([number]).union(*(v.ops for v in reads)),
            all(v.flat or v.kind == "s" for v in reads) and op.gives != "s",
        )  # fmt: skip
        return ref

    def write(self, role: str) -> None:
        now = self.env["r", role]
        names = [n for n in WRITES if n == "copy" or _within(now.interval, OPS[n].domains[0])]
        name = self.chance.choice(names)
        if name == "copy":
            ref = self._pick("t", ANY, None, False)
            value = self.env[ref]
            if value.flat or not value.roles - {"lr", "n", "t"}:
                return self.write(role)
            number = len(self.statements)
            self.statements.append(Statement("copy", (("r", role), ref), role))
            self.env["r", role] = dataclasses.replace(value, dtype=now.dtype, ops=value.ops | {number})
        else:
            self.emit(name, role)
        self.written.add(role)
        return None

    def _connect(self) -> None:
        """What is written shares a tensor with the parameter's new value: one update, not several."""
        for role in sorted(self.written - {"p"}):
            near = {"p"} | self.env["r", "p"].roles
            if not near & ({role} | self.env["r", role].roles) - {"lr", "n", "t"}:
                self._guard(("r", "p"), ANY)
                self._append("add_alpha", [("r", "p"), self._guard(("r", role), ANY), self._constant((0.2, 0.9))], "p")

    def _constant(self, where: Interval) -> Ref:
        self.constants.append(where)
        return ("c", len(self.constants) - 1)

    def _pick(self, kind: str, domain: Interval, dtype: torch.dtype | None, reduced: bool) -> Ref:
        fits = [
            r for r, v in self.env.items()
            if v.kind == kind and dtype in (None, v.dtype) and not (reduced and kind != "s" and v.flat)
        ]  # fmt: skip
        if not fits:
            pair = [self._guard(("r", r), ANY) for r in "pg"]
            return self._append("lt", pair, "") if kind == "b" else pair[0]
        ref = self.chance.choice(fits[-3:] if self.chance.random() < 0.6 else fits)
        return ref if kind == "b" else self._guard(ref, domain)

    def _guard(self, ref: Ref, domain: Interval) -> Ref:
        """The value, brought into the domain if it may lie outside."""
        value = self.env[ref]
        if _within(value.interval, domain):
            return ref
        ends = [self._constant((x, x)) for x in domain]
        return self._append("clamp" if value.kind == "t" else "s_clamp", [ref, *ends], "")


def _within(inner: Interval, outer: Interval) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


@st.composite
def problems(draw: Callable[..., Any], families: int = 3, scalars: bool = True) -> Problem:
    """Several programs, each for some parameters in one or two groups."""
    chance = draw(st.randoms(use_true_random=True))
    counter = scalars and chance.random() < 0.25
    made = []
    for _ in range(chance.randint(1, families)):
        program = _Writer(chance, counter).program(chance.randint(9, 22))
        members = [(chance.choice(SHAPES), chance.randint(0, 1)) for _ in range(chance.randint(1, 4))]
        if (
            scalars
            and chance.random() < 0.15
            and all(OPS[s.op].same_dtype is False for s in program.statements if s.op in OPS)
        ):
            members.append(((), 0))
        constants = tuple(tuple(round(chance.uniform(*c), 3) for c in program.constants) for _ in range(2))
        made.append(Family(program, tuple(members), constants))
    unread = any("t" in dict(f.program.dtypes) and "t" not in f.program.reads for f in made)
    return Problem(tuple(made), chance.random() < 0.5, counter and not unread, chance.randint(0, 10**6))


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
