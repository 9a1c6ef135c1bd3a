"""The result of `find`: a kernel with its scalars, or why there is none.

A lowering emits the dedicated operation of a matched group so, for every member (`group.members[k]`):

- The lowering's own table has an operation for `kernel`, whose tensor inputs are `kernel.inputs`, its numbers
  `kernel.scalars`.
- `outputs` says which slot of the group's formula is var, m, v, ...: the operation writes those leaves in place. It
  writes every tensor that the group writes. 0-dim leaves that the group writes (step counters) are no part of a match:
  the formula's own writes to them hold as without one.
- `operands` has all arguments. `operands.slot[name]` is a slot of the group's formula where the operation reads a
  tensor as it is stored; everything else is written by `operands.formula`, a formula as any other: its writes to tensor
  slots are elementwise operations ahead of the dedicated one (grad + weight_decay·param), its writes to scalar slots
  are the numbers, on the host, in float64, to be cast to what the operation takes. They depend on the member (step
  counters differ), on slots as they are before the step, and never on tensors.
- Contributions to totals are computed as without a match.

The dtypes of the slots say whether the operation takes them; `tolerance` and `assumptions` what may differ. Beyond that
an operation that takes its numbers in float32 computes 1 - beta2 of a rounded beta2: for 0.999 it is 1.3e-5 off, and so
is the second moment. A lowering that promises more may not use such an operation.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from npu_fuse_pass.ir.expr import Expr
from npu_fuse_pass.ir.fused_op import evaluate
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.text import serialise
from npu_fuse_pass.ir.types import Formula, Slot
from npu_fuse_pass.match.known_kernels import KnownKernel


@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """All arguments of a matched kernel for one member.

    Attributes:
        formula: its slots are those of the group's formula, then one for every number in `constants`, then one for
            every argument that it computes, named in `computed`; its writes fill those.
        constants: the values of scalar slots that are not the group's.
        slot: for every argument of the kernel the slot of `formula` that holds it.
        computed: the arguments that `formula` writes.
    """

    formula: Formula
    constants: Mapping[int, float]
    slot: Mapping[str, int]
    computed: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        tolerance: how far the kernel may be from the formula, per step, by the narrowest dtype of the update's tensors;
            relative to the largest value that an addition or subtraction of the update reads.
    """

    kernel: KnownKernel
    outputs: Mapping[str, int]
    inputs: Mapping[str, Expr]
    scalars: Mapping[str, Expr]
    slots: tuple[Slot, ...]
    constants: Mapping[int, float]
    assumptions: tuple[str, ...]
    tolerance: float

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Match({self.kernel.name})"

    @functools.cached_property
    def operands(self) -> Operands:
        """The arguments as one formula."""
        computed = {**{name: self.inputs[name] for name in self.prepared}, **self.scalars}
        slots = (*self.slots, *(Slot(e.tensor, e.dtype) for e in computed.values()))
        slot = {name: len(self.slots) + i for i, name in enumerate(computed)}
        stored = {n: e.value for n, e in self.inputs.items() if n not in slot and isinstance(e.value, int)}
        writes = tuple((slot[name], e) for name, e in computed.items())
        formula = Formula(slots, writes, (), serialise(slots, writes, ()))
        return Operands(formula, self.constants, {**stored, **slot}, tuple(computed))

    @property
    def prepared(self) -> list[str]:
        """The inputs that have to be computed first."""
        return [name for name, e in self.inputs.items() if e.op != "leaf"]

    def arguments(self, tensors: Mapping[int, Tensor], scalars: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The values of the scalars for one member; with its tensors those of the inputs, too."""
        chosen = {**(self.inputs if tensors else {}), **self.scalars}
        numbers = {
            slot: torch.tensor(value, dtype=torch.float64, device="cpu") for slot, value in self.constants.items()
        }
        formula = Formula(self.slots, (), tuple(chosen.values()), "")
        found = evaluate(formula, dict(tensors), {**scalars, **numbers})
        return {name: found[id(e)] for name, e in chosen.items()}

    def readable(self, labels: Sequence[str]) -> dict[str, str]:
        """Scalars and prepared inputs as mathematics over the formula's labels; values used several times are named x0,
        x1, ...
        """
        operands = self.operands
        names = (*labels, *(f"{number:g}" for number in self.constants.values()), *operands.computed)
        text = re.sub(r"\b(\w+)'", r"\1", readable(operands.formula, names))
        return dict(line.split(" = ", 1) for line in text.splitlines())


@dataclasses.dataclass(frozen=True)
class NoMatch:
    """No kernel computes a formula: which one comes nearest and what is different."""

    reason: str
    agreed: int = 0

    def __bool__(self) -> bool:
        return False
