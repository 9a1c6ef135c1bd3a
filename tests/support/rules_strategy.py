"""Hypothesis strategies for random update rules.

The strategy follows where every value lies, so that nothing overflows, and from which tensors it comes, so that it
knows how many groups there are.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from tests.support.rules_ops import ANY, CASTS, HALF, MOST, NO_HALF, OPS, WRITES, Interval
from tests.support.rules_programs import SHAPE, TOTALS, Family, Problem, Program, Ref, Statement

SHAPES: list[SHAPE] = [(5,), (3, 4), (7,), (2, 3, 4), (MOST,), (1,), (4, 5)]
OF_NO_MEMBER = {"lr", "n", "t", "total"}  # 0-dim: reading them makes no two writes one update
COUNTED: Interval = (1.0, 11.0)
LENGTHS = (11, 24)  # statements, without those that bring values into the domain of an operation
SINGLE, DOUBLE = torch.float32, torch.float64
# of parameter and state, the first as often as all others
DTYPES = [
    *[(SINGLE, SINGLE)] * 6,
    *[(DOUBLE, DOUBLE)] * 2,
    (SINGLE, DOUBLE),
    *((h, s) for h in HALF for s in (h, SINGLE)),
]


@dataclasses.dataclass
class _Value:
    """What is known of a value: its kind as in Op, where it lies, its dtype, and what it depends on."""

    kind: str
    interval: Interval
    dtype: torch.dtype
    roles: frozenset[str]
    statements: frozenset[int]
    flat: bool = False  # a tensor of one value, which nothing reduces


class _Writer:
    """Draws one program."""

    def __init__(
        self,
        chance: random.Random,
        dtypes: Mapping[str, torch.dtype],
        shared: Mapping[str, Interval],
        ops: Iterable[str],
    ) -> None:
        self.chance = chance
        self.dtypes = dict(dtypes)
        self.usable = list(ops)
        self.statements: list[Statement] = []
        self.constants: list[Interval] = []
        self.env: dict[Ref, _Value] = {}
        for role, dtype in self.dtypes.items():
            kind, where = ("s", COUNTED) if role == "t" else ("t", (-2.0, 2.0))
            self.env["r", role] = _Value(kind, where, dtype, frozenset([role]), frozenset())
        for role, where in shared.items():
            self.env["r", role] = _Value("s", where, DOUBLE, frozenset([role]), frozenset())
        self.written: set[str] = set()

    def program(self, steps: int, writes_gradient: bool = True) -> Program:
        states = [r for r in self.dtypes if r not in ("t", "g")]
        for _ in range(steps):
            self.emit(self.chance.choice(self.usable))
            if self.chance.random() < 0.12:
                self.write(
                    self.chance.choice([*states, "g"] if writes_gradient and self.chance.random() < 0.2 else states)
                )
        for role in states[1:]:
            if self.chance.random() < 0.8:
                self.write(role)
        self.write("p")
        self._connect()
        writes = [(role, self.env["r", role]) for role in sorted(self.written)]
        used = sorted(frozenset().union(*(value.statements for _, value in writes)))
        return Program(
            tuple(self.statements),
            tuple(self.constants),
            tuple(self.dtypes.items()),
            tuple((role, value.roles) for role, value in writes),
            tuple(self.statements[i].op for i in used),
        )

    def emit(self, name: str, role: str = "") -> Ref:
        """One statement on arguments of the right kinds; a write where a role is given."""
        if name in CASTS and all(v.dtype == CASTS[name] for v in self.env.values() if v.kind == "t"):
            name = "clone"  # a cast to the same dtype is the tensor itself, and sees what is written to it
        op = OPS[name]
        refs: list[Ref] = [("r", role)] if role else []
        for kind, domain in list(zip(op.kinds, op.domains, strict=True))[len(refs) :]:
            if kind == "c":
                refs.append(self._constant(domain))
                continue
            first = self.env[refs[0]] if op.same_dtype and refs else None

            def fits(value: _Value, kind: str = kind, first: _Value | None = first) -> bool:
                reduced = op.gives == "s" and kind != "s" and value.flat
                other = value.dtype != (first.dtype if first else value.dtype)
                return value.kind == kind and not reduced and not other and value.dtype != CASTS.get(name)

            refs.append(self._pick(kind, domain, fits))
        return self._append(name, refs, role)

    def write(self, role: str) -> None:
        now = self.env["r", role]
        names = [n for n in WRITES if n == "copy" or _within(now.interval, OPS[n].domains[0])]
        name = self.chance.choice(names)
        self.written.add(role)
        if name != "copy":
            self.emit(name, role)
            return
        own = self._pick("t", ANY, lambda v: v.kind == "t" and not v.flat and bool(v.roles - OF_NO_MEMBER))
        self._append("copy", [("r", role), own], role)

    def _append(self, name: str, refs: list[Ref], role: str) -> Ref:
        op = OPS[name]
        given = [self.env[r] for r in (refs[1:] if name == "copy" else refs) if r[0] != "c"]
        where = op.interval([self.constants[r[1]] if r[0] == "c" else self.env[r].interval for r in refs])
        tensors = [v.dtype for v in given if v.kind == "t"] or [v.dtype for v in given if v.kind == "s"] or [DOUBLE]
        dtype = tensors[0]
        for other in tensors[1:]:
            dtype = torch.promote_types(dtype, other)
        reads = [] if name.endswith("_like") else given
        number = len(self.statements)
        self.statements.append(Statement(name, tuple(refs), role))
        ref: Ref = ("r", role) if role else ("v", number)
        self.env[ref] = _Value(
            "t" if role else op.gives,
            where,
            self.dtypes.get(role, CASTS.get(name, dtype)),
            frozenset().union(*(v.roles for v in reads)),
            frozenset([number]).union(*(v.statements for v in reads)),
            all(v.flat or v.kind == "s" for v in reads) and op.gives != "s",
        )
        return ref

    def _connect(self) -> None:
        """What is written shares a tensor with the parameter's new value: one update, not several."""
        for role in sorted(self.written - {"p"}):
            near = {"p"} | self.env["r", "p"].roles
            if not near & ({role} | self.env["r", role].roles) - OF_NO_MEMBER:
                self._append("add_alpha", [("r", "p"), self._guard(("r", role), ANY), self._constant((0.2, 0.9))], "p")

    def _constant(self, where: Interval) -> Ref:
        self.constants.append(where)
        return ("c", len(self.constants) - 1)

    def _pick(self, kind: str, domain: Interval, fits: Callable[[_Value], bool]) -> Ref:
        known = [ref for ref, value in self.env.items() if fits(value)]
        if not known:
            assert kind == "b"
            return self._append("lt", [self._guard(("r", r), ANY) for r in "pg"], "")
        ref = self.chance.choice(known[-3:] if self.chance.random() < 0.6 else known)
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


def _numbers(chance: random.Random, program: Program) -> tuple[float, ...]:
    return tuple(round(chance.uniform(*where), 3) for where in program.constants)


def _states(chance: random.Random, *dtypes: torch.dtype) -> dict[str, torch.dtype]:
    return {f"m{i}": chance.choice(dtypes) for i in range(chance.choice([0, 1, 1, 2, 2, 3]))}


def _family(chance: random.Random, counter: bool, total: bool) -> Family:
    param, state = chance.choice(DTYPES)
    dtypes = {"p": param, "g": param, **_states(chance, state, param)}
    if chance.random() < 0.6:
        dtypes["t"] = chance.choice([DOUBLE, DOUBLE, SINGLE])
    shared = {"lr": (0.05, 0.3), **({"n": (4.0, 4.0)} if counter else {}), **({"total": (0.0, 1.0)} if total else {})}
    usable = [n for n in OPS if n != "copy" and not (n in NO_HALF and param in HALF)]
    program = _Writer(chance, dtypes, shared, usable).program(chance.randint(*LENGTHS))
    # what a single parameter reads of several is its own, and no total
    members = [(chance.choice(SHAPES), chance.randint(0, 1)) for _ in range(chance.randint(1 + total, 4))]
    same_dtype = any(OPS[s.op].same_dtype for s in program.statements)
    if not total and program.one_update_of_0_dim and not same_dtype and chance.random() < 0.5:
        members.append(((), 0))
    return Family(program, tuple(members), (_numbers(chance, program), _numbers(chance, program)))


@st.composite
def problems(draw: Callable[..., Any]) -> Problem:
    """One to three programs, each for some parameters in one or two groups; some are 0-dim."""
    chance = draw(st.randoms(use_true_random=True))
    counter = chance.random() < 0.25
    total = chance.choice([*TOTALS, *[""] * 4])
    families = tuple(_family(chance, counter, bool(total)) for _ in range(chance.randint(1, 3)))
    unread = any(f.program.counts_unread for f in families)
    return Problem(families, chance.random() < 0.5, counter and not unread, total, chance.randint(0, 10**6))


@st.composite
def programs(draw: Callable[..., Any]) -> tuple[Program, tuple[float, ...]]:
    """A program for a rule, which runs in any dtype, and its numbers; it reads "total" and does not write "g"."""
    chance = draw(st.randoms(use_true_random=True))
    dtypes = {"p": SINGLE, "g": SINGLE, **_states(chance, SINGLE)}
    if chance.random() < 0.6:
        dtypes["t"] = DOUBLE
    usable = [n for n in OPS if n != "copy" and n not in CASTS and n not in NO_HALF]
    writer = _Writer(chance, dtypes, {"lr": (0.05, 0.3), "total": (0.0, 1.0)}, usable)
    program = writer.program(chance.randint(*LENGTHS), writes_gradient=False)
    return program, _numbers(chance, program)
