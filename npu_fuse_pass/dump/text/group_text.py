"""01_updates.txt and 02_groups.txt: what is computed, for whom, and why it is not one group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import counted, few, labels_of, parameter_name, parameters, typed, written_leaf
from npu_fuse_pass.dump.table import columns
from npu_fuse_pass.dump.text.difference import difference
from npu_fuse_pass.ir.expr import DTYPE_NAMES, postorder
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.types import Call, Formula, Group, Leaf

_KINDS = {
    "input": "argument of the graph",
    "attribute": "attribute of the graph",
    "total": "sum over parameters",
    "output": "what the graph returns",
    "temporary": "made by this step",
    "result": "result of an original operation",
}


def updates(contents: Contents) -> str:
    """Every update as mathematics with its numbers: one formula for all parameters that have the same."""
    leaves = contents.grouped.leaves
    lines = [f"{_count(contents.grouped.groups)} parameters are updated; a prime marks the new value"]
    for group in contents.grouped.all_groups:
        by_numbers: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        for member in group.members:
            by_numbers.setdefault(tuple(labels_of(group, leaves, member)), []).append(member)
        for labels, members in by_numbers.items():
            lines += ["", f"{group.name}  {parameters(len(members))}"]
            lines += [f"    {line}" for line in readable(group.formula, labels).splitlines()]
            lines += _by_shape(group, leaves, members)
    for reason in contents.report.unfused:
        lines += ["", f"not an update of a kernel: {reason}"]
    return "\n".join([*lines, ""])


def groups(contents: Contents) -> str:
    """Groups with slots, numbers and members; for each the difference from those before."""
    leaves = contents.grouped.leaves
    every = contents.grouped.all_groups
    lines = [f"{len(every)} group{'s' if len(every) != 1 else ''}, one kernel each"]
    rows = {row.name: row for row in contents.report.groups}
    for i, group in enumerate(every):
        row = rows.get(group.name)
        what = f"{row.launches} x {row.kernel} ({row.lowering})" if row else "not lowered"
        lines += ["", f"group {i + 1}: {group.name}  {parameters(len(group.members))}, {what}"]
        lines += [f"  differs from group {k + 1}: {difference(other, group)}" for k, other in enumerate(every[:i])]
        lines += ["  slots:", *columns(list(_slots(group, contents)), "    ")]
        lines += ["  members:", *_by_shape(group, leaves, group.members)]
        lines += ["  identity:", *(f"    {line}" for line in group.formula.text.splitlines())]
    for number, stage in enumerate(contents.grouped.stages):
        lines += ["", f"stage {number + 1}: after {few([g.name for g in stage.groups]) or 'nothing'}, as they were:"]
        lines += [f"  {counted(map(_call, stage.calls))}"]
    lines += [f"unfused {reason}" for reason in contents.report.unfused]
    if contents.report.fallback:
        lines += ["", f"the original runs: {contents.report.fallback}"]
    return "\n".join([*lines, ""])


def _count(made: Sequence[Group]) -> int:
    return sum(len(g.members) for g in made)


def _call(call: Call) -> str:
    return call.target if isinstance(call.target, str) else str(getattr(call.target, "__name__", call.target))


def _by_shape(group: Group, leaves: Sequence[Leaf], members: Sequence[tuple[int, ...]]) -> list[str]:
    """Members of one shape in a line."""
    by_shape: dict[str, list[str]] = {}
    for member in members:
        leaf = written_leaf(group, leaves, member)
        by_shape.setdefault(typed(leaf), []).append(parameter_name(leaf))
    rows = [(f"× {len(names)}", shape, few(names)) for shape, names in by_shape.items()]
    return columns(rows, "    ")


def _slots(group: Group, contents: Contents) -> Iterator[tuple[str, ...]]:
    leaves = contents.grouped.leaves
    read = _read(group.formula)
    for slot, label in enumerate(group.labels):
        found = [leaves[m[slot]] for m in group.members]
        if found[0].kind == "constant":
            values = [f"{leaf.value:g}" for leaf in found]
            text = "number in the graph" if len(set(values)) == 1 else f"numbers in the graph: {counted(values)}"
        else:
            several = len({m[slot] for m in group.members})
            own = found[0].kind == "input" and (contents.original is None or found[0].optimizer is not None)
            place = "of the optimizer" if own else _KINDS[found[0].kind]
            text = f"{place}, {'one for all' if several == 1 else f'{several} of them'}"
        stored = DTYPE_NAMES[group.formula.slots[slot].dtype] if group.formula.slots[slot].tensor else "0-dim"
        use = ("read " if slot in read else "") + ("written" if slot in group.formula.written else "")
        yield f"${slot}", label, stored, use.strip().replace(" ", ", "), text


def _read(formula: Formula) -> set[object]:
    return {e.value for e in postorder(formula.roots) if e.op == "leaf"}
