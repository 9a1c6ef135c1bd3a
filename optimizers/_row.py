"""What the table of optimizers says about each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["Row", "one_each"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer with options.

    Attributes:
        name: of its tests: `pytest -k name`.
        make: the class or the rule.
        options: for `make`; a few steps of this learning rate change a parameter of size one visibly.
        stock: the class of torch.optim that computes the same with the same options, if there is one.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any]
    stock: type[torch.optim.Optimizer] | None = None

    @property
    def optimizer(self) -> str:
        """Its name in this package: "NpuFusedAdam", "lion", "paddle.RMSProp"."""
        made: Any = getattr(self.make, "function", self.make)
        return ".".join([*made.__module__.split(".")[1:-1], made.__name__])

    @property
    def label(self) -> str:
        """The optimizer with its options, but for the learning rate."""
        told = [f"{name}={value}" for name, value in self.options.items() if name not in _RATES]
        return ", ".join([self.optimizer, *told])

    @property
    def rate(self) -> dict[str, Any]:
        """The learning rate alone: all other options have their defaults."""
        return {name: value for name, value in self.options.items() if name in _RATES}

    def build(self, params: Any, **more: Any) -> Any:
        """The optimizer over `params`; `more` is added to its options, or replaces them."""
        options = {**self.options, **more}
        if self.optimizer.startswith("paddle."):  # whose parameters come second
            return self.make(parameters=params, **options)
        return self.make(params, **options)


_RATES = ("lr", "learning_rate")

AnyRow = TypeVar("AnyRow", bound=Row)


def one_each(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The first row of each optimizer: the one that stands for it where options do not matter."""
    return [row for i, row in enumerate(rows) if row.optimizer not in {other.optimizer for other in rows[:i]}]
