"""What a decision may cost, and the factors that it finds without a search."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.match import find, polynomial
from npu_fuse_pass.match.algebra import Algebra
from npu_fuse_pass.match.find import match_group
from npu_fuse_pass.match.polynomial import Arithmetic
from npu_fuse_pass.match.result import Match, NoMatch
from tests.support.graphs import fused
from tests.support.near_misses import NEAR_MISSES
from tests.support.spellings_more import SPELLINGS


def ring(count: int = 4) -> tuple[Any, ...]:
    from sympy import ZZ
    from sympy.polys.rings import PolyRing

    made = PolyRing([f"g{i}" for i in range(count)], ZZ)
    return (made, *made.gens)


def multiplied(number: int, factors: list[tuple[Any, int]], one: Any) -> Any:
    return math.prod((f**n for f, n in factors), start=one * number)


def test_factors() -> None:
    """Different variables, different powers, and monomials come apart; what shares all its variables need not."""
    r, a, b, c, _ = ring()
    number, factors = Arithmetic().factors_of(-6 * (1 - a) * (1 - b) ** 2 * a * c)
    assert len(factors) == 4 and sorted(n for _, n in factors) == [1, 1, 1, 2]
    assert multiplied(number, factors, r.one) == -6 * (1 - a) * (1 - b) ** 2 * a * c
    number, factors = Arithmetic().factors_of((a + b) * (a - b))
    assert multiplied(number, factors, r.one) == a**2 - b**2
    assert Arithmetic().factors_of(r(12)) == (12, [])


POLYNOMIALS = st.lists(
    st.tuples(st.tuples(*[st.integers(0, 2)] * 4), st.integers(-3, 3).filter(bool)), min_size=1, max_size=3
)


@given(parts=st.lists(st.tuples(POLYNOMIALS, st.integers(1, 2)), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_factors_multiply_to_the_polynomial(parts: Any) -> None:
    """And none divides another one, so that all powers are even if and only if it is a square, up to the number."""
    r, *_ = ring()
    product = r.one
    for terms, power in parts:
        product *= r.from_dict(dict(terms)) ** power
    if not product or len(product) > 100:
        return
    number, factors = Arithmetic().factors_of(product)
    assert multiplied(number, factors, r.one) == product
    for i, (f, _) in enumerate(factors):
        assert all(f.gcd(g).is_ground for g, _ in factors[:i])


def test_matching_never_factors_by_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """sympy's factor_list evaluates at random points; once in about a thousand times it does not come back."""
    from sympy.polys.rings import PolyElement

    def fail(*_: Any) -> None:
        raise AssertionError("factor_list")

    monkeypatch.setattr(PolyElement, "factor_list", fail)
    find._decide.cache_clear()
    for s in SPELLINGS:
        assert isinstance(s.found(s.modes[0]), Match), s.name
    find._decide.cache_clear()


def steep(rounds: int) -> Any:
    """A momentum whose gradient multiplies out to more terms with every round."""

    def run(p: Any, g: Any, m: Any, *s: Any) -> None:
        x = g + p
        for i in range(rounds):
            x = x * (g * s[i] + p * s[i + 1] + g * g * s[i + 2] + 1.5)
        m.copy_(s[6] * m + x + p * g * g * s[5] + s[4] * g)
        p.sub_(s[7] * m)

    return run


@pytest.mark.parametrize(("rounds", "matches"), [(1, True), (2, True), (4, False), (5, False), (12, False)])
def test_what_is_too_large_is_left(rounds: int, matches: bool) -> None:
    tensors = [torch.rand(3, dtype=torch.float64) for _ in range(3)]
    numbers = [torch.tensor(0.1 * (i + 1), dtype=torch.float64) for i in range(16)]
    captured, (only,) = fused(steep(rounds), *tensors, *numbers)
    found = match_group(only, captured.leaves)
    assert isinstance(found, Match) == matches
    if isinstance(found, NoMatch):
        assert "too large" in found.reason or "too long" in found.reason


def test_work_is_counted_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is one of operations: the same decision in every process, on every rank."""
    adam = next(s for s in SPELLINGS if s.name == "lerp")
    monkeypatch.setattr(polynomial, "_WORK", 1000)
    find._decide.cache_clear()
    found = adam.found("inputs")
    find._decide.cache_clear()
    assert isinstance(found, NoMatch) and "takes too long" in found.reason
    exact = Arithmetic()
    exact.spend(1000)
    with pytest.raises(Unsupported, match="takes too long"):
        exact.spend(1)


def test_what_decisions_take(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds are printed, the work behind them is checked: no spelling or near miss comes near the limit."""
    made: list[Algebra] = []

    class Counted(Algebra):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(find, "Algebra", Counted)
    rows = []
    for s in (*SPELLINGS, *NEAR_MISSES):
        for mode in s.modes:
            captured, only = s.group(mode)
            find._decide.cache_clear()
            start = time.perf_counter()
            match_group(only, captured.leaves)
            rows.append((time.perf_counter() - start, made[-1].exact.spent, f"{s.name}, {mode}"))
    seconds, spent = (sorted(column) for column in list(zip(*rows, strict=True))[:2])
    with capsys.disabled():
        slow = max(rows)
        print(
            f"\nmatch: {len(rows)} decisions, median {seconds[len(rows) // 2]:.3f} s, most {slow[0]:.3f} s "
            f"({slow[2]}); work at most {spent[-1]} of {polynomial._WORK}"
        )
    assert spent[-1] < 0.8 * polynomial._WORK
