"""A formula as algebra: rational functions over generators, in sympy's sparse polynomials.

Casts are transparent. What is no rational operation (a root, a maximum, a comparison) becomes a generator that stands
for it, the same for equal ones; comparisons are 0 or 1, so that `where(c, a, b)` is c·a + (1-c)·b for finite values.
A power of two scalars, beta^t, becomes 1 - w² with a positive generator w: the bias correction 1 - beta^t is then w²
and its root w. So two updates are equal if the numerator of their difference is zero when it is multiplied out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.expr import REDUCTIONS, Expr, postorder
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.match.known_kernels import KnownKernel
from npu_fuse_pass.match.polynomial import Arithmetic, by_exponent, coefficients, generators_of
from npu_fuse_pass.match.verify import RELATIONS, Relation
from npu_fuse_pass.reasons import Code

_SPARE = 16  # generators for what a kernel computes


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
        common = tuple(map(min, n.tail_degrees(), d.tail_degrees()))
        if any(common):
            n, d = n.quo_term((common, 1)), d.quo_term((common, 1))
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
        """A root. Scalar factors come out of it: what they multiply is not negative where the root is a number."""
        if self.algebra.rough:
            return self.algebra.apply("sqrt", [self])
        v = self.cancelled()
        return self._root_of(v.n) / self._root_of(v.d) if v.n else v

    def _root_of(self, polynomial: Any) -> Value:
        factor, rest = self._scalar_factor(polynomial)
        result = self.algebra.number(1) if rest == 1 else self._root_generator(rest)
        exponents = factor.tail_degrees()
        rest = factor.quo_term((exponents, 1))
        if rest != 1:
            root = math.isqrt(int(rest.LC)) if rest.is_ground and rest.LC > 0 else 0
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
        return self.algebra.root(self.algebra.polynomial(polynomial))

    def _scalar_factor(self, polynomial: Any) -> tuple[Any, Any]:
        """A polynomial as a product of one in scalars and one without scalar factors."""
        ring, reads = self.algebra.ring, self.algebra.reads
        if not any(e and i in reads for m in polynomial.itermonoms() for i, e in enumerate(m)):
            return polynomial, ring.one
        factor = ring.zero
        for coefficient in coefficients(polynomial, set(reads)):
            factor = self.algebra.exact.gcd(factor, coefficient)
            if factor == 1:
                break
        return factor, polynomial.exquo(factor)

    def insert(self, polynomial: Any, generator: int) -> Any:
        """The numerator of a polynomial in which a generator is this value."""
        result = self.algebra.number(0)
        for exponent, coefficient in self.algebra.by_power(polynomial, generator).items():
            result = result + coefficient * self**exponent
        return result.n

    def cancelled(self) -> Value:
        """The same fraction in lowest terms, a unique form."""
        if self.d == 1:
            return self
        if len(self.d) == 1:
            common = math.gcd(int(self.n.content()), int(self.d.LC))
            return Value(self.algebra, self.n.quo_ground(common), self.d.quo_ground(common))
        return Value(self.algebra, *self.algebra.exact.compact(lambda p, q: p.cancel(q), self.n, self.d))

    def equals(self, other: Any) -> bool:
        """True if two rational functions are equal."""
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
            tops, bottoms = (self.algebra.by_power(p, root) for p in (result.n, result.d))
            if any(tops.keys() | bottoms.keys()) and not any(e % 2 for e in (*tops, *bottoms)):
                square = 1 - self.algebra.generator(power)
                zero = self.algebra.number(0)
                n, d = (sum((c * square ** (e // 2) for e, c in found.items()), zero) for found in (tops, bottoms))
                result = (n / d).cancelled()
        return result

    def to_float(self) -> float:
        return float(int(self.n.LC)) / float(int(self.d.LC)) if self.n else 0.0

    def root_of_square(self) -> Value | None:
        """The root of a square; None for anything else."""
        v = self.cancelled()
        parts = []
        for part in (v.n, v.d):
            number, factors = self.algebra.exact.factors_of(part)
            root = math.isqrt(int(number)) if number > 0 else -1
            if root * root != number or any(n % 2 for _, n in factors):
                return None
            parts.append(math.prod((f ** (n // 2) for f, n in factors), start=self.algebra.ring(root)))
        return Value(self.algebra, *parts)


class Algebra:
    """The generators of one formula; `values`: the algebra of every expression that its tensors are computed from.

    `slots`: the values of the formula's slots before the step.

    `known`: relations of constant slots. `names`: unknowns that a caller solves for.

    `rough`: roots and arguments are not simplified.
    """

    def __init__(self, formula: Formula, known: Mapping[int, Relation], names: tuple[str, ...] = ()) -> None:
        from sympy import ZZ
        from sympy.polys.rings import PolyRing

        self.order = postorder([e for slot, e in formula.writes if formula.slots[slot].tensor])
        count = len(formula.slots) + len(names) + sum(2 for e in self.order if e.op not in _RATIONAL) + _SPARE
        self.ring = PolyRing([f"g{i}" for i in range(count)], ZZ)
        self.formula = formula
        self.exact = Arithmetic()
        self.meaning: dict[int, Expr] = {}  # generator -> the expression that it stands for
        self.inside: dict[int, Value] = {}  # generator of a root -> what it is the root of
        self.powers: dict[int, tuple[Value, Value, Expr, int]] = {}  # w -> base, exponent, beta^t and its generator
        self.reads: dict[int, frozenset[int]] = {}  # generator of a tensor -> those of the slots that it depends on
        self.reduced: set[int] = set()  # generators of reductions
        self.compared: set[int] = set()  # scalar slots that comparisons read
        self.guards: list[int] = []  # x of every where(x == 0, a, b) that was read as b
        self._fixed = {s for s, (how, _) in known.items() if how == "free"}
        self._made: dict[object, int] = {}
        self.rough = False
        for i, slot in enumerate(formula.slots):
            self._generator(("slot", i), [i] if slot.tensor else [])
            self.meaning[i] = Expr("leaf", (), i, slot.dtype, slot.tensor)
        self.unknown = {name: self._generator(("unknown", name), []) for name in names}
        self.slots = [self._slot(i, *known.get(i, ("free", 0.0))) for i in range(len(formula.slots))]
        self.values: dict[int, Value] = {}
        for e in self.order:
            self.values[id(e)] = self.slots[e.value] if e.op == "leaf" else self._value(e)  # type: ignore[index]
        self._own = len(self._made)

    def number(self, x: float) -> Value:
        top, bottom = x.as_integer_ratio()
        return Value(self, self.ring(top), self.ring(bottom))

    def polynomial(self, p: Any) -> Value:
        return Value(self, p, self.ring.one)

    def generator(self, i: int) -> Value:
        return self.polynomial(self.ring.gens[i])

    def by_power(self, polynomial: Any, generator: int) -> dict[int, Value]:
        """The coefficients of a polynomial in one generator, by exponent."""
        return {exponent: self.polynomial(p) for exponent, p in by_exponent(polynomial, generator).items()}

    def is_defined(self, v: Value, targets: Collection[Value]) -> bool:
        """True if a value is finite for all scalars: its divisors are constants, or divisors of these targets."""
        safe, rest = self._fixed | self.powers.keys(), v.cancelled().d
        for divisor in dict.fromkeys(t.d for t in targets):
            while not generators_of(rest) <= safe and not (common := self.exact.gcd(rest, divisor)).is_ground:
                rest = rest.exquo(common)
        return generators_of(rest) <= safe

    def run(self, kernel: KnownKernel, arguments: Mapping[str, Value], output: str) -> Value:
        """The value of an output of a kernel's function. Valid until the next call."""
        numbers = {name: arguments[name] for name in kernel.scalars}
        for self.rough in (True, False):  # most outputs have no roots: those need not be simplified
            for key in list(self._made)[self._own :]:
                i = self._made.pop(key)
                self.inside.pop(i, None)
                self.reads.pop(i, None)
            results = kernel.function(*(arguments[name] for name in kernel.inputs), **numbers)
            result: Value = dict(zip(kernel.outputs, results, strict=True))[output]
            if all(i < self._own for i in result.generators()):
                break
        self.rough = False
        return result

    def in_formula(self, v: Value) -> bool:
        """True if a value has generators of the formula only."""
        return all(i < self._own and i not in self.unknown.values() for i in v.generators())

    def show(self, v: Value) -> str:
        """A value as readable text: slots are $0, $1, ..."""
        v = v.cancelled()
        text = str(v.n.as_expr()) if v.d == 1 else f"({v.n.as_expr()})/({v.d.as_expr()})"
        return re.sub(r"g(\d+)", lambda found: self._shown(int(found[1])), text)

    def _shown(self, i: int) -> str:
        """A generator as readable text; of an operation that is not rational only its name."""
        if i < len(self.formula.slots):
            return f"${i}"
        if i in self.powers:
            return f"sqrt(1 - {self.show(self.powers[i][0])}^t)"
        if i in self.inside:
            return f"sqrt({self.show(self.inside[i])})"
        unknown = next((name for name, k in self.unknown.items() if k == i), None)
        return unknown or (f"{self.meaning[i].op}(…)" if i in self.meaning else "…")

    # Formula ----------------------------------------------------------------------------------------------------------

    def _slot(self, slot: int, how: str, x: float) -> Value:
        if how == "number":
            return self.number(x)
        return self.generator(slot) if how == "free" else RELATIONS[how](self.generator(int(x)))

    def _generator(self, key: object, reads: list[int], e: Expr | None = None) -> int:
        if key not in self._made:
            i = self._made[key] = len(self._made)
            if i >= self.ring.ngens:
                raise Unsupported("match", "too many operations that are not rational", Code.MATCH)
            if reads:
                self.reads[i] = frozenset(reads)
        i = self._made[key]
        if e is not None:
            self.meaning.setdefault(i, e)
            self.reduced |= {i} if e.op in (*REDUCTIONS, "numel") else set()
        return i

    def _value(self, e: Expr) -> Value:
        args = [self.values[id(a)] for a in e.args]
        rational = _RATIONAL.get(e.op)
        if rational is not None:
            return rational(*args)
        if e.op == "zero":
            return self.number(0)
        if e.op == "where":
            return self._where(e, *args)
        if e.op == "pow":
            return self._pow(e, *args)
        if e.op == "sqrt":
            return args[0].sqrt()
        if e.op == "rsqrt":
            return 1 / args[0].sqrt()
        if e.op in _COMPARED:
            return self._compare(e, *args)
        if e.op in ("fmax", "fmin"):  # they differ for NaN only
            return self.apply("maximum" if e.op == "fmax" else "minimum", args, e)
        return self.apply(e.op, args, e)

    def apply(self, op: str, args: list[Value], e: Expr | None = None) -> Value:
        """Apply an operation that is not rational. `e`: the expression that computes it in the formula."""
        given = args if self.rough else [a.cancelled() for a in args]
        if op in ("maximum", "minimum", "eq"):
            given.sort(key=lambda a: (str(a.n), str(a.d)))
        reads = sorted({r for a in given for i in a.generators() for r in self.reads.get(i, ())})
        return self.generator(self._generator((op, *((a.n, a.d) for a in given)), reads, e))

    def root(self, inside: Value) -> Value:
        """The root of a polynomial, as a generator."""
        i = self._generator(("root", inside.n), sorted({r for t in inside.tensors() for r in self.reads[t]}))
        self.inside[i] = inside
        return self.generator(i)

    def _compare(self, e: Expr, x: Value, y: Value) -> Value:
        below = (a.value for a in postorder(e.args) if a.op == "leaf" and not a.tensor)
        self.compared |= {value for value in below if isinstance(value, int)}
        op, swap, invert = _COMPARED[e.op]
        args = (e.args[1], e.args[0]) if swap else e.args
        if not x.generators() | y.generators():
            a, b = x.to_float(), y.to_float()
            holds = self.number(float({"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}.get(e.op, a == b)))
        else:
            holds = self.apply(op, [y, x] if swap else [x, y], Expr(op, args, None, torch.bool, e.tensor))
        return 1 - holds if invert else holds

    def _where(self, e: Expr, condition: Value, x: Value, y: Value) -> Value:
        if x.equals(y):
            return x
        tested = e.args[0]
        if tested.op in ("eq", "ne"):
            sides = [self.values[id(a)] for a in tested.args]
            guard = next((s.generators() for s in sides if s.n.is_generator and s.d == 1), set())
            at_zero, elsewhere = (x, y) if tested.op == "eq" else (y, x)
            if any(s.n == 0 for s in sides) and guard and not guard & set(self.reads):
                (i,) = guard
                if elsewhere.at_zero(i).equals(at_zero):
                    self.guards.append(i)
                    return elsewhere
        return condition * x + (1 - condition) * y

    def _pow(self, e: Expr, x: Value, y: Value) -> Value:
        if not y.generators() and y.d == 1 and abs(y.to_float()) <= 4:
            return x ** int(y.to_float())
        if y.equals(self.number(0.5)):
            return x.sqrt()
        if e.tensor:
            return self.apply("pow", [x, y], e)
        if x.n == 0 or x.equals(self.number(1)):
            return x
        x, y = x.cancelled(), y.cancelled()
        i = self._generator(("pow", x.n, x.d, y.n, y.d), [])
        if i not in self.powers:
            self.powers[i] = (x, y, e, self._generator(("power", i), [], e))
        return 1 - self.generator(i) ** 2


_RATIONAL: dict[str, Callable[..., Value]] = {
    "cast": lambda x: x,
    "stochastic": lambda x, *_: x,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x: -x,
    "reciprocal": lambda x: 1 / x,
    "fma": lambda x, y, z: x * y + z,
    "and": lambda x, y: x * y,
    "or": lambda x, y: x + y - x * y,
    "xor": lambda x, y: x + y - 2 * x * y,
    "not": lambda x: 1 - x,
}

# comparison -> the same with eq, lt or le: arguments swapped, result inverted
_COMPARED = {
    "eq": ("eq", False, False),
    "ne": ("eq", False, True),
    "lt": ("lt", False, False),
    "gt": ("lt", True, False),
    "le": ("le", False, False),
    "ge": ("le", True, False),
}
