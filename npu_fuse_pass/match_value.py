"""Rational functions over an algebra's generators: what formulas and kernels compute with when they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .errors import Unsupported

if TYPE_CHECKING:
    from .symbolic import Algebra

_TERMS = 4000  # of a product, before it is given up
_DIVIDED = 1000  # the same where a greatest common divisor is looked for


class Value:
    """A fraction of two polynomials. It has the operators and methods of tensors that kernels use."""

    __slots__ = ("algebra", "d", "n")

    def __init__(self, algebra: Algebra, n: Any, d: Any) -> None:
        self.algebra = algebra
        self.n, self.d = n, d

    def _make(self, n: Any, d: Any) -> Value:
        """A fraction without common monomials."""
        if not n or d == 1:
            return Value(self.algebra, n, d if n else self.algebra.ring.one)
        common = tuple(map(min, *n.itermonoms(), *d.itermonoms())) if len(n) + len(d) > 1 else ()
        if any(common):
            n, d = _without(n, common), _without(d, common)
        return Value(self.algebra, n, d) if d.LC > 0 else Value(self.algebra, -n, -d)

    def _of(self, other: Any) -> Value:
        return other if isinstance(other, Value) else self.algebra.number(other)

    def __add__(self, other: Any) -> Value:
        other = self._of(other)
        if self.d == other.d:
            return self._make(self.n + other.n, self.d)
        if other.d == 1:
            return self._make(self.n + _times(other.n, self.d), self.d)
        if self.d == 1:
            return self._make(_times(self.n, other.d) + other.n, other.d)
        common, mine, others = _compact(lambda p, q: p.cofactors(q), self.d, other.d)
        return self._make(_times(self.n, others) + _times(other.n, mine), _times(_times(common, mine), others))

    def __neg__(self) -> Value:
        return Value(self.algebra, -self.n, self.d)

    def __sub__(self, other: Any) -> Value:
        return self + -self._of(other)

    def __rsub__(self, other: Any) -> Value:
        return self._of(other) - self

    def __mul__(self, other: Any) -> Value:
        other = self._of(other)
        return self._make(_times(self.n, other.n), _times(self.d, other.d))

    def __truediv__(self, other: Any) -> Value:
        other = self._of(other)
        if not other.n:
            raise Unsupported("div", "divides by zero")
        return self._make(_times(self.n, other.d), _times(self.d, other.n))

    def __rtruediv__(self, other: Any) -> Value:
        return self._of(other) / self

    def __pow__(self, exponent: int) -> Value:
        result = self.algebra.number(1)
        for _ in range(abs(exponent)):
            result = result * self
        return result if exponent >= 0 else 1 / result

    __radd__, __rmul__ = __add__, __mul__

    def maximum(self, other: Any) -> Value:
        return self.algebra.apply("maximum", [self, self._of(other)])

    def sqrt(self) -> Value:
        return self.algebra.sqrt(self)

    def simple_root(self) -> Value:
        """A root. Scalar factors come out of it: what they multiply is not negative where the root is a number."""
        v = self.cancelled()
        return self._root_of(v.n) / self._root_of(v.d) if v.n else v

    def _root_of(self, polynomial: Any) -> Value:
        factor, rest = self._scalar_factor(polynomial)
        result = self.algebra.number(1) if rest == 1 else self._root_generator(rest)
        exponents = tuple(map(min, *factor.itermonoms())) if len(factor) > 1 else factor.leading_expv()
        rest = _without(factor, exponents)
        if rest != 1:
            root = math.isqrt(int(rest)) if rest.is_ground and rest.LC > 0 else 0
            square = root and root * root == rest
            result *= root if square else self._root_generator(rest)
        for i, exponent in enumerate(exponents):
            if not exponent:
                continue
            g = self.algebra.generator(i)
            positive = i in self.algebra.powers or i in self.algebra.inside
            half = g if positive or exponent % 4 != 2 else self.algebra.apply("abs", [g])
            result *= half ** (exponent // 2)
            result *= self.algebra.root(g) if exponent % 2 else 1
        return result

    def _root_generator(self, polynomial: Any) -> Value:
        return self.algebra.root(Value(self.algebra, polynomial, self.algebra.ring.one))

    def _scalar_factor(self, polynomial: Any) -> tuple[Any, Any]:
        """A polynomial as a product of one in scalars and one without scalar factors."""
        ring, reads = self.algebra.ring, self.algebra.reads
        if not any(e and i in reads for m in polynomial.itermonoms() for i, e in enumerate(m)):
            return polynomial, ring.one
        factor = ring.zero
        for coefficient in self.coefficients(polynomial, set(reads)):
            (factor,) = _compact(lambda p, q: (p.gcd(q),), factor, coefficient)
            if factor == 1:
                break
        return factor, polynomial.exquo(factor)

    def coefficients(self, polynomial: Any, generators: set[int]) -> list[Any]:
        """The coefficients of a polynomial in these generators."""
        found: dict[tuple[int, ...], Any] = {}
        for monomial, c in polynomial.iterterms():
            key = tuple(e if i in generators else 0 for i, e in enumerate(monomial))
            rest = tuple(0 if i in generators else e for i, e in enumerate(monomial))
            found.setdefault(key, self.algebra.ring.zero.copy())[rest] = c
        return [found[key] for key in sorted(found)]

    def by_power(self, polynomial: Any, generator: int) -> dict[int, Value]:
        """The coefficients of a polynomial in one generator, by exponent."""
        found: dict[int, Any] = {}
        for monomial, c in polynomial.iterterms():
            rest = (*monomial[:generator], 0, *monomial[generator + 1 :])
            found.setdefault(monomial[generator], self.algebra.ring.zero.copy())[rest] = c
        return {exponent: Value(self.algebra, p, self.algebra.ring.one) for exponent, p in found.items()}

    def insert(self, polynomial: Any, generator: int) -> Any:
        """The numerator of a polynomial in which a generator is this value."""
        result = self.algebra.number(0)
        for exponent, coefficient in self.by_power(polynomial, generator).items():
            result = result + coefficient * self**exponent
        return result.n

    def cancelled(self) -> Value:
        """The same in lowest terms, which is the only way to write it so."""
        if self.d == 1:
            return self
        if len(self.d) == 1:
            common = math.gcd(int(self.n.content()), int(self.d.LC))
            return Value(self.algebra, self.n.quo_ground(common), self.d.quo_ground(common))
        return Value(self.algebra, *_compact(lambda p, q: p.cancel(q), self.n, self.d))

    def equals(self, other: Any) -> bool:
        """Whether two rational functions are the same."""
        return not (self - other).n

    def generators(self) -> set[int]:
        return generators_of(self.n) | generators_of(self.d)

    def tensors(self) -> set[int]:
        return {i for i in self.generators() if i in self.algebra.reads}

    def at_zero(self, generator: int) -> Value:
        """The value where a generator is zero."""
        ring = self.algebra.ring
        n, d = (ring.from_dict({m: c for m, c in p.iterterms() if not m[generator]}) for p in (self.n, self.d))
        if not d:
            raise Unsupported("div", "divides by zero")
        return self._make(n, d)

    def in_powers(self) -> Value:
        """The value with beta^t in place of the root of its bias correction, where that appears squared only."""
        result = self
        for root, (_, _, _, power) in self.algebra.powers.items():
            tops, bottoms = (self.by_power(p, root) for p in (result.n, result.d))
            if any(tops.keys() | bottoms.keys()) and not any(e % 2 for e in (*tops, *bottoms)):
                square = 1 - self.algebra.generator(power)
                zero = self.algebra.number(0)
                n, d = (sum((c * square ** (e // 2) for e, c in found.items()), zero) for found in (tops, bottoms))
                result = (n / d).cancelled()
        return result

    def to_float(self) -> float:
        return float(int(self.n.LC)) / float(int(self.d.LC)) if self.n else 0.0

    def root_of_square(self) -> Value | None:
        """A root of what is a square; None for anything else."""
        v = self.cancelled()
        parts = []
        for part in (v.n, v.d):
            number, factors = factors_of(part)
            root = math.isqrt(int(number)) if number > 0 else -1
            if root * root != number or any(n % 2 for _, n in factors):
                return None
            parts.append(math.prod((f ** (n // 2) for f, n in factors), start=self.algebra.ring(root)))
        return Value(self.algebra, *parts)


def factors_of(polynomial: Any) -> tuple[int, list[tuple[Any, int]]]:
    """The number, and the irreducible factors with their powers."""
    number: list[int] = []

    def factor(p: Any) -> list[Any]:
        found = p.factor_list()
        number.append(int(found[0]))
        return [f for f, n in found[1] for _ in range(n)]

    factors = list(_compact(factor, polynomial))
    return number[0], [(f, factors.count(f)) for f in dict.fromkeys(factors)]


def _compact(operation: Callable[..., Iterable[Any]], *polynomials: Any) -> list[Any]:
    """An operation on polynomials in a ring of the generators that they have: a greatest common divisor takes longer
    the more generators there are.
    """
    if math.prod(map(len, polynomials)) > _DIVIDED:
        raise Unsupported("match", "the update is too large to be simplified")
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


def _times(a: Any, b: Any) -> Any:
    if len(a) * len(b) > _TERMS:
        raise Unsupported("match", "the update is too large to be multiplied out")
    return a * b


def _without(polynomial: Any, exponents: tuple[int, ...]) -> Any:
    """A polynomial divided by a monomial."""
    result = polynomial.ring.zero.copy()
    for monomial, c in polynomial.iterterms():
        result[tuple(a - b for a, b in zip(monomial, exponents, strict=True))] = c
    return result


def generators_of(polynomial: Any) -> set[int]:
    """The generators that a polynomial has."""
    return {i for monomial in polynomial.itermonoms() for i, e in enumerate(monomial) if e}
