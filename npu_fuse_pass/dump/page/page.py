"""One compile as one page: `index.html`, self-contained, without server or network.

The page holds its data as JSON: names, shapes, formulas and sources, no values of tensors.
"""

from __future__ import annotations

import collections
import dataclasses
import html
import importlib.resources
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.page.after import after
from npu_fuse_pass.dump.page.drawing import Before, Drawing, Node
from npu_fuse_pass.dump.page.graphs import before
from npu_fuse_pass.dump.text.kernel_text import annotated
from npu_fuse_pass.fx_nodes.names import operation_name
from npu_fuse_pass.report.rows import group_report

# in this order; the last one starts the page
_SCRIPTS = (*("text", "layout", "graph", "keys", "details"), *("totals", "search", "before", "after", "page"))
# Default memory bandwidth of modelled times, in GB/s, and its source; readers can enter another.
_BANDWIDTH = {"npu": (1600, "an Atlas A2's HBM, as CANN's guide states it"), "": (20, "a guess for one CPU socket")}


def page(contents: Contents) -> str:
    """The page of a compile as HTML, the same text for the same compile. Names are escaped."""
    data = {**_facts(contents), "measured": {}}  # `with_times` fills it in
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    # the only ways in which JSON could end the element that it is in
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    scripts = "\n".join(_file(f"{name}.js") for name in _SCRIPTS)
    parts = {"TITLE": html.escape(data["title"]), "STYLE": _file("style.css"), "DATA": text, "SCRIPT": scripts}
    pieces = _file("template.html").split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def with_times(text: str, measured: Mapping[str, float]) -> str:
    """The page with measured times filled in: seconds per step, "before" and "after"."""
    return text.replace('"measured":{}', f'"measured":{json.dumps(dict(measured))}')


def _file(name: str) -> str:
    return (importlib.resources.files(__package__) / "web" / name).read_text(encoding="utf-8")


def _facts(contents: Contents) -> dict[str, Any]:
    report, names = contents.report, _Names()
    drawn, boxes = before(contents), after(contents)
    totals = _totals(contents, drawn, boxes)
    bandwidth, why = _BANDWIDTH.get(report.platform, _BANDWIDTH[""])
    several = "parameter" if totals["parameters"] == 1 else "parameters"
    return {
        "title": f"{totals['parameters']} {several} on {report.platform}",
        "platform": report.platform,
        "torch": report.torch,
        "cause": report.cause,
        "fallback": report.fallback,
        "interpreted": report.interpreted,
        "graph_break": report.graph_break,
        "unfused": [{"op": u.op, "text": str(u)} for u in report.unfused],
        "bandwidth": {"value": bandwidth, "why": why},
        "totals": totals,
        "groups": _groups(contents),
        "families": [_drawing(d, names) for d in drawn.families],
        "shared": None if drawn.shared is None else _drawing(drawn.shared, names),
        "after": [_fields(b, names) for b in boxes],
        "captured": _captured(contents),
        "names": [*names],
    }


_Names = dict[str, int]
"""Names of leaves and nodes with their numbers, stored once: with 2000 parameters several boxes list many long ones."""


def _totals(contents: Contents, drawn: Before, boxes: Sequence[Node]) -> dict[str, Any]:
    """Totals of the whole step; pairs are before and after."""
    report = contents.report
    kept = sum(b.count for b in boxes if b.kind == "kept")
    if contents.original is None:
        nodes = sum(n.kind == "op" for d in drawn.families for n in d.nodes)
    else:
        nodes = sum(_computes(n) for n in contents.original.graph.nodes)
    return {
        "parameters": sum(len(d.members) for d in drawn.families),
        "elements": sum(g.elements for g in report.groups if g.writes == "leaves"),
        "nodes": [nodes, sum(b.kind in ("fused", "contribute", "total") for b in boxes) + kept],
        "of": "before: those of the rule" if contents.original is None else "",
        "operations": drawn.operations,
        "launches": sum(g.launches for g in report.groups) + kept,
        "bytes": dict(report.bytes_per_element),
    }


def _computes(node: fx.Node) -> bool:
    return node.op.startswith("call_") and node.target is not operator.getitem


def _groups(contents: Contents) -> list[dict[str, Any]]:
    """The fused nodes: the report's rows with their sources, in the order of the groups."""
    rows = {(g.name, g.writes): g for g in contents.report.groups}
    found = []
    for g in contents.grouped.all_groups:
        writes = "leaves" if g in contents.grouped.groups else "temporaries"
        row = rows.get((g.name, writes)) or group_report(
            g, contents.grouped.leaves, "none", "the original operations", 0, 0
        )
        facts = {name: getattr(row, name) for name in _ROW}
        match = str(row.match) if row.match is not None else ""
        source = annotated(g, contents, contents.sources[g.name]) if g.name in contents.sources else ""
        found.append({**facts, "match": match, "no_match": row.no_match, "source": source})
    return found


_ROW = (
    *("name", "formula", "updates", "dtype", "device", "lowering", "kernel"),
    *("bytes_per_element", "launches", "elements", "writes"),
)


def _captured(contents: Contents) -> list[list[Any]]:
    """Where nothing was fused: the graph's operations, and how many of each."""
    if contents.grouped.groups or contents.original is None:
        return []
    found = collections.Counter(operation_name(n) for n in contents.original.graph.nodes if _computes(n))
    return [[name, count] for name, count in found.items()]


def _drawing(d: Drawing, names: _Names) -> dict[str, Any]:
    shapes = list(dict.fromkeys(d.shapes))
    numbers = {shape: i for i, shape in enumerate(shapes)}
    return {
        "groups": d.groups,
        "members": d.members,
        "shapes": ["×".join(map(str, shape)) or "scalar" for shape in shapes],
        "shape": [numbers[shape] for shape in d.shapes],
        "nodes": [_fields(n, names) for n in d.nodes],
    }


def _fields(x: Node, names: _Names) -> dict[str, Any]:
    """The fields that differ from their defaults; lists of names by number."""
    empty = Node("", "")
    pairs = ((f.name, getattr(x, f.name)) for f in dataclasses.fields(x))
    found = {name: value for name, value in pairs if name in ("kind", "name") or value != getattr(empty, name)}
    if isinstance(x.origin, list) and x.origin:
        found["origin"] = [names.setdefault(name, len(names)) for name in x.origin]
    return found
