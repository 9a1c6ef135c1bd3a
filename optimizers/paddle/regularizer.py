"""Weight decay as Paddle writes it: a regulariser whose gradient is added to the (clipped) gradient.

Source: paddle.regularizer. `L1Decay(c)`: g += c * sign(p). `L2Decay(c)`: g += c * p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ._number import as_float

__all__ = ["L1Decay", "L2Decay", "WeightDecayRegularizer", "as_regularizer"]


@dataclass
class WeightDecayRegularizer:
    """Base of the regularisers; use `L1Decay` or `L2Decay`.

    Args:
        coeff: the coefficient c; it may be changed between two steps.

    Raises:
        TypeError: the coefficient is not a number.
    """

    kind: ClassVar[str | None] = None
    coeff: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.coeff, (float, int)):
            raise TypeError(f"coeff of {type(self).__name__} should be float, got {type(self.coeff)} here")
        self.coeff = as_float("coeff", self.coeff)


class L1Decay(WeightDecayRegularizer):
    """L1 regularisation: g += coeff * sign(p)."""

    kind = "l1"


class L2Decay(WeightDecayRegularizer):
    """L2 regularisation: g += coeff * p. A bare number as weight_decay means this."""

    kind = "l2"


def as_regularizer(value: object) -> WeightDecayRegularizer | None:
    """What a weight_decay or a parameter's `regularizer` means; a number c is `L2Decay(c)`.

    Raises:
        TypeError: it is neither a number nor L1Decay, L2Decay or a class derived from them.
    """
    if value is None:
        return None
    if isinstance(value, (float, int)):
        return L2Decay(as_float("weight_decay", value))
    if isinstance(value, WeightDecayRegularizer) and value.kind is not None:
        return value
    raise TypeError(f"weight_decay should be float, L1Decay or L2Decay, got {type(value)} here")


# Regularisers are options of groups, so checkpoints hold them: torch.load(weights_only=True) may read them.
torch.serialization.add_safe_globals([L1Decay, L2Decay])
