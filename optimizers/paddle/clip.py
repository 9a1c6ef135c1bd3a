"""Gradient clipping as Paddle writes it: an object given to the optimizer, applied inside the step.

Source: paddle.nn.clip. The classes only describe the clipping; the update rule does it, so that it fuses with
the step. A parameter with `p.need_clip = False` is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ._number import as_float

__all__ = [
    "ClipGradByGlobalNorm",
    "ClipGradByNorm",
    "ClipGradByValue",
    "GradientClipBase",
    "GradientClipByGlobalNorm",
    "GradientClipByNorm",
    "GradientClipByValue",
]


class GradientClipBase:
    """Base of the clipping strategies; use one of the three classes below."""

    kind: ClassVar[str | None] = None

    def bounds(self) -> tuple[float, float]:
        """The numbers of this strategy: (lowest value, highest value or norm)."""
        raise NotImplementedError(f"{type(self).__name__} is not a clipping strategy; use a derived class")


@dataclass
class _ClipByNorm(GradientClipBase):
    clip_norm: float

    def __post_init__(self) -> None:
        self.clip_norm = as_float("clip_norm", self.clip_norm)
        if not self.clip_norm >= 0.0:
            raise ValueError(f"clip_norm should be >= 0, got {self.clip_norm}")

    def bounds(self) -> tuple[float, float]:
        return 0.0, self.clip_norm


@dataclass
class ClipGradByGlobalNorm(_ClipByNorm):
    """Scale all gradients of a parameter group by clip_norm / max(norm, clip_norm).

    The norm is that of all of them together. As in Paddle, the scaled gradients are written back to `p.grad`.

    Args:
        clip_norm: the largest norm.
        group_name: Paddle's; kept as an attribute without effect.
        auto_skip_clip: Paddle's; kept as an attribute without effect (a factor of 1 changes nothing).

    Raises:
        TypeError: clip_norm is not a number.
        ValueError: clip_norm is negative.
    """

    kind = "global_norm"
    group_name: str = "default_group"
    auto_skip_clip: bool = False


@dataclass
class ClipGradByNorm(_ClipByNorm):
    """Scale each gradient whose norm is larger than clip_norm by clip_norm / norm; `p.grad` stays as it is.

    Args:
        clip_norm: the largest norm.

    Raises:
        TypeError: clip_norm is not a number.
        ValueError: clip_norm is negative.
    """

    kind = "norm"


@dataclass
class ClipGradByValue(GradientClipBase):
    """Limit every element of a gradient to [min, max]; `p.grad` itself stays as it is.

    Args:
        max: the largest value.
        min: the smallest value; None means -max, and max must then be positive.

    Raises:
        TypeError: max or min is not a number.
        ValueError: max is not positive where min is None, or min > max.
    """

    kind = "value"
    max: float
    min: float | None = None

    def __post_init__(self) -> None:
        self.max = as_float("max", self.max)
        if self.min is None and not self.max > 0.0:
            raise ValueError(f"max should be > 0 where min is not given, got {self.max}")
        self.min = -self.max if self.min is None else as_float("min", self.min)
        if not self.min <= self.max:
            raise ValueError(f"min should be <= max, got min={self.min}, max={self.max}")

    def bounds(self) -> tuple[float, float]:
        """(min, max)."""
        return (-self.max if self.min is None else self.min), self.max


# The names in the documents of Paddle 2.0.
GradientClipByGlobalNorm = ClipGradByGlobalNorm
GradientClipByNorm = ClipGradByNorm
GradientClipByValue = ClipGradByValue

# Strategies are options of groups, so checkpoints hold them: torch.load(weights_only=True) may read them.
torch.serialization.add_safe_globals([ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue])
