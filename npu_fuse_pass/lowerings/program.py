"""What a lowering gives: a program that runs a step."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol, runtime_checkable

from torch import Tensor

from npu_fuse_pass.rules.prelude import Watch


class Program(Protocol):
    """What a lowering gives: runs one step on the values of all leaves; what `kinds` is, see the CPU's."""

    written: bool  # whether all is written, set as soon as it is, where interrupts are held until then

    def __call__(self, values: list[Tensor | None], complete: bool = False, kinds: object = None) -> None: ...


@runtime_checkable
class Watching(Watch, Protocol):
    """A program that can look at a step's tensors itself, with no Python object for each of them: the CPU's."""

    def looks(self, params: Set[int]) -> bool: ...
    def again(self) -> None: ...
