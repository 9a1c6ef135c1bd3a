"""What the pass did with a graph: one `CompileReport` per compile, the last 64 kept."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .ir import Unfused


@dataclasses.dataclass
class GroupReport:
    """One fused group.

    Attributes:
        name: the same in dumps, kernels, profiles and graphs.
        formula: the update as readable mathematics.
        updates: number of parameters.
        kernel: what computes it.
        bytes_per_element: memory read and written per parameter element and step.
        launches: kernel calls per step.
        elements: how many the group's parameters have together.
        writes: "leaves" (parameters and states), or "temporaries" that original operations read.
    """

    name: str
    formula: str
    updates: int
    dtype: str
    device: str
    lowering: str
    kernel: str
    bytes_per_element: int
    launches: int
    elements: int = 0
    writes: str = "leaves"


@dataclasses.dataclass
class CompileReport:
    """The result of one compile; `print` it.

    Attributes:
        platform: what the groups were lowered to ("cpu", "npu", "eager").
        torch: version.
        seconds: time of every stage.
        groups: what was fused.
        unfused: operations that were not, each with its reason.
        fallback: why the original graph runs instead, or None.
        cause: "compile", or what changed when an optimizer's parameters were planned anew.
        bytes_per_element: memory that a step reads and writes for each parameter element: "before", if every operation
            of the original went over memory by itself, and "after".
        graph_break: why and where Dynamo ended this graph, if the function goes on after it; nothing fuses across.
    """

    platform: str
    torch: str = torch.__version__
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    groups: list[GroupReport] = dataclasses.field(default_factory=list)
    unfused: list[Unfused] = dataclasses.field(default_factory=list)
    fallback: str | None = None
    cause: str = "compile"
    bytes_per_element: dict[str, float] = dataclasses.field(default_factory=dict)
    graph_break: str | None = None
    _graph: Callable[[], fx.GraphModule] | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def fused_graph(self) -> fx.GraphModule | None:
        """The rewritten graph (built when first asked for): an FX graph module that prints and runs."""
        return self._graph() if self._graph is not None else None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and strings; the keys are stable."""
        fields = {f.name for f in dataclasses.fields(self)} - {"_graph"}
        return {k: v for k, v in dataclasses.asdict(dataclasses.replace(self, _graph=None)).items() if k in fields}

    def __str__(self) -> str:
        updates = sum(g.updates for g in self.groups if g.writes == "leaves")
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        head = (
            f"npu_fused on {self.platform}: {updates} parameters -> {sum(g.launches for g in self.groups)} kernel "
            f"calls per step, compiled in {sum(self.seconds.values()):.2f} s ({stages})"
        )
        lines = [head]
        for g in self.groups:
            lines.append(
                f"  {g.name}  {g.updates} x {g.dtype} on {g.device}  {g.bytes_per_element} bytes/element  "
                f"{g.launches} x {g.kernel}"
            )
            lines += [f"      {line}" for line in g.formula.splitlines()]
        if self.bytes_per_element:
            before, after = self.bytes_per_element["before"], self.bytes_per_element["after"]
            lines.append(f"  memory traffic: {after:.0f} bytes/element, operation by operation {before:.0f}")
        lines += [f"  unfused {u.op}: {u.reason}" for u in self.unfused]
        if self.graph_break:
            lines.append(f"  the graph ends at a break: {self.graph_break}")
        if self.fallback:
            lines.append(f"  FALLBACK to the original: {self.fallback}")
        return "\n".join(lines)


_reports: collections.deque[CompileReport] = collections.deque(maxlen=64)


def reports() -> list[CompileReport]:
    """Reports of the last 64 compiles in this process, oldest first."""
    return list(_reports)


def clear_reports() -> None:
    """Forget all reports."""
    _reports.clear()


def record(report: CompileReport) -> None:
    """Keep a report."""
    _reports.append(report)
