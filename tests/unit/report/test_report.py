"""What a report shows: a table, a notebook's cell, JSON by its schema, an error for CI."""

from __future__ import annotations

import copy
import html.parser
import json
from typing import Any

import jsonschema
import pytest
import torch

import npu_fuse_pass
import optimizers
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.report.report import CompileReport, GroupReport
from npu_fuse_pass.report.schema import schema
from tests.support.training import parameters

MATRICES = ((3, 4), (5, 2), (2, 2))
SCHEMA = schema()
MAKE: dict[str, Any] = {
    "ours": lambda p: optimizers.NpuFusedAdam(p, lr=0.01),
    "stock": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "partly fused": lambda p: torch.optim.Muon(p, lr=0.01),
    "hidden": lambda p: torch.optim.LBFGS(p, lr=0.01),
}


@pytest.fixture(scope="module")
def explained() -> dict[str, CompileReport]:
    torch._dynamo.reset()
    return {name: npu_fuse_pass.explain(make(parameters(MATRICES))) for name, make in MAKE.items()}


@pytest.mark.parametrize("name", MAKE)
def test_json_follows_the_schema(explained: dict[str, CompileReport], name: str) -> None:
    made = explained[name].to_json()
    jsonschema.Draft202012Validator(SCHEMA).validate(made)
    assert json.loads(json.dumps(made)) == made
    assert made["groups"] if name != "hidden" else made["fallback"]


def test_the_schema_is_a_schema_and_strict(explained: dict[str, CompileReport]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    made = json.loads(json.dumps(explained["ours"].to_json()))
    wrong: list[Any] = [copy.deepcopy(made) for _ in range(5)]
    wrong[0]["extra"] = 1
    wrong[1]["groups"][0]["updates"] = 0
    del wrong[2]["fallback"]
    wrong[3]["no_rule"] = {"code": "NO_CODE", "text": "", "op": "", "remedy": None, "node": None, "source": None}
    wrong[4]["bytes_per_element"] = {"before": 1.0}
    for report in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMA).validate(report)


def test_a_report_prints_as_a_table_first(explained: dict[str, CompileReport]) -> None:
    (row,) = explained["ours"].groups
    lines = str(explained["ours"]).splitlines()
    assert lines[0].startswith("npu_fused on cpu: 3 parameters -> 1 kernel calls per step")
    assert lines[1].split() == ["group", "parameters", "dtype", "device", "kernel", "calls", "bytes/element"]
    assert lines[2].split() == [row.name, "3", "f32", "cpu", row.name, "1", "28"]
    assert lines[1].index("bytes/element") + len("bytes/element") == len(lines[2])  # numbers end where headings do
    assert lines[3] == "  memory traffic: 28 bytes/element, operation by operation 180"
    assert lines[4] == f"  {row.name}" and lines[5].strip() == row.formula.splitlines()[0]


@pytest.mark.parametrize("foreach", [True, False])
def test_copies_count_as_traffic_of_single_operations(foreach: bool) -> None:
    """The first momentum is a clone of the gradient (8 bytes), and the update reads two tensors and writes one (12)."""
    torch._dynamo.reset()
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    opt = torch.optim.SGD([p], lr=0.1, momentum=0.9, foreach=foreach)
    torch.compile(opt.step, backend="npu_fused")()
    assert npu_fuse_pass.reports()[-1].bytes_per_element == {"before": 20.0, "after": 16.0}


class Page(html.parser.HTMLParser):
    """Reads HTML: its cells, its text, and tags that were left open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        assert not attrs  # nothing to load, no code

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.mark.parametrize("name", MAKE)
def test_a_notebook_shows_the_same(explained: dict[str, CompileReport], name: str) -> None:
    report = explained[name]
    page = Page(report._repr_html_())
    assert not page.open
    for g in report.groups:
        assert g.name in page.text and g.formula in page.text
    for reason in report.reasons:
        assert str(reason) in page.text


def test_a_notebook_shows_text_as_text() -> None:
    evil = "<script>alert('&')</script>"
    row = GroupReport(evil, evil, 1, evil, evil, "cpu", evil, 4, 1)
    reasons = [Code.INTERNAL(evil)]
    report = CompileReport("cpu", groups=[row], fallbacks=reasons, graph_break=evil, cause=evil, cause_remedy=evil)
    page = Page(report._repr_html_())
    assert "script" not in page.tags and page.text.count(evil) >= 8


def test_unfused_is_an_error_that_lists_everything(explained: dict[str, CompileReport]) -> None:
    for name in ("ours", "stock"):
        explained[name].raise_if_unfused()
    with pytest.raises(npu_fuse_pass.UnfusedError) as partly:
        explained["partly fused"].raise_if_unfused()
    assert all(f"{u.op}: {u.text}" in str(partly.value) for u in explained["partly fused"].unfused)
    with pytest.raises(npu_fuse_pass.UnfusedError, match="LBFGS"):
        explained["hidden"].raise_if_unfused()
    with pytest.raises(npu_fuse_pass.UnfusedError, match="asks for"):
        npu_fuse_pass.explain(MAKE["ours"](parameters(MATRICES)), platform="eager").raise_if_unfused()


def test_a_remedy_is_said_where_it_is_known() -> None:
    report = CompileReport("cpu", fallbacks=[Code.SHARED_MEMORY("two tensors overlap")])
    assert report.remedies == [
        "give every parameter, gradient and state memory of its own (clone what is tied or a view)"
    ]
    assert f"  what to do: {report.remedies[0]}" in str(report).splitlines()
    with pytest.raises(npu_fuse_pass.UnfusedError, match="what to do: give every parameter"):
        report.raise_if_unfused()
    assert CompileReport("cpu", fallbacks=[Code.GRAPH("an argument is a list")]).remedies == []
