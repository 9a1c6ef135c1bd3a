"""Rational functions over an algebra's generators: what formulas and kernels compute with when they are compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.match.polynomial import by_exponent, generators_of, without
from npu_fuse_pass.reasons import Code

if TYPE_CHECKING:
    from npu_fuse_pass.match.algebra import Algebra


class Value:
    """A fraction of two polynomials. It has the operators and methods of tensors that kernels use."""

    __slots__ = ("algebra", "d", "n")

    def __init__(self, algebra: Algebra, n: Any, d: Any) -> None:
        self.algebra = algebra
        self.n, self.d = n, d

    def _make(self, n: Any, d: Any) -> Value:
        """A fraction without common monomials."""
        self.algebra.exact.spend(5 + len(n) + len(d))
        if not n or d == 1:
            return Value(self.algebra, n, d if n else self.algebra.ring.one)
        common = tuple(map(min, *n.itermonoms(), *d.itermonoms())) if len(n) + len(d) > 1 else ()
        if any(common):
            n, d = without(n, common), without(d, common)
        return Value(self.algebra, n, d) if d.LC > 0 else Value(self.algebra, -n, -d)

    def _of(self, other: Any) -> Value:
        return other if isinstance(other, Value) else self.algebra.number(other)

    def __add__(self, other: Any) -> Value:
        other, exact = self._of(other), self.algebra.exact
        if self.d == other.d:
            return self._make(self.n + other.n, self.d)
        if other.d == 1:
            return self._make(self.n + exact.times(other.n, self.d), self.d)
        if self.d == 1:
            return self._make(exact.times(self.n, other.d) + other.n, other.d)
        common, mine, others = exact.compact(lambda p, q: p.cofactors(q), self.d, other.d)
        below = exact.times(exact.times(common, mine), others)
        return self._make(exact.times(self.n, others) + exact.times(other.n, mine), below)

    def __neg__(self) -> Value:
        return Value(self.algebra, -self.n, self.d)

    def __sub__(self, other: Any) -> Value:
        return self + -self._of(other)

    def __rsub__(self, other: Any) -> Value:
        return self._of(other) - self

    def __mul__(self, other: Any) -> Value:
        other, exact = self._of(other), self.algebra.exact
        return self._make(exact.times(self.n, other.n), exact.times(self.d, other.d))

    def __truediv__(self, other: Any) -> Value:
        other, exact = self._of(other), self.algebra.exact
        if not other.n:
            raise Unsupported("div", "divides by zero", Code.MATCH)
        return self._make(exact.times(self.n, other.d), exact.times(self.d, other.n))

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
        rest = without(factor, exponents)
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
            factor = self.algebra.exact.gcd(factor, coefficient)
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
        found = by_exponent(polynomial, generator)
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
        return Value(self.algebra, *self.algebra.exact.compact(lambda p, q: p.cancel(q), self.n, self.d))

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
            raise Unsupported("div", "divides by zero", Code.MATCH)
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
            number, factors = self.algebra.exact.factors_of(part)
            root = math.isqrt(int(number)) if number > 0 else -1
            if root * root != number or any(n % 2 for _, n in factors):
                return None
            parts.append(math.prod((f ** (n // 2) for f, n in factors), start=self.algebra.ring(root)))
        return Value(self.algebra, *parts)
