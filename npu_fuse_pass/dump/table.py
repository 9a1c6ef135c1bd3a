"""Text in columns, and the report as a short table without times, equal for equal compiles."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.report.report import CompileReport, group_lines, remarks


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(report: CompileReport) -> str:
    """One line for each group, then what is not fused. Times are in summary.json: they differ from run to run."""
    head = f"npu_fused on {report.platform}, torch {report.torch}"
    return "\n".join([head, *group_lines(report.groups), *remarks(report), ""])
