"""The result of `find`: a kernel with its scalars, or why there is none.

A lowering with an operation for the kernel gets this of it, for every member (`group.members[k]`):

- `outputs` says which slot of the group's formula is var, m, v, ...: the operation writes those leaves in place. It
  writes every tensor that the group writes. 0-dim leaves that the group writes (step counters) are no part of a match:
  the formula's own writes to them hold as without one.
- `inputs` are its tensors: a leaf as it is stored, or what elementwise operations compute ahead of it
  (grad + weight_decay·param).
- `scalars` are its numbers, for the host, in float64, to be cast to what the operation takes. They depend on the member
  (step counters differ), on slots as they are before the step, and never on tensors.
- Contributions to totals are computed as without a match.

The dtypes of the slots say whether the operation takes them; `tolerance` and `assumptions` what may differ. Beyond that
an operation that takes its numbers in float32 computes 1 - beta2 of a rounded beta2: for 0.999 it is 1.3e-5 off, and so
is the second moment. A lowering that promises more may not use such an operation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from npu_fuse_pass.ir.expr import Expr
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.types import Formula, Slot
from npu_fuse_pass.match.known_kernels import KnownKernel


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

    def __repr__(self) -> str:
        return f"Match({self.kernel.name})"

    @property
    def prepared(self) -> list[str]:
        """The inputs that have to be computed first."""
        return [name for name, e in self.inputs.items() if e.op != "leaf"]

    def readable(self, labels: Sequence[str]) -> dict[str, str]:
        """Scalars and prepared inputs as mathematics over the formula's labels; values used several times are named x0,
        x1, ...
        """
        computed = {**{name: self.inputs[name] for name in self.prepared}, **self.scalars}
        slots = (*self.slots, *(Slot(e.tensor, e.dtype) for e in computed.values()))
        writes = tuple(enumerate(computed.values(), len(self.slots)))
        names = (*labels, *(f"{number:g}" for number in self.constants.values()), *computed)
        text = re.sub(r"\b(\w+)'", r"\1", readable(Formula(slots, writes, (), ""), names))
        return dict(line.split(" = ", 1) for line in text.splitlines())


@dataclasses.dataclass(frozen=True)
class NoMatch:
    """No kernel computes a formula: which one comes nearest and what is different."""

    reason: str
