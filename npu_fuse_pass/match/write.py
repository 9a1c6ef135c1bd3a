"""Algebraic values as expressions over a formula's slots."""

from __future__ import annotations

import functools
from typing import Any

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import HALF, Builder, Expr
from npu_fuse_pass.ir.types import Slot
from npu_fuse_pass.match.algebra import Algebra, Value
from npu_fuse_pass.reasons import Code


class Writer:
    """Writes values as expressions. Numbers become `constants`, by slot behind those of the formula."""

    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra
        self._builder = Builder()
        self._numbers: dict[float, Expr] = {}

    @property
    def constants(self) -> dict[int, float]:
        first = len(self._algebra.formula.slots)
        return {first + i: value for i, value in enumerate(self._numbers)}

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The formula's slots and those of `constants`."""
        return (*self._algebra.formula.slots, *(Slot(False, torch.float64) for _ in self._numbers))

    def tensor(self, v: Value) -> Expr:
        """A tensor as an operation reads it: a slot as it is stored, or what is computed from slots."""
        leaf = next((e for e in self._algebra.order if e.op == "leaf" and self._algebra.values[id(e)].equals(v)), None)
        return self.write(v) if leaf is None else leaf

    def write(self, v: Value) -> Expr:
        """A value; where the formula computes it, that expression.

        Raises:
            Unsupported: it holds something that is not in the formula.
        """
        v = v.cancelled()
        for s in self._algebra.formula.scalar_slots:
            if self._algebra.slots[s].equals(v) and v.generators():
                return Expr("leaf", (), s, torch.float64, False)
        if v.tensors():
            for e in self._algebra.order:
                if e.tensor and e.op != "cast" and self._algebra.values[id(e)].equals(v):
                    return self._wide(e)
        v = v.in_powers()
        top = self._polynomial(v.n)
        return top if v.d == 1 else self._builder.op("div", top, self._polynomial(v.d))

    def power(self, root: int, shift: int) -> Expr:
        """base^(t + shift) where the formula has base^t."""
        _, exponent, e, _ = self._algebra.powers[root]
        return self._builder.op("pow", e.args[0], self.write(exponent + shift)) if shift else e

    def _polynomial(self, p: Any) -> Expr:
        if len(p) == 1:
            ((monomial, c),) = p.iterterms()
            return self._product(monomial, int(c))
        number, found = self._algebra.exact.factors_of(p)
        factors = [f for f, n in found for _ in range(n)]
        longer = [i for i, f in enumerate(factors) if len(f) > 1]
        if number < 0 and longer:
            number, factors[longer[0]] = -number, -factors[longer[0]]
        whole = len(factors) == 1
        written = (self._sum(f) if whole else self.write(self._algebra.polynomial(f)) for f in factors)
        return self._scaled(number, list(written))

    def _sum(self, p: Any) -> Expr:
        """Positive terms first, so that there is something to subtract from."""
        terms = sorted(p.iterterms(), key=lambda term: (term[1] < 0, *(-e for e in term[0])))
        result: Expr | None = None
        for monomial, c in terms:
            if result is None:
                result = self._product(monomial, int(c))
            else:
                result = self._builder.op("sub" if c < 0 else "add", result, self._product(monomial, abs(int(c))))
        assert result is not None
        return result

    def _product(self, monomial: tuple[int, ...], number: int) -> Expr:
        return self._scaled(number, [f for i, n in enumerate(monomial) if n for f in self._power(i, n)])

    def _power(self, i: int, n: int) -> list[Expr]:
        one = self._generator(i)
        if i not in self._algebra.powers:
            return [one] * n
        return [one.args[0]] * (n // 2) + [one] * (n % 2)

    def _scaled(self, number: Any, factors: list[Expr]) -> Expr:
        """A product, numbers first: they are multiplied once and not per element."""
        factors = sorted(factors, key=lambda f: f.tensor)
        if abs(int(number)) != 1 or not factors:
            factors = [self._number(abs(float(number))), *factors]
        result = functools.reduce(functools.partial(self._builder.op, "mul"), factors)
        return self._builder.op("neg", result) if number < 0 else result

    def _generator(self, i: int) -> Expr:
        algebra = self._algebra
        if i in algebra.powers:
            return self._builder.op("sqrt", self._builder.op("sub", self._number(1.0), algebra.powers[i][2]))
        if i in algebra.inside:
            return self._builder.op("sqrt", self.write(algebra.inside[i]))
        if i not in algebra.meaning:
            raise Unsupported("match", "a scalar is not made of the formula's values", Code.MATCH)
        return self._wide(algebra.meaning[i])

    def _wide(self, e: Expr) -> Expr:
        """In the dtype of arithmetic."""
        wide = torch.float32 if e.dtype in HALF else torch.float64 if e.dtype == torch.bool else e.dtype
        return self._builder.cast(e, wide)

    def _number(self, value: float) -> Expr:
        if value not in self._numbers:
            slot = len(self._algebra.formula.slots) + len(self._numbers)
            self._numbers[value] = Expr("leaf", (), slot, torch.float64, False)
        return self._numbers[value]
