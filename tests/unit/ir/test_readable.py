"""Formulas as printed for people: what is printed is what is computed."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from npu_fuse_pass.ir.expr import Builder, postorder
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.text import serialise
from npu_fuse_pass.ir.types import Formula, Slot
from tests.support.formulas import FORMULAS, LABELS, SLOTS
from tests.support.graphs import fused

F32 = torch.float32


class Exact:
    """A number whose operations are exact and total, so that only what is computed matters, not how it rounds.

    Functions and powers are arbitrary polynomials: the text does not depend on what they mean.
    """

    def __init__(self, value: Fraction | int | bool) -> None:
        self.value = Fraction(value)

    def __neg__(self) -> Exact:
        return Exact(-self.value)

    def __add__(self, other: Any) -> Exact:
        return Exact(self.value + exact(other).value)

    def __sub__(self, other: Any) -> Exact:
        return Exact(self.value - exact(other).value)

    def __mul__(self, other: Any) -> Exact:
        return Exact(self.value * exact(other).value)

    def __truediv__(self, other: Any) -> Exact:
        by = exact(other).value
        return Exact(self.value / by if by else 7 * self.value + 11)

    def __rtruediv__(self, other: int) -> Exact:
        return Exact(other) / self

    def __pow__(self, other: Any) -> Exact:
        return Exact(3 * self.value + 5 * exact(other).value + 1)

    def __lt__(self, other: Any) -> bool:
        return self.value < exact(other).value

    def __le__(self, other: Any) -> bool:
        return self.value <= exact(other).value

    def __eq__(self, other: object) -> bool:
        return self.value == exact(other).value

    __hash__ = None  # type: ignore[assignment]


def exact(x: Any) -> Exact:
    return x if isinstance(x, Exact) else Exact(x)


def _function(number: int) -> Callable[..., Exact]:
    return lambda *args: Exact(sum((k + number) * exact(a).value for k, a in enumerate(args, 2)) + number)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: _function(i)
    for i, name in enumerate(["sum", "amax", "amin", "abs", "sqrt", "exp", "sign", "maximum", "minimum"], 2)
}
FUNCTIONS |= {
    "where": lambda c, x, y: x if c else y,
    "and_": lambda x, y: bool(x and y),
    "or_": lambda x, y: bool(x or y),
}
OPERATORS: dict[str, Callable[..., Any]] = {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "neg", "pow", "lt", "le", "gt", "ge", "eq", "ne")},
    "div": operator.truediv,
    "fma": lambda x, y, z: x * y + z,
    "reciprocal": lambda x: Exact(1) / x,
    "and": FUNCTIONS["and_"],
    "or": FUNCTIONS["or_"],
    "cast": exact,
    **FUNCTIONS,
}


def printed(text: str, given: dict[str, Any]) -> dict[str, Any]:
    """Evaluates printed formulas line by line as Python; names with a prime are new values."""
    env: dict[str, Any] = dict(given)
    for line in text.splitlines():
        total = "sum over parameters of "
        name, expression = ("total", line.removeprefix(total)) if line.startswith(total) else line.split(" = ", 1)
        python = expression.replace("·", "*").replace("^", "**").replace("'", "_new")
        python = re.sub(r"\b(and|or)\(", r"\1_(", python)
        env[name.replace("'", "_new")] = eval(python, {"__builtins__": {}}, {**FUNCTIONS, **env})
    return env


@pytest.mark.parametrize("labels", [LABELS, ("p", "g", "m", "-lr", "c")], ids=["names", "negative constant"])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(formula=FORMULAS)
def test_the_printed_text_is_the_formula(labels, formula):
    """Read as Python, with its precedence, the text gives the value of every write and contribution. Constants are
    shown by their values, which may be negative: `-lr` stands for one.
    """
    values = dict(zip(LABELS, map(Exact, (Fraction(2, 3), Fraction(5, 7), 3, Fraction(11, 13), 4)), strict=True))
    slots = [-values[label[1:]] if label.startswith("-") else values[label] for label in labels]
    known: dict[int, Any] = {}
    for e in postorder(formula.roots):
        args = [known[id(a)] for a in e.args]
        known[id(e)] = slots[e.value] if e.op == "leaf" else exact(0) if e.op == "zero" else OPERATORS[e.op](*args)
    text = readable(formula, labels)
    env = printed(text, values)
    roots = [(f"{labels[slot]}_new", e) for slot, e in formula.writes] + [("total", e) for e in formula.contributions]
    for name, e in roots:
        assert exact(env[name]) == exact(known[id(e)]), f"{text}\n{formula.text}"


def one(build: Any) -> str:
    """The text of a formula with one write, built on the leaves p, g, m (tensors), lr and c."""
    b = Builder()
    leaves = [b.leaf(i, slot.dtype, slot.tensor) for i, slot in enumerate(SLOTS)]
    writes = [(0, build(b, *leaves))]
    return readable(Formula(SLOTS, tuple(writes), (), serialise(SLOTS, writes, ())), LABELS)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda b, p, g, m, lr, c: b.op("sub", p, b.op("mul", lr, g)), "p' = p - lr·g"),
        (lambda b, p, g, m, lr, c: b.op("mul", b.op("sub", p, g), b.op("add", m, lr)), "p' = (p - g)·(m + lr)"),
        (lambda b, p, g, m, lr, c: b.op("sub", p, b.op("sub", g, m)), "p' = p - (g - m)"),
        (lambda b, p, g, m, lr, c: b.op("sub", p, b.op("add", g, m)), "p' = p - (g + m)"),
        (lambda b, p, g, m, lr, c: b.op("add", p, b.op("sub", g, m)), "p' = p + g - m"),
        (lambda b, p, g, m, lr, c: b.op("div", p, b.op("mul", g, m)), "p' = p/(g·m)"),
        (lambda b, p, g, m, lr, c: b.op("div", p, b.op("div", g, m)), "p' = p/(g/m)"),
        (lambda b, p, g, m, lr, c: b.op("div", b.op("mul", p, g), m), "p' = p·g/m"),
        (lambda b, p, g, m, lr, c: b.op("mul", p, b.op("neg", g)), "p' = p·-g"),
        (lambda b, p, g, m, lr, c: b.op("neg", b.op("add", p, g)), "p' = -(p + g)"),
        (lambda b, p, g, m, lr, c: b.op("pow", b.op("neg", p), c), "p' = (-p)^c"),
        (lambda b, p, g, m, lr, c: b.op("pow", b.op("pow", p, lr), c), "p' = (p^lr)^c"),
        (lambda b, p, g, m, lr, c: b.op("neg", b.op("pow", p, c)), "p' = -p^c"),
        (lambda b, p, g, m, lr, c: b.op("reciprocal", b.op("mul", p, g)), "p' = 1/(p·g)"),
        (lambda b, p, g, m, lr, c: b.op("fma", lr, g, p), "p' = lr·g + p"),
        (lambda b, p, g, m, lr, c: b.op("where", b.op("lt", p, g), m, p), "p' = where(p < g, m, p)"),
    ],
)
def test_precedence(build, text):
    assert one(build) == text


def test_shared_calls_are_named_once():
    """A shared sub-expression is printed once, whether it prints as a sum or as a call."""

    def step(p: Any, g: Any) -> None:
        for _ in range(40):
            p.copy_(torch.sqrt(p) + p * g)

    groups = fused(step, torch.rand(4), torch.rand(4))[1]
    assert len(readable(groups[0].formula, groups[0].labels)) < 4000

    def root(b: Any, p: Any, g: Any, m: Any, lr: Any, c: Any) -> Any:
        r = b.op("sqrt", b.op("add", p, g))
        return b.op("div", r, b.op("add", r, c))

    assert one(root) == "x0 = sqrt(p + g)\np' = x0/(x0 + c)"


def test_what_is_written_as_it_was_read():
    """Writes of one leaf to another, and of one value to two leaves."""
    b = Builder()
    p, g = (b.leaf(i, F32, tensor=True) for i in range(2))
    slots = (Slot(True, F32), Slot(True, F32), Slot(True, F32))
    both = b.op("add", p, g)
    writes = [(0, both), (1, p), (2, both)]
    text = readable(Formula(slots, tuple(writes), (), serialise(slots, writes, ())), ("p", "g", "m"))
    env = printed(text, {"p": Exact(1), "g": Exact(2), "m": Exact(5)})
    assert [env[f"{n}_new"] for n in "pgm"] == [3, 1, 3]


def test_half_precision_roundings_are_shown():
    b = Builder()
    p = b.leaf(0, torch.float16, tensor=True)
    value = b.cast(b.op("sqrt", b.cast(p, F32)), torch.float16)
    slots = (Slot(True, torch.float16),)
    assert (
        readable(Formula(slots, ((0, value),), (), serialise(slots, [(0, value)], ())), ("p",)) == "p' = f16(sqrt(p))"
    )
