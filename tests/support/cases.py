"""The rows of `optimizers.ROWS`, each with what it is compared with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import optimizers
from optimizers._base import NpuFusedOptimizer
from tests.support import oracles


@dataclasses.dataclass(frozen=True)
class Case(optimizers.Row):
    """A row, and the formula in oracles.py that has the name of its rule."""

    @property
    def rule(self) -> str:
        return str(getattr(self.make, "rule", self.make).name)

    @property
    def formula(self) -> oracles.Formula:
        found: oracles.Formula | None = getattr(oracles, self.rule, None)
        assert found is not None, (
            f"the row {self.name!r} of optimizers.ROWS has nothing independent to be compared with: write its formula "
            f"as {self.rule}(p, g, s, t, **options) in tests/support/oracles.py"
        )
        return found

    def oracle(self, params: Any) -> oracles.Oracle:
        return oracles.Oracle(self.formula, params, dict(self.options))

    @functools.cached_property
    def states(self) -> tuple[str, ...]:
        """The states that a parameter has after a step, "step" apart."""
        return tuple(self._stepped(1.0).states[0])

    @functools.cached_property
    def spread(self) -> str:
        """How far a NaN in one gradient gets: its "element", its "tensor", or "all" parameters."""
        first, second = (x.isnan() for x in self._stepped(torch.nan).values)
        return "all" if second.any() else "tensor" if first.all() else "element"

    def _stepped(self, value: float) -> oracles.Oracle:
        """The oracle after a step, with this value in one element of the first gradient."""
        made = self.oracle([torch.ones(2), torch.ones(2)])
        made.step([torch.tensor([value, 1.0]), torch.ones(2)])
        return made


CASES = [Case(**vars(row)) for row in optimizers.ROWS]
BY_NAME = {case.name: case for case in CASES}
ONE_EACH = optimizers.one_each(CASES)
NPU = [c for c in CASES if isinstance(c.make, type) and issubclass(c.make, NpuFusedOptimizer)]  # torch_npu's names


def over(cases: list[Case], **kwargs: Any) -> pytest.MarkDecorator:
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name, **kwargs)
