"""A report as text for terminals and as HTML for notebooks."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import Protocol

from npu_fuse_pass.private_torch import lacking


class GroupRow(Protocol):
    """The printed fields of a fused group; see `GroupReport`."""

    name: str
    formula: str
    updates: int
    dtype: str
    device: str
    lowering: str
    kernel: str
    bytes_per_element: int
    launches: int
    note: str
    writes: str
    layout: str
    layout_reason: str

    @property
    def match(self) -> object | None: ...
    @property
    def no_match(self) -> str: ...


class PrintedReport(Protocol):
    """The printed fields of a compile; see `CompileReport`."""

    platform: str
    seconds: dict[str, float]
    cause: str
    graph_break: str | None
    apart: str | None
    replaces: str | None
    slower: str | None
    checked_steps: int
    check_tolerance: dict[str, float]
    checked_against: list[str]
    decided: list[str]

    @property
    def no_rule(self) -> object | None: ...
    @property
    def updated(self) -> int: ...
    @property
    def groups(self) -> Sequence[GroupRow]: ...
    @property
    def unfused(self) -> Sequence[object]: ...
    @property
    def fallback(self) -> str | None: ...
    @property
    def bytes_per_element(self) -> dict[str, float]: ...
    @property
    def remedies(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of the table."""

    name: str
    value: Callable[[GroupRow], object]
    number: bool = False


_COLUMNS = [
    _Column("group", lambda g: g.name),
    _Column("parameters", lambda g: g.updates, number=True),
    _Column("dtype", lambda g: g.dtype),
    _Column("device", lambda g: g.device),
    _Column("kernel", lambda g: g.kernel),
    _Column("calls", lambda g: g.launches, number=True),
    _Column("bytes/element", lambda g: g.bytes_per_element, number=True),
]
_LAYOUT = _Column("layout", lambda g: g.layout)


def as_text(report: PrintedReport) -> str:
    """A headline, the table of groups, what was not fused with remedies, then every group's formula."""
    lines = [head(report), *(f"  {line}" for line in [*table(report.groups), *remarks(report)])]
    for g in report.groups:
        lines += [f"  {g.name}", *(f"      {line}" for line in formula_lines(g))]
    return "\n".join(lines)


def as_html(report: PrintedReport) -> str:
    """The same as HTML for a notebook's cell; all text is escaped, and nothing is loaded."""
    columns = _columns(report.groups)
    cells = "".join(f"<th>{html.escape(c.name)}</th>" for c in columns)
    rows = [f"<tr>{''.join(f'<td>{html.escape(str(c.value(g)))}</td>' for c in columns)}</tr>" for g in report.groups]
    groups = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    said = "".join(f"<li>{html.escape(line)}</li>" for line in remarks(report))
    formulas = "".join(
        f"<details><summary>{html.escape(g.name)}</summary><pre>{html.escape(chr(10).join(formula_lines(g)))}</pre>"
        "</details>"
        for g in report.groups
    )
    return f"<div><p>{html.escape(head(report))}</p>{groups}<ul>{said}</ul>{formulas}</div>"


def head(report: PrintedReport) -> str:
    """The headline: what was done with a step, and how long the compile took."""
    compiled, late = dict(report.seconds), ""
    if next(reversed(compiled), "") == "match":  # it ran on demand, after the compile
        late = f", then match {compiled.pop('match'):.2f}"
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in compiled.items())
    calls = sum(g.launches for g in report.groups)
    return (
        f"npu_fused on {report.platform}: {report.updated} parameters -> {calls} kernel calls per step, compiled in "
        f"{sum(compiled.values()):.2f} s ({stages}){late}"
    )


def table(groups: Sequence[GroupRow]) -> list[str]:
    """One line for each group, under a line of headings; empty without groups."""
    if not groups:
        return []
    columns = _columns(groups)
    rows = [[c.name for c in columns], *([str(c.value(g)) for c in columns] for g in groups)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join(map(_aligned, columns, row, widths)).rstrip() for row in rows]


def remarks(report: PrintedReport) -> list[str]:
    """Lines beside the table: memory traffic, what is not fused, and what to do."""
    lines = []
    if report.bytes_per_element:
        before, after = report.bytes_per_element["before"], report.bytes_per_element["after"]
        lines.append(f"memory traffic: {after:.0f} bytes/element, operation by operation {before:.0f}")
    lines += [f"unfused {reason}" for reason in report.unfused]
    if report.graph_break:
        lines.append(f"the graph ends at a break: {report.graph_break}")
    if report.apart:
        lines.append(f"the step has a graph of its own: {report.apart}")
    if report.replaces:
        lines.append(f"in place of {report.replaces}.step: an update rule, on the optimizer's own states")
    if report.no_rule:
        lines.append(f"captured by Dynamo, not run as an update rule: {report.no_rule}")
    if report.slower:
        lines.append(f"slower than uncompiled: {report.slower}")
    if report.decided:
        lines.append(f"compiled for {', '.join(report.decided)}")
    if report.checked_steps:
        allowed = ", ".join(f"{dtype} {limit:.2g}" for dtype, limit in report.check_tolerance.items())
        against = " and with ".join(report.checked_against)
        compared = f"{report.checked_steps} steps were compared with {against}"
        lines.append(f"check_numerics: {compared} (allowed relative difference: {allowed})")
    if report.fallback:
        lines.append(f"FALLBACK to the original: {report.fallback}")
    if report.cause != "compile":
        lines.append(f"compiled again: {report.cause}")
    lines += lacking()
    return lines + [f"what to do: {remedy}" for remedy in report.remedies]


def formula_lines(g: GroupRow) -> list[str]:
    """Lines of a group: its formula, the reason for its layout, and the known kernel that computes it."""
    layout = [f"layout {g.layout}: {g.layout_reason}"] if g.layout_reason else []
    kernel = [f"kernel: {g.note}"] if g.note else []
    return [*layout, *g.formula.splitlines(), f"match: {g.match or 'none, ' + g.no_match}", *kernel]


def _columns(groups: Sequence[GroupRow]) -> list[_Column]:
    """The table's columns; the layout only on NPUs."""
    return [*_COLUMNS, *([_LAYOUT] if any(g.lowering == "npu" for g in groups) else [])]


def _aligned(column: _Column, cell: str, width: int) -> str:
    return cell.rjust(width) if column.number else cell.ljust(width)
