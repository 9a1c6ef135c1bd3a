"""Learning-rate schedulers as Paddle writes them: objects given to the optimizer as its learning rate.

Source: paddle.optimizer.lr (Paddle 3). Such a scheduler does not know the optimizer: the user calls
`scheduler.step()`, and the optimizer asks `scheduler()` at every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._number import as_float

__all__ = ["LRScheduler", "PiecewiseDecay", "PiecewiseLR"]


class LRScheduler:
    """Base of the schedulers; a derived class defines `get_lr` from `self.last_epoch` and `self.base_lr`.

    Args:
        learning_rate: the initial learning rate, `self.base_lr`.
        last_epoch: the epoch before the first one; the constructor takes the first step.
        verbose: print the learning rate at every step.

    Raises:
        TypeError: learning_rate is not a number.
        ValueError: learning_rate is negative.
    """

    def __init__(self, learning_rate: float = 0.1, last_epoch: int = -1, verbose: bool = False) -> None:
        if not isinstance(learning_rate, (float, int)):
            raise TypeError(f"The type of learning rate must be float, but received {type(learning_rate)}")
        if learning_rate < 0:
            raise ValueError(f"Invalid learning rate: {learning_rate}")
        self.base_lr = float(learning_rate)
        self.last_lr = float(learning_rate)
        self.last_epoch = last_epoch
        self.verbose = verbose
        self.step()

    def __call__(self) -> float:
        """The learning rate of the current epoch."""
        return self.last_lr

    def get_lr(self) -> float:
        """The learning rate at `self.last_epoch`."""
        raise NotImplementedError(f"{type(self).__name__} must define get_lr()")

    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch, or to `epoch`.

        Raises:
            TypeError: `epoch`, or what get_lr() returns, is not a number. Nothing is changed.
        """
        if epoch is not None:
            as_float("epoch", epoch)
        before, self.last_epoch = self.last_epoch, self.last_epoch + 1 if epoch is None else epoch
        try:
            self.last_lr = as_float(f"what {type(self).__name__}.get_lr() returns", self.get_lr())
        except BaseException:
            self.last_epoch = before
            raise
        if self.verbose:
            print(f"Epoch {self.last_epoch}: {type(self).__name__} set learning rate to {self.last_lr}.")

    def state_dict(self) -> dict[str, Any]:
        """What changes over time: last_epoch and last_lr."""
        return {"last_epoch": self.last_epoch, "last_lr": self.last_lr}

    def set_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            RuntimeError: a key is missing; keys that are not known are a warning.
        """
        for key in ("last_epoch", "last_lr"):
            if key not in state_dict:
                raise RuntimeError(f"state_dict of {type(self).__name__} is not correct: it has no {key!r}")
        unknown = sorted(state_dict.keys() - {"last_epoch", "last_lr"})
        if unknown:
            warnings.warn(f"state_dict of {type(self).__name__} has unused values: {unknown}", stacklevel=2)
        self.last_epoch, self.last_lr = int(state_dict["last_epoch"]), float(state_dict["last_lr"])

    set_dict = set_state_dict
    load_state_dict = set_state_dict


class PiecewiseDecay(LRScheduler):
    """Constant pieces: values[i] while epoch < boundaries[i], and the last value from the last boundary on.

    Args:
        boundaries: the epochs at which the value changes, e.g. [2, 4, 6, 8].
        values: one more than there are boundaries, e.g. [0.2, 0.4, 0.6, 0.8, 1.0].
        last_epoch: the epoch before the first one: with 0 the first learning rate is that of epoch 1.
        verbose: print the learning rate at every step.

    Raises:
        TypeError: one of them is not a list of numbers.
        ValueError: there are no boundaries, or not more values than boundaries.
    """

    def __init__(
        self, boundaries: Sequence[int], values: Sequence[float], last_epoch: int = -1, verbose: bool = False
    ) -> None:
        for name, numbers in (("boundaries", boundaries), ("values", values)):
            if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Iterable):
                raise TypeError(f"{name} should be a list of numbers, got {numbers!r}")
            for number in numbers:
                as_float(f"each of {name}", number)
        if len(boundaries) == 0:
            raise ValueError("The boundaries cannot be empty.")
        if len(values) <= len(boundaries):
            raise ValueError(
                "The values have one more element than boundaries, but received "
                f"len(values) [{len(values)}] < len(boundaries) + 1 [{len(boundaries) + 1}]."
            )
        self.boundaries = list(boundaries)
        self.values = [float(v) for v in values]
        super().__init__(last_epoch=last_epoch, verbose=verbose)

    def get_lr(self) -> float:
        """The value of the piece in which `self.last_epoch` lies."""
        for boundary, value in zip(self.boundaries, self.values, strict=False):
            if self.last_epoch < boundary:
                return value
        return self.values[-1]


class PiecewiseLR(PiecewiseDecay):
    """`PiecewiseDecay` under the name in the document of RMSProp (Paddle 2.0), with another third argument.

    The document passes 0 and expects the first value first: it is the first epoch, not the one before it.

    Args:
        boundaries: as `PiecewiseDecay`.
        values: as `PiecewiseDecay`.
        begin: the first epoch.

    Raises:
        TypeError, ValueError: as `PiecewiseDecay`.
    """

    def __init__(self, boundaries: Sequence[int], values: Sequence[float], begin: int = 0) -> None:
        super().__init__(boundaries, values, last_epoch=begin - 1)
