"""Random steps of constants, draws and integers around updates: what stays as it is keeps eager's values and order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.rules_noise import settled
from tests.support.training import FULL
from tests.unit.match.test_kept_operations import CONSTANTS, DRAWS, INTEGERS, SOURCES, compare

Part = Callable[[Tensor, Tensor, Tensor], Any]
"""What one statement does with a parameter, its gradient and a counter; what it gives is returned by the step."""


def _constant(name: str) -> Part:
    def part(p: Tensor, g: Tensor, count: Tensor) -> Any:
        made = CONSTANTS[name](p)
        p.sub_(g * made, alpha=0.1)
        return made

    return part


def _draw(name: str, source: str) -> Part:
    def part(p: Tensor, g: Tensor, count: Tensor) -> Any:
        p.sub_(g * DRAWS[name](SOURCES[source](p)), alpha=0.01)

    return part


def _integer(name: str) -> Part:
    def part(p: Tensor, g: Tensor, count: Tensor) -> Any:
        count += 1
        made = INTEGERS[name](count)
        p.sub_(g * made if not made.shape else g, alpha=0.01)
        return made

    return part


def _mixed(name: str) -> Part:
    """A draw and a constant in one statement, after something that the kernels compute."""

    def part(p: Tensor, g: Tensor, count: Tensor) -> Any:
        p.mul_(0.5).add_(torch.rand_like(p) * CONSTANTS[name](p) + g.cumsum(0) / count, alpha=0.1)

    return part


def parts() -> st.SearchStrategy[tuple[str, ...]]:
    """A statement as its kind and names, so that an example prints."""
    return st.one_of(
        st.tuples(st.just("constant"), st.sampled_from(sorted(CONSTANTS))),
        st.tuples(st.just("draw"), st.sampled_from(sorted(DRAWS)), st.sampled_from(sorted(SOURCES))),
        st.tuples(st.just("integer"), st.sampled_from(sorted(INTEGERS))),
        st.tuples(st.just("mixed"), st.sampled_from(sorted(CONSTANTS))),
    )


_KINDS: dict[str, Callable[..., Part]] = {"constant": _constant, "draw": _draw, "integer": _integer, "mixed": _mixed}


@pytest.mark.slow
def test_constants_and_draws() -> None:
    @settled(100 if FULL else 4)
    @given(st.lists(parts(), min_size=2, max_size=5))
    def check(chosen: Sequence[tuple[str, ...]]) -> None:
        made = [_KINDS[kind](*names) for kind, *names in chosen]

        def body(p: Tensor, g: Tensor, count: Tensor) -> Any:
            given = [part(p, g, count) for part in made]
            p.sub_(g, alpha=0.125)
            return [x for x in given if x is not None]

        compare(body, torch.tensor(2), steps=2, tolerance=1e-5)

    check()
