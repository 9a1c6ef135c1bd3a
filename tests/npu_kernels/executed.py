"""Steps by generated kernels on this CPU: compiled by the real compiler, the last IR executed by `machine`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.ir.types import Group, Grouped, Leaf
from npu_fuse_pass.lowerings.npu.kernels import block
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel
from npu_fuse_pass.lowerings.npu.kernels.launch import Generated, generate_group
from npu_fuse_pass.lowerings.npu.program import Program
from npu_fuse_pass.passes.group import group
from tests.npu_kernels import machine
from tests.npu_kernels.compiler import final_ir
from tests.support.graphs import captured_step, inputs_of_step

CORES = 40


def compiled(kernel: Kernel) -> str:
    return final_ir(kernel.text)


@functools.cache
def executable(text: str) -> machine.Kernel:
    return machine.Kernel(final_ir(text))


class Cores:
    """Stands for hardware: the real compiler as far as it goes, launches that execute the last IR, and are counted.

    Attributes:
        chunk: the elements of a chunk; None: as many as the compiler has room for.
        failing: makes a stage raise: "compile", "load", "launch", "write" (after it has written).
    """

    target, identity = "Ascend910B3", "the wheel"

    def __init__(self, blocks: int = CORES, chunk: int | None = None, calls_back: bool = False) -> None:
        self.blocks, self.chunk, self.calls_back = blocks, chunk, calls_back
        self.launched: list[str] = []
        self.failing: dict[str, Exception] = {}

    def _may_fail(self, stage: str) -> None:
        if stage in self.failing:
            raise self.failing[stage]

    def last_ir(self, kernel: Kernel) -> str:
        self._may_fail("compile")
        return final_ir(kernel.text)

    def load(self, kernel: Kernel) -> None:
        self._may_fail("load")

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        self._may_fail("launch")
        self.launched.append(kernel.name)
        executable(kernel.text)(min(self.blocks, rows), *arguments)
        self._may_fail("write")


@functools.cache
def _blocks() -> dict[str, int]:
    return {}


def generated(made: Group, leaves: Sequence[Leaf], size: int | None = None) -> Generated:
    """A group's kernels, with the largest block that has two buffers, or a given one."""

    def chosen(kernels: Callable[[int], Any]) -> int:
        if size is not None:
            return size
        key = made.formula.text
        if key not in _blocks():
            _blocks()[key] = block.largest(kernels, compiled)
        return _blocks()[key]

    return generate_group(made, leaves, chosen)


def generated_groups(grouped: Grouped, size: int | None = None) -> list[Generated]:
    return [generated(g, grouped.leaves, size) for g in grouped.groups]


def kernels_of(program: Program) -> list[Generated]:
    """Those of all groups, each of which has some."""
    found = [lowered.generated for lowered in program.groups]
    assert all(made is not None for made in found), [lowered.note for lowered in program.groups]
    return [made for made in found if made is not None]


def captured_rules(optimizer: Any) -> Grouped:
    """The step of an optimizer of ours, in groups."""
    return group(captured_step(optimizer))


class RuleStep:
    """The step of an optimizer of ours by generated kernels."""

    def __init__(self, optimizer: Any, blocks: int = CORES, size: int | None = None) -> None:
        self.optimizer, self.cores = optimizer, Cores(blocks, size)
        captured = captured_rules(optimizer)
        self._leaves = captured.leaves
        self._program = Program(captured.leaves, captured.groups, hardware=self.cores)
        self.groups = kernels_of(self._program)

    def step(self) -> None:
        given = inputs_of_step(self.optimizer)
        values = [*given, *[None] * (len(self._leaves) - len(given))]
        self._program(values, complete=True)


class GraphBackend:
    """A backend for torch.compile: captured graphs of steps run by generated kernels; `run=False`: as they are."""

    def __init__(self, blocks: int = CORES, size: int | None = None, run: bool = True) -> None:
        self.cores, self._run = Cores(blocks, size), run
        self.groups: list[Generated] = []
        self.captured: list[Grouped] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        captured = capture(gm)
        if not captured.updates:
            return gm.forward
        assert not captured.unfused, captured.unfused
        assert not captured.segments, "operations between kernels"
        grouped = group(captured)
        self.captured.append(grouped)
        if not self._run:
            return gm.forward
        program = Program(grouped.leaves, grouped.groups, hardware=self.cores)
        self.groups += kernels_of(program)

        def run(*arguments: Tensor) -> tuple[Any, ...]:
            values: list[Any] = [None] * len(grouped.leaves)
            for i, leaf in enumerate(grouped.leaves):
                if leaf.kind == "input":
                    values[i] = arguments[leaf.index]
                elif leaf.kind == "attribute":
                    values[i] = getattr(gm, leaf.name)
            program(values, complete=True)
            return tuple(o.literal if o.leaf is None else values[o.leaf] for o in captured.returned)

        return run
