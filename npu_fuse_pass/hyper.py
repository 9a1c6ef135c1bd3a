"""Hyperparameters of a batch: static ones, and numbers in one float64 vector that every step may fill anew."""

from __future__ import annotations

import array
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .meta import wanted_keywords
from .rules import Rule, split_keywords

_PLAIN = (float, int, bool, str, type(None))


class Hyper:
    """What a rule reads of a group's settings. A changed number changes an element of a vector: nothing is recompiled.

    Attributes:
        static: flags, strings and None, by keyword.
        names: of the numbers; "betas[0]" is an element of a tuple.
        scalars: the numbers, 0-dim float64 tensors.
        views: the same by keyword; a tuple of them for a tuple.
    """

    def __init__(self, rule: Rule, settings: Mapping[str, Any]) -> None:
        self._wanted = wanted_keywords(rule)
        static, numbers = split_keywords(self._wanted, settings)
        self.static = dict(static)
        self.names = list(_names(numbers))
        self._values = array.array("d", [0.0] * max(1, len(self.names)))
        self.scalars = list(torch.frombuffer(self._values, dtype=torch.float64).unbind())[: len(self.names)]
        left = iter(self.scalars)
        self.views: dict[str, Tensor | tuple[Tensor, ...]] = {
            name: tuple(next(left) for _ in value) if isinstance(value, tuple) else next(left)
            for name, value in numbers.items()
        }
        self._given: list[Any] | None = None  # what was taken over last; None: it may change in place

    def fill(self, settings: Mapping[str, Any]) -> bool:
        """Take this step's numbers over; False where the settings no longer have this structure."""
        given = list(map(settings.get, self._wanted))
        if self._given is not None and all(map(operator.is_, given, self._given)):
            return True
        static, numbers = split_keywords(self._wanted, settings)
        if dict(static) != self.static or list(_names(numbers)) != self.names:
            return False
        for i, value in enumerate(_values(numbers)):
            self._values[i] = value
        self._given = given if all(map(_immutable, given)) else None
        return True


def _immutable(value: Any) -> bool:
    return all(map(_immutable, value)) if type(value) is tuple else type(value) in _PLAIN


def _names(numbers: Mapping[str, float | tuple[float, ...]]) -> Iterator[str]:
    for name, value in numbers.items():
        if isinstance(value, tuple):
            yield from (f"{name}[{i}]" for i in range(len(value)))
        else:
            yield name


def _values(numbers: Mapping[str, float | tuple[float, ...]]) -> Iterator[float]:
    for value in numbers.values():
        if isinstance(value, tuple):
            yield from value
        else:
            yield value
