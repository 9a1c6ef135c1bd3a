"""The stages in order: captured updates -> groups -> matches -> a program, and the report of what was done.

On some platforms tests of numbers are decided (`decide`) before updates are grouped.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from npu_fuse_pass import lower
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.capture.rule import capture_batches
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.folder import wanted
from npu_fuse_pass.errors import UnfusedError
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.ir.totals import total_slots
from npu_fuse_pass.ir.types import Call, Captured, Group, Leaf
from npu_fuse_pass.lowerings.cpu import graph_op
from npu_fuse_pass.match.find import match
from npu_fuse_pass.match.result import NoMatch
from npu_fuse_pass.options import Options
from npu_fuse_pass.passes.group import group, group_updates
from npu_fuse_pass.passes.rewrite import rewrite
from npu_fuse_pass.passes.specialise import decide
from npu_fuse_pass.report.causes import FIRST, Cause
from npu_fuse_pass.report.logs import announce, timed, warn_unfused
from npu_fuse_pass.report.report import CompileReport, record
from npu_fuse_pass.report.rows import Matches, show_matches, traffic
from npu_fuse_pass.rules.batch import Batch, inputs_of

log = logging.getLogger(__name__)

Number = Callable[[Leaf], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Fused:
    """What the stages made; without a program the original has to run, and the report says why."""

    captured: Captured
    groups: Sequence[Group]
    program: lower.Program | None
    report: CompileReport


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
    return _fuse(lambda: capture(gm), options, cause, graph_break, original=gm, number=number)


def fuse_functional(gm: fx.GraphModule, strict: bool, kernels: bool) -> Fused | None:
    """Fuse a functional graph with `copy_` roots for another compiler: the result is the report's `fused_graph`.

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
    captured = capture(gm)
    if captured.unfused and any(leaf.kind == "output" and leaf.shape for leaf in captured.leaves):
        return None
    on_cpu = {leaf.device.type for leaf in captured.leaves if leaf.shape} == {"cpu"}
    options = Options("graph cpu" if kernels and on_cpu else "graph", strict)
    fused = _fuse(lambda: captured, options, FIRST, original=gm)
    if fused.report.platform == "graph cpu" and fused.report.fused_graph is not None:
        graph_op.use_kernels(fused.report.fused_graph)
    if not kernels:
        lower.serve_torchair()
    return fused


def _symbolic(placeholder: fx.Node) -> bool:
    """Whether an argument is or has a number that changes from call to call; looking at it would fix it."""
    value = recorded(placeholder)
    numbers = value.shape if isinstance(value, Tensor) else (value,)
    fixed = (n for n in numbers if isinstance(n, torch.SymInt) and n.node.maybe_as_int() is not None)
    symbolic = sum(isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) for n in numbers)
    return symbolic > len(list(fixed))  # Dynamo fixes some sizes itself; they stay of the symbolic type


def fuse_batches(
    batches: Sequence[Batch], options: Options, cause: Cause = FIRST, number: Number | None = None
) -> Fused:
    """Fuse the step of an optimizer with update rules; as `fuse_graph`."""
    return _fuse(lambda: capture_batches(batches), options, cause, values=inputs_of(batches), number=number)


def _fuse(
    capture_step: Callable[[], Captured],
    options: Options,
    cause: Cause,
    graph_break: str | None = None,
    values: lower.Values = None,
    original: fx.GraphModule | None = None,
    number: Number | None = None,
) -> Fused:
    report = CompileReport(options.platform, cause=cause.text, cause_remedy=cause.remedy, graph_break=graph_break)
    with _without_collection(), timed(report.seconds, "capture") as said:
        captured = capture_step()
        members, unfused = sum(len(u.members) for u in captured.updates), len(captured.unfused)
        said.append(f"{members} updates of {len(captured.leaves)} leaves; {unfused} operations unfused")
    report.unfused = list(captured.unfused)
    program: lower.Program | None = None
    stages: list[tuple[list[Group], list[Call]]] = []
    groups: list[Group] = []
    report._graph = functools.cache(lambda: _rewrite(captured.leaves, groups, stages))  # when it is asked for
    if captured.unfused and not captured.updates:
        report.fallbacks.append(captured.unfused[0])
    elif captured.updates:
        lower.choose(report, captured.leaves)
        if number is not None and report.platform in lower.DECIDED_BEFORE:
            captured = decide(captured, number)
            report.decided = list(dict.fromkeys(map(str, captured.decided)))
        with timed(report.seconds, "group") as said:
            stages = [(group_updates(stage.updates, captured.leaves), stage.calls) for stage in captured.stages]
            groups = group(captured)
            said += [f"{g.name} x {len(g.members)}" for g in groups]
        matches = functools.cache(lambda: _match(groups, captured.leaves, report))
        if report.platform in lower.MATCHED_BEFORE:
            matches()
        with _without_collection(), timed(report.seconds, "lower") as said:
            program = lower.lower(captured.leaves, stages, groups, report, options, values, matches)
            said += [f"{g.lowering}: {g.launches} x {g.kernel}" for g in report.groups] or [str(report.fallback)]
        report.bytes_per_element = traffic(captured, report)
        show_matches(report, groups, captured.leaves, matches)
    record(report)
    if report.groups or report.unfused or report.fallback:
        _dump(options, lambda: _contents(original, captured, stages, groups, report, program), program)
    announce(report)
    if options.strict and (report.unfused or report.fallback):
        raise UnfusedError("\n  ".join(["strict=True and not everything was fused:", *map(str, report.reasons)]))
    if report.fallbacks:
        warn_unfused(report.fallbacks, stacklevel=2)
    return Fused(captured, groups, program, report)


def _dump(options: Options, contents: Callable[[], Contents], program: lower.Program | None) -> None:
    """Leave files to read, where that is asked for."""
    root = wanted(options.dump)
    if root is not None:
        from npu_fuse_pass.dump.write import write, write_graphs

        path, texts = write(root, contents), getattr(program, "texts", None)
        if path is not None and texts is not None:
            texts.follow(functools.partial(write_graphs, path))  # GE graphs are made, or made again, at the first run


def _contents(
    original: fx.GraphModule | None,
    captured: Captured,
    stages: lower.Stages,
    groups: Sequence[Group],
    report: CompileReport,
    program: lower.Program | None,
) -> Contents:
    from npu_fuse_pass.lowerings.cpu import codegen

    sources: dict[str, str] = {}
    if report.platform in ("cpu", "graph cpu"):
        begin = '#include "cpu_kernel.h"  // npu_fuse_pass/lowerings/cpu_kernel.h\n'
        for made in [*(made for made, _ in stages), groups]:
            for g, totals in zip(made, total_slots(made, captured.leaves), strict=True):
                text = codegen.generate(g.name, g.formula, totals).text
                sources[g.name] = text.replace(codegen.PRELUDE, begin)
    ge = getattr(program, "texts", None)
    return Contents(original, captured, stages, groups, report, sources, ge.graphs if ge is not None else {})


def fused_graph(captured: Captured) -> fx.GraphModule:
    """The rewritten graph of captured updates."""
    stages = [(group_updates(stage.updates, captured.leaves), stage.calls) for stage in captured.stages]
    return rewrite(captured.leaves, group(captured), stages)


def _match(groups: Sequence[Group], leaves: Sequence[Leaf], report: CompileReport) -> Matches:
    """Which known kernel computes each group, by the group's name."""
    with timed(report.seconds, "match") as said:
        found = dict(zip([g.name for g in groups], match(groups, leaves), strict=True))
        said += [f"{name}: {m.reason if isinstance(m, NoMatch) else m.kernel.name}" for name, m in found.items()]
        return found


def _rewrite(leaves: Sequence[Leaf], groups: Sequence[Group], stages: lower.Stages) -> fx.GraphModule:
    """The fused graph; its time is in nobody's way, so it is logged and not in the report."""
    with timed({}, "rewrite") as said:
        made = rewrite(leaves, groups, stages)
        said.append(f"{len(made.graph.nodes)} nodes")
        return made


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
