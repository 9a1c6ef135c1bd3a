"""Where the inputs of a GE graph lie on a machine with an NPU, and which of them it writes in place.

torchair decides that while it converts, from the devices of the fake tensors that it is given. So a graph which ran on
the CPU is converted once more, unchanged, with fake tensors on "npu:0" for everything that is in the memory of
parameters, gradients and states, and on the host for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import harness
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_fuse_pass.lowerings.npu.environment import require

IN_PLACE = "ge.exec.outputReuseInputMemIndexes"
ON_NPU = 1  # in torchair's _input_placements; 0 is the host


@dataclasses.dataclass
class Given:
    """What torchair was given once, and the tensors with which the converted graph ran last."""

    gm: torch.fx.GraphModule
    inputs: Sequence[Tensor] = ()


@contextmanager
def watched() -> Iterator[list[Given]]:
    """Remembers every graph that is handed to torchair's compiler, and what it is called with."""
    torchair = require()
    seen: list[Given] = []
    get_compiler = torchair.get_compiler

    def spying(config: Any) -> Callable[..., Any]:
        def compiler(gm: torch.fx.GraphModule, fakes: Any) -> Callable[..., Any]:
            given = Given(gm)
            seen.append(given)
            compiled = get_compiler(config)(gm, fakes)

            def call(*inputs: Tensor) -> Any:
                given.inputs = inputs
                return compiled(*inputs)

            return call

        return compiler

    torchair.get_compiler = spying
    try:
        yield seen
    finally:
        torchair.get_compiler = get_compiler


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where a tensor lies."""

    begin: int
    end: int

    @classmethod
    def of(cls, t: Tensor) -> Memory:
        """Of a tensor whose elements fill a block, in any order."""
        return cls(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())

    def within(self, others: Iterable[Memory]) -> bool:
        return any(other.begin <= self.begin and self.end <= other.end for other in others)

    def touches(self, others: Iterable[Memory]) -> bool:
        return any(self.begin < other.end and other.begin < self.end for other in others)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A graph as it is on an NPU.

    Attributes:
        in_place: the inputs whose memory an output of GE goes to.
        host: the inputs that lie on the host.
        inputs: the memory of each.
    """

    in_place: frozenset[int]
    host: frozenset[int]
    inputs: tuple[Memory, ...]

    def written(self) -> list[Memory]:
        """The memory that the graph writes."""
        return [self.inputs[i] for i in self.in_place]


def placed(given: Given, on_device: Sequence[Tensor]) -> Placed:
    """Convert once more, with what is in the memory of `on_device` on an NPU."""
    import torch_npu

    torch_npu.npu._lazy_init = lambda: None
    device_memory = [Memory.of(t) for t in on_device]
    mode = FakeTensorMode()
    placeholders = given.gm.graph.find_nodes(op="placeholder")
    inputs = tuple(Memory.of(t) for t in given.inputs)
    with mode:
        for node, memory, value in zip(placeholders, inputs, given.inputs, strict=True):
            device = "npu:0" if memory.touches(device_memory) else "cpu"
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=device)
    runner = harness.convert(given.gm, mode).runner
    options = runner._normalize_ge_option()[0]  # pairs "input,output"
    pairs = [pair.split(",") for pair in options.get(IN_PLACE, "").split("|") if pair]
    places = list(runner.graph.attr["_input_placements"].list.i)
    assert len(places) == len(inputs)
    host = frozenset(i for i, place in enumerate(places) if place != ON_NPU)
    return Placed(frozenset(int(index) for index, _ in pairs), host, inputs)
