"""Exact arithmetic on sympy's sparse polynomials, with a limit on what it may cost.

The limit counts operations and not seconds: a decision has to be the same in every process and at every run. For the
same reason nothing here calls sympy's factorisation, which evaluates at random points and, rarely, at one from which
it does not come back: a ten-term polynomial in eight generators took minutes once in a thousand times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.reasons import Code

_TERMS = 4000  # of a product, before it is given up
_DIVIDED = 1000  # the same where a greatest common divisor is looked for
_FACTORED = 100  # terms of a polynomial to factor, for readable text or for a root
_WORK = 100_000  # of one decision, about 0.2 s; RAdam, the longest of torch's, takes two fifths of it


class Arithmetic:
    """Operations on polynomials for one decision.

    Every operation raises Unsupported if polynomials are too large or the decision has cost too much.
    """

    def __init__(self) -> None:
        self.spent = 0

    def times(self, a: Any, b: Any) -> Any:
        """The product of two polynomials."""
        terms = len(a) * len(b)
        if terms > _TERMS:
            raise Unsupported("match", "the update is too large to be multiplied out", Code.MATCH)
        self.spend(10 + 3 * terms)
        return a * b

    def compact(self, operation: Callable[..., Iterable[Any]], *polynomials: Any) -> list[Any]:
        """An operation on polynomials in a ring of the generators that they have: a greatest common divisor takes
        longer the more generators there are.
        """
        terms = math.prod(map(len, polynomials))
        if terms > _DIVIDED:
            raise Unsupported("match", "the update is too large to be simplified", Code.MATCH)
        self.spend(100 + 5 * terms)
        ring = polynomials[0].ring
        used = sorted(set().union(*map(generators_of, polynomials)))
        small = ring.clone(symbols=ring.symbols[: len(used) or 1])
        given = []
        for p in polynomials:
            given.append(small.from_dict({tuple(m[i] for i in used) or (0,): c for m, c in p.iterterms()}))
        results = []
        for p in operation(*given):
            moved = {}
            for m, c in p.iterterms():
                whole = [0] * ring.ngens
                for i, e in zip(used, m, strict=False):
                    whole[i] = e
                moved[tuple(whole)] = c
            results.append(ring.from_dict(moved))
        return results

    def gcd(self, a: Any, b: Any) -> Any:
        """The greatest common divisor."""
        return self.compact(lambda p, q: (p.gcd(q),), a, b)[0]

    def factors_of(self, polynomial: Any) -> tuple[int, list[tuple[Any, int]]]:
        """The number, and factors with their powers: no two share one, none is a product in which a factor has
        generators that another one lacks. a·(1-a)·(1-b)² is taken apart so, (a+b)·(a-b) is not.
        """
        if len(polynomial) > _FACTORED:
            raise Unsupported("match", "a scalar or an input of the kernel is too large to be written down", Code.MATCH)
        if not polynomial:
            return 0, []
        number: list[int] = []

        def factor(p: Any) -> list[Any]:
            exponents = p.tail_degrees()
            found = p.quo_term((exponents, 1)).sqf_list()
            number.append(int(found[0]))
            monomial = [g for g, n in zip(p.ring.gens, exponents, strict=True) for _ in range(n)]
            return monomial + [f for square_free, n in found[1] for f in self._apart(square_free) for _ in range(n)]

        factors = self.compact(factor, polynomial)
        return number[0], [(f, factors.count(f)) for f in dict.fromkeys(factors)]

    def _apart(self, polynomial: Any) -> list[Any]:
        """The factors that lack one of the generators, and the rest."""
        for i in sorted(generators_of(polynomial)):
            common = polynomial.ring.zero
            for coefficient in by_exponent(polynomial, i).values():
                self.spend(100 + 5 * len(common) * len(coefficient))
                common = common.gcd(coefficient)
                if common.is_ground:
                    break
            if not common.is_ground:
                rest = polynomial.exquo(common)
                return [*self._apart(common), *([] if rest.is_ground else self._apart(rest))]
        return [polynomial]

    def spend(self, cost: int) -> None:
        """Count work, in units of about a microsecond."""
        self.spent += cost
        if self.spent > _WORK:
            raise Unsupported("match", "the update takes too long to be compared", Code.MATCH)


def by_exponent(polynomial: Any, generator: int) -> dict[int, Any]:
    """The coefficients of a polynomial in one generator, by exponent."""
    found: dict[int, Any] = {}
    for monomial, c in polynomial.iterterms():
        rest = (*monomial[:generator], 0, *monomial[generator + 1 :])
        found.setdefault(monomial[generator], polynomial.ring.zero.copy())[rest] = c
    return found


def coefficients(polynomial: Any, generators: set[int]) -> list[Any]:
    """The coefficients of a polynomial in these generators."""
    found: dict[tuple[int, ...], Any] = {}
    for monomial, c in polynomial.iterterms():
        key = tuple(e if i in generators else 0 for i, e in enumerate(monomial))
        rest = tuple(0 if i in generators else e for i, e in enumerate(monomial))
        found.setdefault(key, polynomial.ring.zero.copy())[rest] = c
    return [found[key] for key in sorted(found)]


def generators_of(polynomial: Any) -> set[int]:
    """The generators that a polynomial has."""
    return {i for monomial in polynomial.itermonoms() for i, e in enumerate(monomial) if e}
