"""01_updates.txt and 02_groups.txt: updates and groups with formulas and members, and how groups differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import called, counted, few, parameter_name, parameters, typed, written_leaf
from npu_fuse_pass.dump.text.difference import difference
from npu_fuse_pass.ir.expr import DTYPE_NAMES, postorder
from npu_fuse_pass.ir.readable import readable
from npu_fuse_pass.ir.types import Formula, Group, Leaf, Update
from npu_fuse_pass.report.report import aligned

_KINDS = {
    "input": "argument of the graph",
    "attribute": "attribute of the graph",
    "total": "sum over parameters",
    "output": "what the graph returns",
    "temporary": "made by this step",
    "result": "result of an original operation",
}


def updates(contents: Contents) -> str:
    """Every captured update as mathematics with its numbers, and the groups that it became part of."""
    captured = contents.captured
    every = [*(u for segment in captured.segments for u in segment.updates), *captured.updates]
    groups = contents.grouped.all_groups
    group_of = {member[slot]: g.name for g in groups for member in g.members for slot in g.formula.written}
    told: dict[tuple[str, str, bool], list[Leaf]] = {}
    for update in every:
        written = [member[position] for member in update.members for position, _ in update.writes]
        names = dict.fromkeys(group_of.get(leaf, "in no group") for leaf in written)
        formula = Formula(tuple(update.slots), tuple(update.writes), tuple(e for _, e in update.contributions), "")
        key = ", ".join(names) or "sums", readable(formula, update.labels), _of_params(update)
        known_by = [written_leaf(formula, update.labels, captured.leaves, member) for member in update.members]
        told.setdefault(key, []).extend(known_by)
    of_params = [u for u in captured.updates if _of_params(u)]
    count = sum(len(u.members) for u in of_params or captured.updates)
    lines = [f"{count} {'parameters are updated' if of_params else 'updates'}; a prime marks the new value"]
    for (name, text, params), known_by in told.items():
        lines += ["", f"{name}  {parameters(len(known_by), params)}", *(f"    {line}" for line in text.splitlines())]
        lines += _by_shape(known_by)
    for u in contents.report.unfused:
        lines += ["", f"not an update of a kernel: {u}"]
    return "\n".join([*lines, ""])


def _of_params(update: Update) -> bool:
    return any(update.labels[position] == "param" for position, _ in update.writes)


def groups(contents: Contents) -> str:
    """Groups with slots, numbers and members; for each the difference from those before."""
    leaves = contents.grouped.leaves
    every = contents.grouped.all_groups
    lines = [f"{len(every)} group{'s' if len(every) != 1 else ''}, one kernel each"]
    rows = {row.name: row for row in contents.report.groups}
    for i, group in enumerate(every):
        row = rows.get(group.name)
        what = f"{row.launches} x {row.kernel} ({row.lowering})" if row else "not lowered"
        lines += ["", f"group {i + 1}: {group.name}  {parameters(len(group.members), group.of_params)}, {what}"]
        lines += [f"  differs from group {k + 1}: {difference(other, group)}" for k, other in enumerate(every[:i])]
        lines += ["  slots:", *aligned(list(_slots(group, contents)), "    ")]
        known_by = [written_leaf(group.formula, group.labels, leaves, member) for member in group.members]
        lines += ["  members:", *_by_shape(known_by)]
        lines += ["  identity:", *(f"    {line}" for line in group.formula.text.splitlines())]
    for number, segment in enumerate(contents.grouped.segments):
        names = few([g.name for g in segment.groups]) or "nothing"
        head = (
            f"segment {number + 1}: after {names}, as they were:" if segment.calls else f"segment {number + 1}: {names}"
        )
        lines += ["", head, *([f"  {counted(map(called, segment.calls))}"] if segment.calls else [])]
    lines += [f"unfused {reason}" for reason in contents.report.unfused]
    if contents.report.fallback:
        lines += ["", f"the original runs: {contents.report.fallback}"]
    return "\n".join([*lines, ""])


def _by_shape(known_by: Sequence[Leaf]) -> list[str]:
    """One line per shape: the members of that shape, by the leaves that name them."""
    by_shape: dict[str, list[str]] = {}
    for leaf in known_by:
        by_shape.setdefault(typed(leaf), []).append(parameter_name(leaf))
    rows = [(f"× {len(names)}", shape, few(names)) for shape, names in by_shape.items()]
    return aligned(rows, "    ")


def _slots(group: Group, contents: Contents) -> Iterator[tuple[str, ...]]:
    leaves = contents.grouped.leaves
    read = {e.value for e in postorder(group.formula.roots) if e.op == "leaf"}
    for slot, label in enumerate(group.labels):
        found = [leaves[m[slot]] for m in group.members]
        if found[0].kind == "constant":
            values = [f"{leaf.value:g}" for leaf in found]
            text = "number in the graph" if len(set(values)) == 1 else f"numbers in the graph: {counted(values)}"
        else:
            several = len({m[slot] for m in group.members})
            own = found[0].kind == "input" and (contents.original is None or found[0].optimizer is not None)
            place = "of the optimizer" if own else _KINDS[found[0].kind]
            bound = few(list(dict.fromkeys(leaf.name for leaf in found)))
            text = f"{place}, {'one for all' if several == 1 else f'{several} of them'}: {bound}"
        stored = DTYPE_NAMES[group.formula.slots[slot].dtype] if group.formula.slots[slot].tensor else "0-dim"
        use = ("read " if slot in read else "") + ("written" if slot in group.formula.written else "")
        yield f"${slot}", label, stored, use.strip().replace(" ", ", "), text
