"""Runs torchair's real FX -> GE conversion on CPU tensors: only leaf calls into the missing runtime are replaced.

Seven leaves, named in `prepare`. Everything above them is the wheel's own code: the converters, the graph passes,
the options, the placement of inputs, the write-back of mutated inputs. A converted graph is executed by
`interpreter.run`, so its numbers can be compared with eager torch.

    with record() as graphs:
        step = torchair.get_compiler(CompilerConfig())(gm, inputs)
        step(*tensors)
    graphs[0].counts()          # {"Data": 4, "Mul": 2, ...}
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import interpreter
import torch
from torch import Tensor

SOC = "Ascend910B2"
"""The chip that torch_npu reports (Atlas A2)."""

NOT_COMPUTE = frozenset({"Data", "RefData", "Const", "NetOutput"})


@dataclass
class GeGraph:
    """One graph that torchair handed to GE, with the options that it passed along."""

    proto: Any
    options: Mapping[str, str]
    runs: int = 0

    @property
    def ops(self) -> list[Any]:
        return list(self.proto.op)

    def counts(self) -> dict[str, int]:
        """Operation type -> how many."""
        return dict(Counter(op.type for op in self.ops))

    def compute_ops(self) -> list[Any]:
        """Without inputs, constants and the output."""
        return [op for op in self.ops if op.type not in NOT_COMPUTE]


@dataclass
class Recording:
    """What happened inside one `record()`; `failing` makes a leaf raise: {"load": RuntimeError("...")}.

    Leaves are "load", "compile", "run", and "write": run raises after it has written its in-place outputs.
    `only`: it raises for graphs with one of these operations, and for no others.
    """

    graphs: list[GeGraph] = field(default_factory=list)
    failing: dict[str, Exception] = field(default_factory=dict)
    only: frozenset[str] = frozenset()

    def __getitem__(self, index: int) -> GeGraph:
        return self.graphs[index]

    def __len__(self) -> int:
        return len(self.graphs)


_recordings: list[Recording] = []
_prepared = False


def _raise_if_failing(leaf: str, graph: Any) -> None:
    for recording in _recordings:
        if leaf in recording.failing and (not recording.only or {op.type for op in graph.op} & recording.only):
            raise recording.failing[leaf]


def _load(self: Any, graph: Any, options: Mapping[str, str] | None = None) -> None:
    _raise_if_failing("load", graph)
    self.recorded = GeGraph(graph, dict(options or {}))
    for recording in _recordings:
        recording.graphs.append(self.recorded)


def _compile(self: Any) -> None:
    _raise_if_failing("compile", self.recorded.proto)


def _run(
    self: Any, inputs: Sequence[Tensor], assigned_outputs: Sequence[Tensor | None] = (), stream: object = None
) -> list[Tensor]:
    _raise_if_failing("run", self.recorded.proto)
    self.recorded.runs += 1
    results = interpreter.run(self.recorded.proto, inputs, assigned_outputs)
    _raise_if_failing("write", self.recorded.proto)
    return results


def prepare() -> None:
    """Replace the leaves, once per process: two of them also run when Python exits."""
    global _prepared
    if _prepared:
        return
    import torch_npu  # first: it puts torchair on sys.path
    from torchair.core import _backend, _torchair

    _torchair.InitializeGraphEngine = lambda options: None
    _torchair.FinalizeGraphEngine = lambda: None
    torch_npu.npu.current_device = lambda: 0  # torchair and torch.optim ask; the driver would be initialised
    torch_npu.npu.get_device_name = lambda *args, **kwargs: SOC  # converters ask for the chip
    _backend.TorchNpuGraph.load = _load
    _backend.TorchNpuGraph.compile = _compile
    _backend.TorchNpuGraph.run = _run
    _prepared = True


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Collects the graphs that reach GE inside the block."""
    prepare()
    recording = Recording()
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings.remove(recording)


def convert(gm: torch.fx.GraphModule, fake_mode: Any, config: Any = None) -> Any:
    """The graph, already functional, through torchair's public compiler: no Dynamo, no AOTAutograd."""
    prepare()
    import torchair

    fakes = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
        return torchair.get_compiler(config or torchair.CompilerConfig())(gm, fakes)
