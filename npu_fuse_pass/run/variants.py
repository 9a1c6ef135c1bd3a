"""The variants of a step: a program for each outcome of its tests of numbers against 0 (`passes.specialise`).

Few numbers ever become 0 or cease to be, so that is one compile more, announced with its cause; a program is kept for
when its outcome comes back. Where too many have been made, the next one leaves the tests as they are and serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from npu_fuse_pass.lowerings.program import CheckingProgram
from npu_fuse_pass.options import Options
from npu_fuse_pass.pipeline import Fused, Number
from npu_fuse_pass.report.causes import Cause, decided_otherwise
from npu_fuse_pass.run.check_numerics import SideBySide

_MOST = 8


class Variant:
    """A program of a step, and the captured step that it was made for.

    Attributes:
        program: None where the original runs.
        input_check: the program, if it can check its tensors natively.
        report: of its compile.
        captured: the step.
        check: compares it with the original, if that was asked for.
        rounds_once: the original computes in float32 and rounds what it stores, as rules do.
    """

    rounds_once = True

    def __init__(self, fused: Fused, options: Options) -> None:
        self.program, self.report, self.captured = fused.program, fused.report, fused.captured
        self.input_check = fused.program if isinstance(fused.program, CheckingProgram) else None
        checked = options.check_numerics and fused.program is not None
        self.check = None
        if checked:
            self.check = SideBySide(fused.grouped, fused.report, self.rounds_once, fused.captured.put_right)

    def end(self) -> None:
        """Note that a step is over, fused or not: nothing is begun."""
        if self.program is not None:
            self.program.begun = False

    def differing(self, number: Number) -> list[tuple[str, bool]]:
        """The numbers whose comparison with 0 differs from this variant's: names, and True for those that are 0."""
        found = [(d, (t := number(d.leaf)) is not None and t.item() == 0) for d in self.captured.decided]
        return [(d.label, zero) for d, zero in found if zero != d.zero]


V = TypeVar("V", bound=Variant)


class Variants(Generic[V]):
    """The variants made so far; `newest` ran last."""

    def __init__(self, first: V) -> None:
        self._made = [first]

    @property
    def newest(self) -> V:
        return self._made[0]

    def of(self, number: Number, make: Callable[[Cause, Number | None], V]) -> V:
        """The variant for the numbers of a step.

        Args:
            number: the value of a leaf.
            make: a new one, for these numbers, or for any.
        """
        differing = self.newest.differing(number)
        if differing:
            found = next((v for v in self._made if not v.differing(number)), None)
            if found is None:
                found = make(decided_otherwise(differing), number if len(self._made) < _MOST else None)
            else:
                self._made.remove(found)
            self._made.insert(0, found)
        return self.newest
