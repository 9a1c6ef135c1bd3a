"""The stages of a compile, in order: captured -> specialised -> grouped -> matches -> a program, and its report.

Each stage is a pure function of what the one before it gave. The target is chosen once, after capture, and passed on;
the report is an output that no stage reads.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from npu_fuse_pass import lower
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.capture.rule import Calls, capture_batches, outline
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.folder import wanted
from npu_fuse_pass.errors import UnfusedError
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.ir import verify
from npu_fuse_pass.ir.types import Captured, Grouped, Leaf
from npu_fuse_pass.lowerings.cpu import graph_op
from npu_fuse_pass.lowerings.program import Program
from npu_fuse_pass.match.find import match
from npu_fuse_pass.match.result import NoMatch
from npu_fuse_pass.options import Options, Target
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.passes.rewrite import rewrite
from npu_fuse_pass.passes.specialise import decide
from npu_fuse_pass.report.causes import FIRST, Cause
from npu_fuse_pass.report.logs import announce, timed, warn_unfused
from npu_fuse_pass.report.net import net
from npu_fuse_pass.report.report import CompileReport, is_listed, list_last, record
from npu_fuse_pass.report.rows import Matches, show_matches
from npu_fuse_pass.rules.batch import Batch, inputs_of

log = logging.getLogger(__name__)

Number = Callable[[Leaf], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Fused:
    """The result of the stages; without a program the original has to run, and the report says why.

    Attributes:
        graph: the rewritten graph, where another compiler takes it over.
        another: makes a program like this one for the tensors of another optimizer.
    """

    report: CompileReport
    captured: Captured = dataclasses.field(default_factory=lambda: Captured([], [], []))
    grouped: Grouped = dataclasses.field(default_factory=Grouped)
    program: Program | None = None
    graph: fx.GraphModule | None = None
    another: Callable[[], Program] | None = None


def fuse_graph(
    gm: fx.GraphModule,
    options: Options,
    cause: Cause = FIRST,
    graph_break: str | None = None,
    number: Number | None = None,
) -> Fused:
    """Fuse a captured graph.

    Args:
        cause: why it is compiled, for the report.
        graph_break: why Dynamo ended the graph, for the report.
        number: the value of a leaf, None where it is not known: the program may be for such numbers only.

    Raises:
        UnfusedError: `strict`, and something was left unfused.
    """
    report = _report(options, cause, graph_break)
    with net(report, options), _without_collection():
        with timed(report.seconds, "capture") as said:
            captured = capture(gm, numbers=options.platform != "npu", dimensions=options.platform != "npu")
            target = lower.choose(options.platform, captured.leaves)
            if target.platform == "npu" and options.platform != "npu":  # only the tensors have told so
                captured = capture(gm, numbers=True)
            said.append(captured.summary)
        return _finished(_fuse(captured, target, report, options, number=number), options, gm)
    return _finished(Fused(report), options, gm)


def fuse_batches(
    batches: Sequence[Batch],
    options: Options,
    cause: Cause = FIRST,
    number: Number | None = None,
    apart: str | None = None,
    replaces: str | None = None,
) -> Fused:
    """Fuse the step of an optimizer with update rules; as `fuse_graph`. `apart`, `replaces`: for the report.

    The first compiles of optimizers that are alike are one, for as long as its report is listed in `reports()`.
    """
    key: object = None  # equal where one compile serves both; None where it serves one optimizer alone
    calls: Calls = {}
    if cause is FIRST and apart is None and not options.check_numerics and wanted(options.dump) is None:
        with net(_report(options, cause), options):
            if (found := outline(batches, calls)) is not None:
                key = (found, replaces, options.platform, options.strict, options.verify)
    known = None if key is None else _known.get(key)
    if known is not None and is_listed(known.report) and not known.report.fallbacks:
        list_last(known.report)
        return dataclasses.replace(known, program=known.another() if known.another is not None else None)
    report = _report(options, cause)
    report.apart, report.replaces = apart, replaces
    made = None
    with net(report, options), _without_collection():
        with timed(report.seconds, "capture") as said:
            captured = capture_batches(batches, calls)
            said.append(captured.summary)
        target = lower.choose(options.platform, captured.leaves)
        made = _finished(_fuse(captured, target, report, options, inputs_of(batches), number), options)
    fused = made or _finished(Fused(report), options)
    another = getattr(fused.program, "another", None)
    if key is not None and another is not None and not fused.report.reasons:
        for old in [k for k, f in _known.items() if not is_listed(f.report)]:
            _known.pop(old, None)
        _known[key] = dataclasses.replace(fused, program=None, another=another)
    return fused


_known: dict[object, Fused] = {}


def fuse_functional(gm: fx.GraphModule, options: Options, kernels: bool) -> Fused | None:
    """Fuse a functional graph with `copy_` roots for another compiler, which takes over `Fused.graph`.

    `kernels`: fused nodes on a CPU become operations that run generated kernels; otherwise torchair is the compiler.

    None where the graph is not a step: it writes to none of its arguments, or returns what original operations give,
    or has arguments with symbolic sizes, as models have.

    Raises:
        UnfusedError: `strict`, and something was left unfused.
    """
    if not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        return None
    if any(map(_symbolic, gm.graph.find_nodes(op="placeholder"))):
        log.info("left as it is: the graph's arguments have symbolic sizes or are symbolic numbers")
        return None
    report = _report(options, FIRST)
    with net(report, options), _without_collection():
        with timed(report.seconds, "capture") as said:
            captured = capture(gm)
            said.append(captured.summary)
        kept = [o.leaf for o in captured.returned if o.leaf is not None and captured.leaves[o.leaf].kind == "result"]
        made = [leaf for leaf in captured.leaves if leaf.kind == "output" and leaf.shape]
        if kept or (captured.unfused and (made or captured.stores)):
            return None
        on_cpu = {leaf.device.type for leaf in captured.leaves if leaf.shape} == {"cpu"}
        platform = lower.choose(options.platform, captured.leaves).platform
        target = Target(platform, "kernel nodes" if kernels and on_cpu else "nodes")
        fused = _finished(_fuse(captured, target, report, options), options, gm)
        if not fused.grouped.groups or report.fallback is not None:
            return fused
        graph = rewrite(fused.grouped)
        if target.form == "kernel nodes":
            graph_op.use_kernels(graph)
        if not kernels:
            from npu_fuse_pass.lowerings.npu import environment

            environment.serve()
        report._graph = lambda: graph
        return dataclasses.replace(fused, graph=graph)
    return _finished(Fused(report), options, gm)


def _symbolic(placeholder: fx.Node) -> bool:
    """True if an argument is or has a number that changes from call to call; reading the number would fix it."""
    value = recorded(placeholder)
    numbers = value.shape if isinstance(value, Tensor) else (value,)
    fixed = (n for n in numbers if isinstance(n, torch.SymInt) and n.node.maybe_as_int() is not None)
    symbolic = sum(isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) for n in numbers)
    return symbolic > len(list(fixed))  # Dynamo fixes some sizes itself; they stay of the symbolic type


def _fuse(
    captured: Captured,
    target: Target,
    report: CompileReport,
    options: Options,
    values: lower.KnownLeaves = None,
    number: Number | None = None,
) -> Fused:
    """Run the stages after capture; they fill `report`."""
    report.unfused = list(captured.unfused)
    if not captured.updates:
        if captured.unfused:
            report.fallbacks.append(captured.unfused[0])
        return Fused(report, captured, Grouped(tuple(captured.leaves)))
    if number is not None and target.specialises:
        captured = decide(captured, number)
    with timed(report.seconds, "group") as said:
        grouped = group(captured)
        said += [f"{g.name} x {len(g.members)}" for g in grouped.groups]
    if options.verify:
        verify.captured(captured)
        verify.grouped(grouped)
    matches = functools.cache(functools.partial(_matches, grouped, report.seconds))
    matched = matches() if target.matches_first else None
    with timed(report.seconds, "lower") as said:
        lowered = lower.lower(grouped, target, options, values, matched)
        said += [f"{g.lowering}: {g.launches} x {g.kernel}" for g in lowered.rows] or list(map(str, lowered.fallbacks))
    report.platform = str(target)
    report.decided = list(dict.fromkeys(map(str, captured.decided)))
    report.groups, report.fallbacks = lowered.rows, lowered.fallbacks
    report._moved = (captured.moved, captured.moved_by_calls)
    report._graph = functools.cache(functools.partial(_rewritten, grouped))  # made when it is asked for
    show_matches(report.groups, grouped, matches)
    return Fused(report, captured, grouped, lowered.program)


def _matches(grouped: Grouped, seconds: dict[str, float]) -> Matches:
    """Match each group with the known kernels, by the group's name."""
    with timed(seconds, "match") as said:
        found = dict(zip([g.name for g in grouped.groups], match(grouped.groups, grouped.leaves), strict=True))
        said += [f"{name}: {m.reason if isinstance(m, NoMatch) else m.kernel.name}" for name, m in found.items()]
        return found


def _rewritten(grouped: Grouped) -> fx.GraphModule:
    """The fused graph; its time delays no step, so it is logged and not in the report."""
    with timed({}, "rewrite") as said:
        graph = rewrite(grouped)
        said.append(f"{len(graph.graph.nodes)} nodes")
        return graph


def _report(options: Options, cause: Cause, graph_break: str | None = None) -> CompileReport:
    return CompileReport(options.platform, cause=cause.text, cause_remedy=cause.remedy, graph_break=graph_break)


def _finished(fused: Fused, options: Options, original: fx.GraphModule | None = None) -> Fused:
    """Show what a compile made: the report, a dump, a warning.

    Raises:
        UnfusedError: `strict`, and something was left unfused.
    """
    report = fused.report
    if original is not None and not (fused.captured.updates or report.reasons):
        return fused  # no step: what surrounds one, or a closure's forward pass
    record(report)
    root = wanted(options.dump) if report.is_step else None
    if root is not None:
        _dump(root, fused, options, original)
    try:
        announce(report)
    except Exception:  # a report is something to read; training goes on without it
        if options.verify:
            raise
        log.warning("npu_fused: the report of this compile cannot be shown", exc_info=True)
    if options.strict and report.reasons:
        raise UnfusedError("\n  ".join(["strict=True and not everything was fused:", *map(str, report.reasons)]))
    if report.fallbacks:
        warn_unfused(report.fallbacks, interpreted=fused.program is not None)
    return fused


def _dump(root: pathlib.Path, fused: Fused, options: Options, original: fx.GraphModule | None) -> None:
    """Write the files of a dump."""
    from npu_fuse_pass.dump.write import write, write_graphs

    path = write(root, functools.partial(_contents, fused, options, original))
    texts = getattr(fused.program, "texts", None)
    if path is not None and texts is not None:
        texts.follow(functools.partial(write_graphs, path))  # GE graphs are made, or made again, at the first run


def _contents(fused: Fused, options: Options, original: fx.GraphModule | None = None) -> Contents:
    sources = lower.sources(fused.grouped) if "cpu" in fused.report.platform else {}
    texts = getattr(fused.program, "texts", None)
    graphs = dict(texts.graphs) if texts else {}
    if options.kernels == "generated" and fused.report.platform == "npu" and "kernel" not in graphs:
        graphs["kernel"] = lower.npu_kernels(fused.grouped)  # what would run if it could
    return Contents(original, fused.captured, fused.grouped, fused.report, sources, graphs)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection meanwhile: it would walk through all that Dynamo has allocated, for seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
