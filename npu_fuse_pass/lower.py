"""Platforms: which lowering runs the groups of a step, and what the report says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Set
from typing import Protocol, runtime_checkable

from torch import Tensor

from npu_fuse_pass.dump.folder import wanted
from npu_fuse_pass.errors import GraphRefused, PlatformError, UnfusedError, Unsupported
from npu_fuse_pass.ir.fused_op import multi_tensor_update
from npu_fuse_pass.ir.types import Call, Group, Leaf
from npu_fuse_pass.lowerings import eager, staged
from npu_fuse_pass.lowerings.cpu import graph_op
from npu_fuse_pass.options import Options
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.report.report import CompileReport, GroupReport
from npu_fuse_pass.report.rows import Matches, group_report, show_plans
from npu_fuse_pass.rules.prelude import Watch

PLATFORMS = ("auto", "cpu", "npu", "eager")
LAYOUTS = ("auto", "flat", "list")
KERNELS = ("auto", "dedicated", "elementwise")
# Platforms with dedicated operations need to know before they lower which kernel computes a group. Elsewhere a match is
# something to read: it is decided when the report is, and no compile takes longer for it.
MATCHED_BEFORE = ("npu",)
# Platforms where a test of a number against 0 costs a pass over memory, so that it is decided beforehand. In a kernel
# that is generated it costs nothing, and one kernel serves all numbers.
DECIDED_BEFORE = ("npu",)


Stages = Sequence[tuple[Sequence[Group], Sequence[Call]]]
Values = list[Tensor | None] | None  # of the leaves, where they are known before the step is called


class Program(Protocol):
    """What a lowering gives: runs one step on the values of all leaves; what `kinds` is, see the CPU's."""

    def __call__(self, values: list[Tensor | None], complete: bool = False, kinds: object = None) -> None: ...


@runtime_checkable
class Watching(Watch, Protocol):
    """A program that can look at a step's tensors itself, with no Python object for each of them: the CPU's."""

    def looks(self, params: Set[int]) -> bool: ...
    def again(self) -> None: ...


def choose(report: CompileReport, leaves: Sequence[Leaf]) -> None:
    """Platform "auto" becomes the platform of the devices that a step has tensors on."""
    devices = {leaf.device.type for leaf in leaves if leaf.kind != "constant" and leaf.shape}
    if report.platform == "auto":
        report.platform = "npu" if "npu" in devices else "cpu"


def lower(
    leaves: Sequence[Leaf],
    stages: Stages,
    groups: Sequence[Group],
    report: CompileReport,
    options: Options,
    values: Values,
    matches: Callable[[], Matches],
) -> Program | None:
    """Make a step's program with the platform's lowering, stage after stage, and a row of the report for each group.

    Args:
        stages: groups whose results later ones read, with the original operations after them.
        groups: those of the last stage.
        report: gets the rows; `fallback`, where the result is None: the original has to run.
        values: of the leaves, where they are known already.
        matches: which known kernel computes each group; asked for only where MATCHED_BEFORE has the platform.

    Raises:
        UnfusedError: `strict`, and the layout that was asked for is not possible.
    """
    made_by = LOWERINGS[report.platform]
    if report.platform in MATCHED_BEFORE:
        made_by = functools.partial(made_by, matches=matches())
    try:
        if report.platform == "npu" and any(calls for _, calls in stages):
            return _lower_npu_whole(leaves, stages, groups, report, options)
        before = [(made_by(leaves, made, report, options, None), calls) for made, calls in stages]
        for row in report.groups:
            row.writes = "temporaries"
        last = made_by(leaves, groups, report, options, values)
    except (Unsupported, GraphRefused) as e:
        report.fallbacks.append(e.reason)
        report.groups = []
        return None
    if last is None or not before:
        return last
    return staged.Program([(program, calls) for program, calls in before if program is not None], last)


def _lower_cpu(
    leaves: Sequence[Leaf], groups: Sequence[Group], report: CompileReport, options: Options, values: Values
) -> Program:
    from npu_fuse_pass.lowerings.cpu import program as cpu

    rows: list[GroupReport] = []

    def slower(why: str) -> None:
        for row in rows:
            row.note = why

    try:
        program = cpu.Program(leaves, groups, slower)
    except PlatformError as e:
        report.fallbacks.append(e.reason.led_by("the fused graph is interpreted"))
        report.groups += [group_report(g, leaves, "interpreter", "interpreter", 0, 0) for g in groups]
        return eager.Program(leaves, groups)
    rows += [group_report(k.group, leaves, "cpu", k.group.name, *program.cost(k)) for k in program.kernels]
    report.groups += rows
    return program


def _lower_eager(
    leaves: Sequence[Leaf], groups: Sequence[Group], report: CompileReport, options: Options, values: Values
) -> None:
    """The original graph, on request; the report still shows what would be fused."""
    report.groups += [group_report(g, leaves, "eager", "original graph", 0, 0) for g in groups]


def _lower_graph(
    leaves: Sequence[Leaf], groups: Sequence[Group], report: CompileReport, options: Options, values: Values
) -> None:
    """The fused nodes themselves, which another compiler takes over; `copy_` reads and writes every new value again."""
    kernels = report.platform == "graph cpu"
    operation = str(graph_op.multi_tensor_kernel if kernels else multi_tensor_update).removesuffix(".default")
    for g in groups:
        for slot in g.formula.written:
            if len({m[slot] for m in g.members}) != len(g.members):
                raise Unsupported(g.name, "several members write the same 0-dim tensor", Code.SAME_SCALAR)
        tensors = [slot.dtype.itemsize for slot in g.formula.slots if slot.tensor]
        written = [g.formula.slots[s].dtype.itemsize for s in g.formula.written if g.formula.slots[s].tensor]
        passes = 2 if g.formula.contributions else 1
        size = passes * sum(tensors) + (5 if kernels else 3) * sum(written)  # kernels work on copies
        report.groups.append(group_report(g, leaves, "graph", operation, size, passes))


def _lower_npu(
    leaves: Sequence[Leaf],
    groups: Sequence[Group],
    report: CompileReport,
    options: Options,
    values: Values,
    matches: Matches | None = None,
) -> Program:
    from npu_fuse_pass.lowerings.npu import ge_texts, retry
    from npu_fuse_pass.lowerings.npu import program as npu

    rows: list[GroupReport] = []

    def show(program: npu.Program, refused: str | None = None) -> None:
        if not rows:
            rows.extend(group_report(p.group, leaves, "npu", p.kernel, 0, 0) for p in program.parts)
            report.groups += rows
        for row, part in zip(rows, program.parts, strict=True):
            why = refused and "; ".join(filter(None, (refused, part.waits)))
            row.kernel, row.note = part.kernel, why or row.note or part.note
        show_plans(report, rows, [part.layout for part in program.parts])

    def planned(program: npu.Program) -> None:
        show(program)
        in_part = [row.layout_reason for row in rows if "list" in row.layout and row.layout_reason]
        if options.strict and options.layout == "flat" and in_part:
            raise UnfusedError(f'strict=True and layout="flat" is not possible: {in_part[0]}')

    texts = ge_texts.Texts() if wanted(options.dump) is not None else None

    def build(kernels: str, given: Values) -> npu.Program:
        config = options.torchair_config
        return npu.Program(leaves, groups, config, options.layout, given, planned, matches, kernels, texts)

    program = retry.Retried(build, options.kernels, values, show, texts)
    if values is not None:
        planned(program.chosen)
    return program


def _lower_npu_whole(
    leaves: Sequence[Leaf], stages: Stages, groups: Sequence[Group], report: CompileReport, options: Options
) -> Program:
    """Groups and the original operations between them as one graph."""
    from npu_fuse_pass.lowerings.npu import whole

    before = [g for made, _ in stages for g in made]
    calls = [call for _, made in stages for call in made]
    assert report.fused_graph is not None
    program = whole.Program(leaves, [*before, *groups], calls, report.fused_graph, options.torchair_config)
    for g in (*before, *groups):
        row = group_report(g, leaves, "npu", "GE elementwise", *program.cost(g))
        row.writes = "temporaries" if g in before else "leaves"
        report.groups.append(row)
    return program


LOWERINGS: dict[str, Callable[..., Program | None]] = {
    "cpu": _lower_cpu,
    "npu": _lower_npu,
    "eager": _lower_eager,
    "graph": _lower_graph,
    "graph cpu": _lower_graph,
}


def is_torchair_config(value: object) -> bool:
    """Whether a value can be the option `torchair_config`."""
    from npu_fuse_pass.lowerings.npu import environment

    return environment.is_config(value)


def serve_torchair() -> None:
    """Give torchair the converters that fused nodes and what remains around them need."""
    from npu_fuse_pass.lowerings.npu import environment

    environment.serve()
