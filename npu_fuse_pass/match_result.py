"""What `match` finds: a kernel with its scalars, or why there is none."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .ir import Expr, Formula, Slot, serialise
from .kernels import Kernel
from .ops import evaluate
from .symbols import readable

TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far a matched kernel may be from the formula, per step and by the narrowest dtype of the update's tensors.

The two are equal in exact arithmetic; only roundings differ. Relative to the largest value that an addition or
subtraction of the update reads.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A kernel computes a formula, in exact arithmetic.

    Attributes:
        kernel: which one.
        outputs: for every tensor that the kernel writes, the formula's slot.
        inputs: for every tensor that it reads, an expression over `slots`: a leaf as it is stored, or what has to be
            computed first, in the arithmetic dtype.
        scalars: for every number, a 0-dim float64 expression over `slots`.
        slots: those of the formula, and behind them one for every number in `constants`.
        constants: values of the additional slots.
        assumptions: what the equality needs beyond finite values.
        tolerance: see `TOLERANCES`.
    """

    kernel: Kernel
    outputs: Mapping[str, int]
    inputs: Mapping[str, Expr]
    scalars: Mapping[str, Expr]
    slots: tuple[Slot, ...]
    constants: Mapping[int, float]
    assumptions: tuple[str, ...]
    tolerance: float

    def __bool__(self) -> bool:
        return True

    @property
    def prepared(self) -> list[str]:
        """The inputs that have to be computed first."""
        return [name for name, e in self.inputs.items() if e.op != "leaf"]

    def arguments(self, tensors: Mapping[int, Tensor], scalars: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The values of the scalars for one member; with its tensors those of the inputs, too."""
        chosen = {**(self.inputs if tensors else {}), **self.scalars}
        numbers = {slot: torch.tensor(value, dtype=torch.float64) for slot, value in self.constants.items()}
        formula = Formula(self.slots, (), tuple(chosen.values()), "")
        found = evaluate(formula, dict(tensors), {**scalars, **numbers})
        return {name: found[id(e)] for name, e in chosen.items()}

    def readable(self, labels: tuple[str, ...]) -> str:
        """What the scalars and the prepared inputs are, as mathematics over the formula's labels."""
        shown = {**{name: self.inputs[name] for name in self.prepared}, **self.scalars}
        slots = (*self.slots, *(Slot(e.tensor, e.dtype) for e in shown.values()))
        writes = tuple((len(self.slots) + i, e) for i, e in enumerate(shown.values()))
        names = (*labels, *(f"{self.constants[i]:g}" for i in range(len(labels), len(self.slots))), *shown)
        text = readable(Formula(slots, writes, (), serialise(slots, writes, ())), names)
        return re.sub(r"\b(\w+)'", r"\1", text)


@dataclasses.dataclass(frozen=True)
class NoMatch:
    """No kernel computes a formula: which one comes nearest and what is different."""

    reason: str
    agreed: int = 0

    def __bool__(self) -> bool:
        return False
