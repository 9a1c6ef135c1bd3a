"""What scripts/conversion_table.py measures: one optimizer step on its way to a GE graph, through one path."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from conversion_cases import Make

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.environment import require
from npu_fuse_pass.lowerings.npu.graph import graph as npu_graph
from npu_fuse_pass.lowerings.npu.graph import list_converters

harness: Any = importlib.import_module("harness")  # tests/npu/harness.py


class NotRunError(Exception):
    """The graph was converted; the table does not need its numbers."""


@dataclasses.dataclass
class Conversion:
    """One step through one path to GE.

    Attributes:
        blockers: why there is no GE graph, or not only GE graphs; empty if all went well.
        nodes: of the graphs that reached GE, together: FX, GE, and GE's compute nodes.
        seconds: processor time of the first compiled step; of that, from the graph that Dynamo captured to the graph
            that GE gets; and of that, torchair's part.
    """

    blockers: list[str]
    nodes: tuple[int, int, int] = (0, 0, 0)
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)


@contextlib.contextmanager
def as_shipped() -> Iterator[None]:
    """Torchair without the converters that this package adds to it."""
    require()
    added = {op: op._ge_converter for op in list_converters.REPLACED}
    put(list_converters.REPLACED)
    try:
        yield
    finally:
        put(added)


def put(converters: Mapping[Any, Any]) -> None:
    """Make these the operations' converters; None: there is none."""
    for op, converter in converters.items():
        if converter is not None:
            op._ge_converter = converter
        elif hasattr(op, "_ge_converter"):
            del op._ge_converter


def lacks_converter(node: torch.fx.Node) -> bool:
    """Whether torchair cannot convert an operation."""
    return isinstance(node.target, torch._ops.OpOverload) and list_converters.lacks(node.target)


def written_by(node: torch.fx.Node) -> int:
    """How many tensors an operation writes."""
    if node.target is npu_graph.device_write:
        return len(node.args[0])  # type: ignore[arg-type]
    return int(node.target is torch.ops.aten.copy_.default)


class Watch:
    """torchair's configuration that looks at the graphs which torchair gets; when they are captured, given, done."""

    def __init__(self) -> None:
        import torchair

        self.config = torchair.CompilerConfig()
        self.config.post_grad_custom_pre_pass = self._look
        self.fx_nodes = 0
        self.written = 0
        self.missing: dict[str, None] = {}
        self.captured: list[float] = []
        self.started: list[float] = []
        self.loaded: list[float] = []

    def _look(self, gm: torch.fx.GraphModule, *given: object) -> None:
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        self.fx_nodes += len(calls)
        self.written += sum(map(written_by, calls))
        self.missing |= dict.fromkeys(str(node.target) for node in calls if lacks_converter(node))
        self.started.append(time.process_time())

    def backend(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A Dynamo backend that takes the time when Dynamo calls it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.captured.append(time.process_time())
            return inner(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def loads(self) -> Iterator[None]:
        """Takes the time when a finished graph is handed to GE."""
        graph_class = importlib.import_module("torchair.core._backend").TorchNpuGraph
        load = graph_class.load

        def timed(*args: Any, **kwargs: Any) -> None:
            self.loaded.append(time.process_time())
            load(*args, **kwargs)

        graph_class.load = timed
        try:
            yield
        finally:
            graph_class.load = load


def convert(make: Make, n: int, ours: bool, by_rule: bool = False) -> Conversion:
    """The second step of an optimizer with n parameters: ours, or as torchair does it alone.

    Args:
        by_rule: a class of torch.optim, by `compile_step`, for which Dynamo captures nothing.
    """
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    harness.prepare()
    import torchair

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4 + k % 3, 5, generator=generator)) for k in range(n)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = make(params)
    optimizer.step()
    watch = Watch()
    backend: Any = npu_fused if ours else torchair.get_npu_backend(compiler_config=watch.config)
    options: Any = {"options": {"platform": "npu", "torchair_config": watch.config}} if ours else {}
    step: Callable[[], object]
    if by_rule:
        step = npu_fuse_pass.compile_step(optimizer, **options["options"])
    else:
        step = torch.compile(optimizer.step, backend=watch.backend(backend), dynamic=False, **options)
    raised: list[str] = []
    with warnings.catch_warnings(), harness.record() as graphs, watch.loads():
        warnings.simplefilter("ignore")
        if not ours:  # ours runs, as on a device: the first run is a part of it
            graphs.failing["run"] = NotRunError()
        begin = time.process_time()
        try:
            step()
        except Exception as error:
            inner = getattr(error, "inner_exception", error)
            raised = [] if isinstance(inner, NotRunError) else [f"{type(inner).__name__}: {inner}".splitlines()[0][:80]]
        total = time.process_time() - begin
    ge_nodes, compute = (sum(len(nodes) for nodes in found) for found in _ge_nodes(graphs))
    begun = [(times or [begin])[0] for times in (watch.captured, watch.started)] if watch.loaded else []
    converting, within = (watch.loaded[-1] - at for at in begun) if begun else (0.0, 0.0)
    found = _not_ours() if ours else (list(watch.missing) or raised if raised else [])
    if not found and watch.written < n:  # every parameter and state that a graph updates is written at its end
        found = ["Dynamo breaks the graph: no graph of the whole update reaches torchair"]
    return Conversion(found, (watch.fx_nodes, ge_nodes, compute), (total, converting, within))


def _ge_nodes(graphs: Any) -> tuple[list[Any], list[Any]]:
    return [graph.ops for graph in graphs], [graph.compute_ops() for graph in graphs]


def _not_ours() -> list[str]:
    """What the reports say of updates that did not become GE nodes."""
    return [str(r.fallback) for r in npu_fuse_pass.reports() if r.fallback is not None]
