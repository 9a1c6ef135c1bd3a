"""The report of a compile, as data, as text for terminals and as HTML for notebooks; the last 64 are kept."""

from __future__ import annotations

import collections
import dataclasses
import html
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass.errors import UnfusedError
from npu_fuse_pass.private_torch import lacking
from npu_fuse_pass.reasons import Reason


def _not_asked() -> str:
    return "it writes temporaries"


@dataclasses.dataclass(frozen=True)
class KernelMatch:
    """A known kernel that computes a group.

    Attributes:
        kernel: its name in `match/known_kernels.py`.
        tensors: the kernel's outputs, and the leaf that each is.
        arguments: its numbers, and inputs that are computed first, as mathematics over the formula's names.
        assumptions: what the equality needs beyond finite values.
        tolerance: how far the kernel may be from the formula, relative, per step.
    """

    kernel: str
    tensors: dict[str, str]
    arguments: dict[str, str]
    assumptions: list[str]
    tolerance: float

    def __str__(self) -> str:
        arguments = ", ".join(f"{name} = {text}" for name, text in self.arguments.items())
        return f"{self.kernel} (within {self.tolerance:g}): {arguments}"


@dataclasses.dataclass
class GroupReport:
    """One fused group.

    Attributes:
        name: the same in dumps, kernels, profiles and graphs.
        formula: the update as readable mathematics.
        updates: number of parameters, or of states that are updated by themselves.
        kernel: what computes it.
        bytes_per_element: memory read and written per parameter element and step.
        launches: kernel calls per step.
        elements: how many the group's parameters have together.
        note: why this kernel, where there was a choice.
        writes: "leaves" (parameters and states), or "temporaries" that original operations read.
        layout: "list" (tensors one by one), "flat" (adjacent ones as one), "gathered" (flat, but gradients are
            concatenated first), or several of these, joined by " + ".
        layout_reason: why some or all tensors are not flat; "" where nothing else could be expected.
    """

    name: str
    formula: str
    updates: int
    dtype: str
    device: str
    lowering: str
    kernel: str
    bytes_per_element: int
    launches: int
    elements: int = 0
    note: str = ""
    writes: str = "leaves"
    layout: str = "list"
    layout_reason: str = ""
    _matched: Callable[[], KernelMatch | str] = dataclasses.field(default=_not_asked, repr=False, compare=False)
    _of_params: bool = dataclasses.field(default=True, repr=False, compare=False)  # it writes some, not states alone
    _returned: bool = dataclasses.field(default=False, repr=False, compare=False)  # it makes what the graph returns

    @property
    def match(self) -> KernelMatch | None:
        """The known kernel that computes this group, if there is one; decided when first asked for."""
        found = self._matched()
        return found if isinstance(found, KernelMatch) else None

    @property
    def no_match(self) -> str:
        """Why no known kernel computes this group; "" if one does."""
        found = self._matched()
        return found if isinstance(found, str) else ""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and strings."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.startswith("_")}
        return {**fields, "match": self.match and dataclasses.asdict(self.match), "no_match": self.no_match}


@dataclasses.dataclass
class CompileReport:
    """The result of one compile; `print` it, or let a notebook show it.

    Attributes:
        platform: what the groups were lowered to ("cpu", "npu", "eager").
        torch: version.
        seconds: time of every stage. "match" comes last and later than the compile where the platform does not need it:
            when a group's match is first asked for or printed.
        groups: what was fused.
        unfused: operations that were not, and why.
        fallbacks: why the original graph runs instead, always or at some steps, or formulas are interpreted.
        cause: "compile", or what changed, where this is not the first compile of this step.
        cause_remedy: what keeps that from happening again; None for what happens once.
        checked_steps: how many steps `check_numerics` has compared with the original's.
        check_tolerance: the relative difference that it allows, by the dtype of what is written; empty without it.
        checked_against: "the original", and torch's own class where `check_numerics` compared with that too.
        graph_break: why and where Dynamo ended this graph, if the function goes on after it; nothing fuses across.
        apart: why and where a function's graph had to end before a rule optimizer's step, which is this graph.
        replaces: the class of torch.optim whose step this is: the update rule of the same algorithm, on its states.
        no_rule: why Dynamo captured a step that `compile_step` could not run as such a rule.
        slower: how long a step of which this is a part takes compiled and eagerly, where it was measured to be slower.
        decided: "weight_decay == 0": what is compiled holds for such numbers; another outcome is another compile.
    """

    platform: str
    torch: str = torch.__version__
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    groups: list[GroupReport] = dataclasses.field(default_factory=list)
    unfused: list[Reason] = dataclasses.field(default_factory=list)
    fallbacks: list[Reason] = dataclasses.field(default_factory=list)
    cause: str = "compile"
    cause_remedy: str | None = None
    graph_break: str | None = None
    apart: str | None = None
    replaces: str | None = None
    no_rule: Reason | None = None
    slower: str | None = None
    checked_steps: int = 0
    check_tolerance: dict[str, float] = dataclasses.field(default_factory=dict)
    checked_against: list[str] = dataclasses.field(default_factory=lambda: ["the original"])
    decided: list[str] = dataclasses.field(default_factory=list)
    _moved: tuple[int, int] = (0, 0)  # bytes of all original operations, and of those that stay as they are
    _graph: Callable[[], fx.GraphModule] | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def bytes_per_element(self) -> dict[str, float]:
        """Memory that a step reads and writes for each parameter element; empty where that is not known.

        "before": if every operation of the original went over memory by itself; "after": as it is now.
        """
        elements = sum(g.elements for g in self.groups if g.writes == "leaves")
        if not elements or not all(g.bytes_per_element for g in self.groups if g.elements):
            return {}
        kernels = sum(g.bytes_per_element * g.elements for g in self.groups)
        before, by_calls = self._moved
        return {"before": before / elements, "after": (kernels + by_calls) / elements}

    @property
    def updated(self) -> int:
        """How many parameters the groups update; where nothing that they write is known as one, of updates."""
        rows = [g for g in self.groups if g.writes == "leaves"]
        return sum(g.updates for g in [g for g in rows if g._of_params] or rows)

    @property
    def fused_graph(self) -> fx.GraphModule | None:
        """The rewritten graph (built when first asked for): an FX graph module that prints and runs."""
        return self._graph() if self._graph is not None else None

    @property
    def fallback(self) -> str | None:
        """Why the original graph runs instead (or formulas are interpreted), in words, or None."""
        return "; ".join(map(str, self.fallbacks)) or None

    @property
    def interpreted(self) -> bool:
        """Whether formulas are interpreted, for want of a C++ compiler: what falls back is not the original then."""
        return any(g.lowering == "interpreter" for g in self.groups)

    @property
    def reasons(self) -> list[Reason]:
        """Why something is not fused; empty if everything is."""
        return list(dict.fromkeys([*self.unfused, *self.fallbacks]))

    @property
    def is_step(self) -> bool:
        """Whether the graph holds something of a step, fused or not; others are what surrounds one, or a closure's."""
        return bool(self.groups or self.reasons)

    @property
    def is_update(self) -> bool:
        """Whether the graph updates something, as far as that is known: fused, or as the original."""
        return bool(self.reasons) or not all(g._returned for g in self.groups)

    @property
    def remedies(self) -> list[str]:
        """Known remedies for what is not fused and for recompiles, beyond those in the reasons."""
        known = [*(reason.remedy for reason in self.reasons), self.cause_remedy]
        return list(dict.fromkeys(remedy for remedy in known if remedy))

    def fall_back(self, reason: Reason) -> None:
        """Record that the original runs from now on instead of the compiled step. The rows stay."""
        self.fallbacks.append(reason)
        for g in self.groups:
            g.lowering, g.kernel, g.bytes_per_element, g.launches = "eager", f"original graph, not {g.kernel}", 0, 0

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; the keys are stable, and `report/schema.py` has their schema."""
        groups = [g.to_json() for g in self.groups]
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.startswith("_")}
        del rest["fallbacks"]
        return {
            **rest,
            "seconds": dict(self.seconds),
            "groups": groups,
            "bytes_per_element": self.bytes_per_element,
            "no_rule": self.no_rule and self.no_rule.to_json(),
            "unfused": [{"op": reason.op, "reason": reason.text} for reason in self.unfused],
            "fallback": self.fallback,
            "reasons": [reason.to_json() for reason in self.reasons],
            "remedies": self.remedies,
        }

    def raise_if_unfused(self) -> None:
        """Raise unless everything that was captured runs fused: for tests and CI.

        Raises:
            UnfusedError: lists every reason, and what to do where that is known.
        """
        listed = [str(reason) for reason in self.reasons] or [
            f"{g.name}: the original graph runs, as platform={self.platform!r} asks for"
            for g in self.groups
            if g.lowering == "eager"
        ]
        if listed:
            advice = [f"what to do: {remedy}" for remedy in self.remedies]
            raise UnfusedError("not everything was fused:\n  " + "\n  ".join([*listed, *advice]))

    def __str__(self) -> str:
        """A headline, the table of groups, what was not fused with remedies, then every group's formula."""
        lines = [_head(self), *(f"  {line}" for line in [*group_lines(self.groups), *remarks(self)])]
        for g in self.groups:
            lines += [f"  {g.name}", *(f"      {line}" for line in _formula_lines(g))]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same as HTML for a notebook's cell; all text is escaped, and nothing is loaded."""
        columns = _columns(self.groups)
        cells = "".join(f"<th>{html.escape(c.name)}</th>" for c in columns)
        rows = [f"<tr>{''.join(f'<td>{html.escape(str(c.value(g)))}</td>' for c in columns)}</tr>" for g in self.groups]
        groups = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
        said = "".join(f"<li>{html.escape(line)}</li>" for line in remarks(self))
        formulas = "".join(
            f"<details><summary>{html.escape(g.name)}</summary><pre>{html.escape(chr(10).join(_formula_lines(g)))}</pre>"
            "</details>"
            for g in self.groups
        )
        return f"<div><p>{html.escape(_head(self))}</p>{groups}<ul>{said}</ul>{formulas}</div>"


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of the table."""

    name: str
    value: Callable[[GroupReport], object]
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


def _head(report: CompileReport) -> str:
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


def group_lines(groups: Sequence[GroupReport]) -> list[str]:
    """One line for each group, under a line of headings; empty without groups."""
    if not groups:
        return []
    columns = _columns(groups)
    rows = [[c.name for c in columns], *([str(c.value(g)) for c in columns] for g in groups)]
    return aligned(rows, right={i for i, c in enumerate(columns) if c.number})


def aligned(rows: Sequence[Sequence[str]], indent: str = "", right: Container[int] = ()) -> list[str]:
    """Lines with aligned columns; `right`: numbers of those that are aligned on the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(indent + "  ".join(cells).rstrip())
    return lines


def remarks(report: CompileReport) -> list[str]:
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
        what = "not fused" if report.interpreted else "FALLBACK to the original"
        lines.append(f"{what}: {report.fallback}")
    if report.cause != "compile":
        lines.append(f"compiled again: {report.cause}")
    lines += lacking()
    return lines + [f"what to do: {remedy}" for remedy in report.remedies]


def _formula_lines(g: GroupReport) -> list[str]:
    """Lines of a group: its formula, the reason for its layout, and the known kernel that computes it."""
    layout = [f"layout {g.layout}: {g.layout_reason}"] if g.layout_reason else []
    kernel = [f"kernel: {g.note}"] if g.note else []
    return [*layout, *g.formula.splitlines(), f"match: {g.match or 'none, ' + g.no_match}", *kernel]


def _columns(groups: Sequence[GroupReport]) -> list[_Column]:
    """The table's columns; the layout only on NPUs."""
    return [*_COLUMNS, *([_LAYOUT] if any(g.lowering == "npu" for g in groups) else [])]


class Reports(list[CompileReport]):
    """Reports, oldest first; the IndexError of an empty list names possible causes."""

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise IndexError(_NO_REPORT)
        return super().__getitem__(index)


_NO_REPORT = (
    "there is no report: torch has given no step to this backend since the last clear_reports(). Either nothing was "
    'compiled with backend="npu_fused"; or what torch.compile returned was not called (it compiles at its first call, '
    "and opt.step itself stays as it is: call the result); or the optimizer has fused=True, or is one of those that "
    "Dynamo never shows to a backend (npu_fuse_pass.explain(opt) says which); or compiling is switched off "
    "(NPU_FUSE_DISABLE=1, TORCHDYNAMO_DISABLE=1, TORCH_COMPILE_DISABLE=1, torch.compiler.set_stance)"
)

_reports: collections.deque[CompileReport] = collections.deque(maxlen=64)


def reports() -> Reports:
    """Reports of the last 64 compiles in this process, oldest first; a list whose IndexError says why it is empty.

    A compile that a further optimizer shares, being alike, is the last one again.
    """
    return Reports(_reports)


def new_since(before: Sequence[CompileReport]) -> list[CompileReport]:
    """Reports that were not there before."""
    return [r for r in reports() if not any(r is old for old in before)]


def clear_reports() -> None:
    """Forget all reports."""
    _reports.clear()


def list_last(report: CompileReport) -> None:
    """Make a listed report the last one."""
    others = [listed for listed in _reports if listed is not report]
    _reports.clear()
    _reports.extend([*others, report])


def is_listed(report: CompileReport) -> bool:
    """True if `reports()` has this very object."""
    return any(report is listed for listed in _reports)


def record(report: CompileReport) -> None:
    """Keep a report."""
    _reports.append(report)
