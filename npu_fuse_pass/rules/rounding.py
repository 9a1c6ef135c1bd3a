"""The inputs of stochastic rounding for each parameter: seed, the parameter's number, the first element held here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from npu_fuse_pass.errors import OptionError
from npu_fuse_pass.tensors.sharded import as_dtensor, first_element, is_dtensor, local, local_part
from npu_fuse_pass.tensors.stochastic import stochastic_round

T = TypeVar("T")

SEED = "rounding_seed"
"""The key of parameter groups that holds the seed."""

ROUNDING = "rounding."
"""The keyword with which a rule is applied that rounds: (seed, parameter, first). No hyperparameter is called so."""

_NAMES = ("rounding.seed", "rounding.parameter", "rounding.first")  # no identifiers: no hyperparameter is called so


class Rounding:
    """Numbers for the parameters of a batch; none where nothing is rounded stochastically.

    Attributes:
        names: of these numbers.
        views: by name, a 0-dim float64 tensor for each parameter.
    """

    def __init__(self, count: int | None = None) -> None:
        self.names = () if count is None else _NAMES
        self._numbers = torch.zeros((len(self.names), count or 0), dtype=torch.float64, device="cpu")
        self.views = {name: list(row.unbind()) for name, row in zip(self.names, self._numbers, strict=True)}
        self._seed: Any = None

    def keyword(self, of: Callable[[str], T]) -> dict[str, tuple[T, ...]]:
        """What stands for the numbers as the keyword of a rule; nothing where there are none."""
        return {ROUNDING: tuple(map(of, self.names))} if self.names else {}

    def place(self, owners: Sequence[Tensor], numbers: Mapping[int, int]) -> None:
        """Set which parameters they are; `numbers`: by the `id` of a parameter, in the optimizer's order."""
        if self.names:
            places = [[numbers[id(p)] for p in owners], list(map(first_element, owners))]
            self._numbers[1:] = torch.tensor(places, dtype=torch.float64, device="cpu").view(2, len(owners))

    def fill(self, group: Mapping[str, Any]) -> None:
        """Take over a group's seed.

        Raises:
            OptionError: it is no seed.
        """
        if self.names and (seed := group.get(SEED, 0)) is not self._seed:
            check_seed(group)
            self._numbers[0] = float(seed)
            self._seed = seed

    def part(self, places: Sequence[int]) -> Rounding:
        """Those of some of the parameters, in the same memory."""
        made = Rounding()
        made.names, made._numbers, made._seed = self.names, self._numbers, self._seed
        made.views = {name: [views[i] for i in places] for name, views in self.views.items()}
        return made


def check_seed(group: Mapping[str, Any]) -> None:
    """Refuse a group with an invalid seed.

    Raises:
        OptionError: says what is allowed.
    """
    seed = group.get(SEED, 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise OptionError(f"{SEED}={seed!r}: allowed are whole numbers from 0 to 2**32 - 1")


def by_chance(value: Tensor, param: Tensor, rounding: Sequence[Tensor], step: Tensor) -> Tensor:
    """A parameter's new value of float32 in its dtype of half precision; of a DTensor, what this process holds."""
    held: Tensor = stochastic_round(local_part(param, value), local(param), *rounding, step)
    return as_dtensor(held, param) if is_dtensor(param) else held
