"""Text in columns, and the report as a short table that is the same at every compile of the same thing."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import CompileReport

_HEAD = ("group", "updates", "dtype", "device", "writes", "lowering", "kernel", "launches", "bytes/element", "match")


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Lines with the cells of each column below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(report: CompileReport) -> str:
    """One line for each group, then what is not fused. Times are in summary.json: they differ from run to run."""
    rows: list[Sequence[str]] = [_HEAD]
    for g in report.groups:
        match = g.match.kernel if g.match else "-"
        size = str(g.bytes_per_element or "-")
        rows.append(
            (g.name, f"{g.updates}", g.dtype, g.device, g.writes, g.lowering, g.kernel, f"{g.launches}", size, match)
        )
    lines = [f"npu_fused on {report.platform}, torch {report.torch}, {report.cause}", *columns(rows)]
    if report.bytes_per_element:
        before, after = report.bytes_per_element["before"], report.bytes_per_element["after"]
        lines.append(f"memory traffic: {after:.0f} bytes/element, operation by operation {before:.0f}")
    lines += [f"unfused {u.op}: {u.reason}" for u in report.unfused]
    if report.graph_break:
        lines.append(f"the graph ends at a break: {report.graph_break}")
    if report.fallback:
        lines.append(f"FALLBACK to the original: {report.fallback}")
    return "\n".join(lines) + "\n"
