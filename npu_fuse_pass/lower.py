"""The lowering stage: which platform runs the groups of a step, its program, and a row of the report for each group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npu_fuse_pass.dump.folder import wanted
from npu_fuse_pass.errors import GraphRefused, PlatformError, UnfusedError, Unsupported
from npu_fuse_pass.ir.dimensions import has_dimensions
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.fused_op import multi_tensor_update
from npu_fuse_pass.ir.totals import total_slots
from npu_fuse_pass.ir.types import Group, Grouped, Leaf, LeafValues
from npu_fuse_pass.lowerings import eager, segmented
from npu_fuse_pass.lowerings.cpu import codegen, graph_op
from npu_fuse_pass.lowerings.program import Program, check_written_once
from npu_fuse_pass.options import Options, Target
from npu_fuse_pass.passes.rewrite import rewrite
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.report import GroupReport
from npu_fuse_pass.report.rows import Matches, group_report

KnownLeaves = LeafValues | None  # where they are known before the step is called


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The result of lowering.

    Attributes:
        program: None where the original runs, or another compiler takes the groups over.
        rows: of the report, one for each group; an NPU's change when its plan does.
        fallbacks: why no kernels run, if that was not asked for.
    """

    program: Program | None
    rows: list[GroupReport]
    fallbacks: list[Reason] = dataclasses.field(default_factory=list)


def choose(platform: str, leaves: Sequence[Leaf]) -> Target:
    """The target that the option `platform` means: "auto" is that of the devices that a step has tensors on."""
    if platform != "auto":
        return Target(platform)
    devices = {leaf.device.type for leaf in leaves if leaf.kind != "constant" and leaf.shape}
    return Target("npu" if "npu" in devices else "cpu")


def lower(
    step: Grouped, target: Target, options: Options, values: KnownLeaves = None, matches: Matches | None = None
) -> Lowered:
    """Make a step's program with the target's lowering, segment after segment.

    Args:
        values: of the leaves, where they are known already.
        matches: which known kernel computes each group, where the target asks for it first.

    Raises:
        UnfusedError: `strict`, and the layout that was asked for is not possible.
    """
    if (target.platform == "npu" or target.form != "program") and (reason := _not_lowered(step, target)):
        return Lowered(None, [], [reason])
    made_by = LOWERINGS[target.platform if target.form == "program" else target.form]
    try:
        if target == Target("npu") and any(segment.calls for segment in step.segments):
            if step.stores:
                dtype = step.leaves[step.stores[0][0]].dtype
                raise Unsupported("npu", f"original operations write a tensor of {dtype}", Code.GE_BETWEEN)
            return _lower_npu_whole(step, options)
        before = [made_by(step.leaves, segment.groups, options, None, None) for segment in step.segments]
        last = made_by(step.leaves, step.groups, options, values, matches)
    except (Unsupported, GraphRefused) as e:
        return Lowered(None, [], [e.reason])
    rows = [row for lowered in before for row in lowered.rows]
    for row in rows:
        row.writes = "temporaries"
    fallbacks = list(dict.fromkeys(reason for lowered in (*before, last) for reason in lowered.fallbacks))
    program = last.program
    if program is not None and before:
        made = [
            (lowered.program if segment.groups else None, segment.calls)
            for lowered, segment in zip(before, step.segments, strict=True)
            if lowered.program is not None
        ]
        program = segmented.Program(made, program, step.stores)
    return Lowered(program, [*rows, *last.rows], fallbacks)


def _not_lowered(step: Grouped, target: Target) -> Reason | None:
    """The reason why neither an NPU nor another compiler's graph can compute the step; None if they can."""
    if any(leaf.across for leaf in step.leaves):
        return Code.SHARDED(f"norms or sums of tensors that are spread over processes are not lowered for {target}")
    if any(has_dimensions(g.formula.roots) for g in step.all_groups):
        return Code.PLATFORM(f"reductions over some of the dimensions are not lowered for {target}")
    if any(e.op == "stochastic" for g in step.all_groups for e in postorder(g.formula.roots)):
        remedy = "step on a CPU, or use master_weights=True"
        return Code.PLATFORM(f"stochastic rounding is not lowered for {target}", "", remedy)
    return None


def sources(step: Grouped) -> Mapping[str, str]:
    """Generated C++ by the name of its group; what all kernels begin with is an `#include`."""
    begin = '#include "kernel.h"  // npu_fuse_pass/lowerings/cpu/kernel.h\n'
    texts = {}
    in_pieces = any(leaf.across for leaf in step.leaves)
    for groups in (*(segment.groups for segment in step.segments), step.groups):
        for g, totals in zip(groups, total_slots(groups, step.leaves), strict=True):
            texts[g.name] = codegen.generate(g.name, g.formula, totals, in_pieces).text.replace(codegen.PRELUDE, begin)
    return texts


def _lower_cpu(leaves: Sequence[Leaf], groups: Sequence[Group], *_: object) -> Lowered:
    from npu_fuse_pass.lowerings.cpu import program as cpu

    rows: list[GroupReport] = []

    def slower(why: str) -> None:
        for row in rows:
            row.note = why

    try:
        program = cpu.Program(leaves, groups, slower)
    except PlatformError as e:
        if any(leaf.across for leaf in leaves):
            return Lowered(None, [], [e.reason])
        rows = [group_report(g, leaves, "interpreter", "interpreter", 0, 0) for g in groups]
        return Lowered(eager.Program(leaves, groups), rows, [e.reason.led_by("the fused graph is interpreted")])
    rows += [group_report(k.group, leaves, "cpu", k.group.name, *program.cost(k)) for k in program.kernels]
    return Lowered(program, rows)


def _lower_eager(leaves: Sequence[Leaf], groups: Sequence[Group], *_: object) -> Lowered:
    """The original graph, on request; the report still shows what would be fused."""
    return Lowered(None, [group_report(g, leaves, "eager", "original graph", 0, 0) for g in groups])


def _lower_nodes(operation: Any, copies: int, leaves: Sequence[Leaf], groups: Sequence[Group], *_: object) -> Lowered:
    """Leave the fused nodes to another compiler, as calls of `operation`.

    Args:
        copies: how often a written tensor goes over memory besides: `copy_` reads and writes every new value again, and
            generated kernels work on copies.
    """
    rows = []
    for g in groups:
        check_written_once(g)
        slots = g.formula.slots
        read = sum(slot.dtype.itemsize for slot in slots if slot.tensor)
        written = sum(slots[s].dtype.itemsize for s in g.formula.written if slots[s].tensor)
        passes = 2 if g.formula.contributions else 1
        size = passes * read + copies * written
        rows.append(group_report(g, leaves, "graph", str(operation).removesuffix(".default"), size, passes))
    return Lowered(None, rows)


def _lower_npu(
    leaves: Sequence[Leaf], groups: Sequence[Group], options: Options, values: KnownLeaves, matches: Matches | None
) -> Lowered:
    from npu_fuse_pass.lowerings.npu import fakes, ge_texts, retry
    from npu_fuse_pass.lowerings.npu import program as npu
    from npu_fuse_pass.lowerings.npu.environment import require
    from npu_fuse_pass.lowerings.npu.kernels import choice, proof

    try:
        require()
    except PlatformError as e:
        if options.kernels != choice.GENERATED or wanted(options.dump) is None:
            raise
        return _preview_kernels(leaves, groups, e)
    fakes.check()
    rows: list[GroupReport] = []
    chosen = choice.choose(options.kernels)

    def show(program: npu.Program, refused: str | None = None) -> None:
        if not rows:
            rows.extend(group_report(p.group, leaves, "npu", p.kernel, 0, 0) for p in program.groups)
        for row, lowered in zip(rows, program.groups, strict=True):
            why = refused and "; ".join(filter(None, (refused, lowered.waits)))
            row.kernel = lowered.kernel
            row.note = why or row.note or "; ".join(filter(None, (lowered.note, chosen.why)))
            layout = lowered.layout
            row.layout, row.layout_reason = layout.name, layout.reason
            row.launches, row.bytes_per_element = layout.launches, layout.bytes_per_element

    def planned(program: npu.Program) -> None:
        show(program)
        in_part = [row.layout_reason for row in rows if "list" in row.layout and row.layout_reason]
        if options.strict and options.layout == "flat" and in_part:
            raise UnfusedError(f'strict=True and layout="flat" is not possible: {in_part[0]}')

    texts = ge_texts.Texts() if wanted(options.dump) is not None else None

    def build(kernels: str, given: KnownLeaves) -> npu.Program:
        config, hardware = options.torchair_config, chosen.hardware if kernels == choice.GENERATED else None
        return npu.Program(leaves, groups, config, options.layout, given, planned, matches, kernels, texts, hardware)

    def started(program: npu.Program) -> None:
        for row, lowered in zip(rows, program.groups, strict=True):
            if lowered.generated is not None or lowered.device_members:  # else nothing runs it
                text = proof.changed(row.name, lowered.generated is not None)
                row.note = "; ".join(filter(None, (row.note, text)))

    program = retry.RetryingProgram(build, chosen.forms, values, show, started, texts)
    if values is not None:
        planned(program.chosen)
    return Lowered(program, rows)


def _preview_kernels(leaves: Sequence[Leaf], groups: Sequence[Group], missing: PlatformError) -> Lowered:
    """Report generated kernels where nothing can run them; the original runs."""
    from npu_fuse_pass.lowerings.npu.kernels import launch, preview

    rows, kernels = [], preview.preview(leaves, groups)
    for g in groups:
        found = kernels[g.name]
        if isinstance(found, launch.Generated):
            cost = found.kernels.bytes_per_element, len(found.kernels.launches)
            row = group_report(g, leaves, "npu", launch.KERNEL, *cost)
            row.note = f"to look at, it does not run here; {found.note}"
        else:
            row = group_report(g, leaves, "eager", "original graph", 0, 0)
            row.note = f"no generated kernel: {found}"
        rows.append(row)
    return Lowered(None, rows, [missing.reason.led_by("kernels are only shown")])


def npu_kernels(step: Grouped) -> str:
    """Sources of generated NPU kernels, and the compiler's last IR where there is a compiler."""
    from npu_fuse_pass.lowerings.npu.kernels import preview

    return preview.text(preview.preview(step.leaves, step.all_groups))


def _lower_npu_whole(step: Grouped, options: Options) -> Lowered:
    """Lower groups and the original operations between them to one graph."""
    from npu_fuse_pass.lowerings.npu import fakes, whole

    fakes.check()
    calls = [call for segment in step.segments for call in segment.calls]
    program = whole.Program(step.leaves, step.all_groups, calls, rewrite(step), options.torchair_config)
    rows = []
    for g in step.all_groups:
        row = group_report(g, step.leaves, "npu", "GE elementwise", *program.cost(g))
        row.writes = "leaves" if g in step.groups else "temporaries"
        if options.kernels == "generated":
            row.note = "no generated kernel: original operations between the updates are in one GE graph with them"
        rows.append(row)
    return Lowered(program, rows)


LOWERINGS: Mapping[str, Callable[..., Lowered]] = {
    "cpu": _lower_cpu,
    "npu": _lower_npu,
    "eager": _lower_eager,
    "nodes": functools.partial(_lower_nodes, multi_tensor_update, 3),
    "kernel nodes": functools.partial(_lower_nodes, graph_op.multi_tensor_kernel, 5),
}
