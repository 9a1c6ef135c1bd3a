"""Hyperparameters of a batch: static ones, and numbers in one float64 vector that every step may fill anew."""

from __future__ import annotations

import array
import operator
from collections.abc import Iterable, Mapping
from itertools import islice
from numbers import Real
from typing import Any, TypeVar

import torch

from npu_fuse_pass.rules.checks import wanted_keywords
from npu_fuse_pass.rules.declaration import Declaration, split_keywords

T = TypeVar("T")
_PLAIN = (float, int, str, type(None), Real)


class Hyper:
    """What a rule reads of a group's settings. A changed number changes an element of a vector: nothing is recompiled.

    Attributes:
        static: flags, strings and None, by keyword.
        names: of the numbers; "betas[0]" is an element of a tuple.
        scalars: the numbers, 0-dim float64 tensors.
        views: the same by keyword; a tuple of them for a tuple.
    """

    def __init__(self, rule: Declaration, settings: Mapping[str, Any]) -> None:
        self._wanted = wanted_keywords(rule)
        static, numbers = split_keywords(self._wanted, settings)
        self.static = dict(static)
        self.names = list(_flat(numbers))
        self._places = {name: i for i, name in enumerate(self.names)}
        self._sizes = {name: len(value) if isinstance(value, tuple) else None for name, value in numbers.items()}
        self._values = array.array("d", [0.0] * max(1, len(self.names)))
        self.scalars = list(torch.frombuffer(self._values, dtype=torch.float64).unbind())[: len(self.names)]
        self.views = self.by_keyword(self.scalars)
        self._given: list[Any] | None = None  # what was taken over last; None: it may change in place

    def by_keyword(self, numbers: Iterable[T]) -> dict[str, T | tuple[T, ...]]:
        """Arrange values of the numbers, in the order of `names`, as the rule's keywords."""
        left = iter(numbers)
        return {n: next(left) if size is None else tuple(islice(left, size)) for n, size in self._sizes.items()}

    def fill(self, settings: Mapping[str, Any]) -> bool:
        """Take this step's numbers over; False where the settings no longer have this structure."""
        given = list(map(settings.get, self._wanted))
        if self._given is not None and (all(map(operator.is_, given, self._given)) or self._exchange(given)):
            return True
        static, numbers = split_keywords(self._wanted, settings)
        flat = _flat(numbers)
        if dict(static) != self.static or list(flat) != self.names:
            return False
        for i, value in enumerate(flat.values()):
            self._values[i] = value
        self._given = given if all(map(_immutable, given)) else None
        return True

    def _exchange(self, given: list[Any]) -> bool:
        """Take over what changed if it is floats alone, as learning rates are; False: nothing is taken over."""
        assert self._given is not None
        pairs = zip(self._wanted, given, self._given, strict=True)
        changed = [(name, new, old) for name, new, old in pairs if new is not old]
        if not all(type(new) is float and type(old) is float for _, new, old in changed):
            return False
        for name, new, _ in changed:
            self._values[self._places[name]] = new
        self._given = given
        return True


def _immutable(value: Any) -> bool:
    return all(map(_immutable, value)) if type(value) is tuple else isinstance(value, _PLAIN)


def _flat(numbers: Mapping[str, float | tuple[float, ...]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in numbers.items():
        found |= {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return found
