"""What a lowering gives: a program that runs a step, and what all of them refuse."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol, runtime_checkable

from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.ir.types import Group, LeafValues
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.rules.prelude import InputCheck


class Program(Protocol):
    """What a lowering gives: runs one step on the values of all leaves.

    `kinds` is an opaque token: equal tokens promise equal dtypes, sizes and strides; None promises nothing.
    """

    begun: bool  # set before the first write that outlives the call; the caller takes it back when the step is done
    written: bool  # set as soon as all is written, where interrupts are held until then

    def __call__(self, values: LeafValues, complete: bool = False, kinds: object = None) -> None: ...


@runtime_checkable
class CheckingProgram(InputCheck, Protocol):
    """A program that can check a step's tensors natively, without a Python object for each: the CPU's."""

    def checks(self, params: Set[int]) -> bool: ...
    def again(self) -> None: ...


def check_written_once(group: Group) -> None:
    """Refuse a group of which several members write one 0-dim tensor: they are computed side by side."""
    for slot in group.formula.written:
        if len({member[slot] for member in group.members}) != len(group.members):
            raise Unsupported(group.name, "several members write the same 0-dim tensor", Code.SAME_SCALAR)
