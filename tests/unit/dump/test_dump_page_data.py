"""What the page of a dump says of the step before and after fusing: families, who took which operation, totals."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import pytest
import torch
from torch import fx

import optimizers
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.page.drawing import Drawing
from npu_fuse_pass.dump.page.graphs import before
from npu_fuse_pass.dump.page.page import page
from tests.support.dumped import contents_of, contents_of_rule, parameters

SHAPES = ((3, 4), (5,), (2, 3))


def data_of(contents: Contents) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page(contents), re.S)
    assert found is not None
    return json.loads(found[1])


@functools.cache
def adamw(foreach: bool) -> Contents:
    ps = parameters(6, SHAPES)
    groups = [{"params": ps[:4], "weight_decay": 0.01}, {"params": ps[4:], "weight_decay": 0.1, "amsgrad": True}]
    return contents_of(torch.optim.AdamW(groups, foreach=foreach).step)


def clipped_step() -> Contents:
    ps = parameters(6, SHAPES)
    opt = optimizers.NpuFusedAdam(ps)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(ps, 1.0)
        opt.step()

    return contents_of(step)


def orthogonal_step() -> Contents:
    """A momentum, a matrix product that stays as it is, a write: two groups with an original operation between."""
    ps = parameters(3, ((4, 4),))
    momenta = [torch.zeros_like(p) for p in ps]

    @torch.no_grad()
    def step() -> None:
        for p, m in zip(ps, momenta, strict=True):
            m.mul_(0.9).add_(p.grad)
            p.sub_(torch.matmul(m * 2.0, m * 2.0) * 0.1)

    return contents_of(step)


def operations(d: Drawing) -> list[str]:
    return [n.name for n in d.nodes if n.kind == "op"]


def tensor_operations(gm: fx.GraphModule) -> int:
    """How many operations on one tensor a graph has, counted by its calls."""
    lists = [
        max(len(a) for a in n.args if isinstance(a, (list, tuple)))
        for n in gm.graph.nodes
        if "_foreach_" in str(n.target)
    ]
    names = [getattr(n.target, "__name__", n.target) for n in gm.graph.nodes if n.op.startswith("call_")]
    return sum(lists) + sum(1 for name in names if name != "getitem" and "_foreach_" not in str(name))


@pytest.mark.parametrize("foreach", [True, False])
def test_every_operation_of_a_stock_optimizer_is_drawn_once_for_its_family(foreach: bool) -> None:
    contents = adamw(foreach)
    found = before(contents)
    assert [len(d.members) for d in found.families] == [4, 2]
    assert found.families[0].members == [f"param_groups[0].params[{i}]" for i in range(4)]
    assert found.families[1].shapes == [(5,), (2, 3)]
    drawn = sum(len(operations(d)) * len(d.members) for d in found.families)
    assert contents.original is not None
    assert drawn == found.operations == tensor_operations(contents.original)
    assert found.shared is None


@pytest.mark.parametrize("foreach", [True, False])
def test_operations_know_the_fused_node_that_took_them(foreach: bool) -> None:
    contents = adamw(foreach)
    groups = contents.grouped.all_groups
    for number, d in enumerate(before(contents).families):
        assert d.groups == [number] and len(groups[number].members) == len(d.members)
        assert all(n.groups == [number] for n in d.nodes if n.kind == "op")
        assert all(n.source.startswith("torch/optim/adam.py:") for n in d.nodes if n.kind == "op")
        assert {n.name for n in d.nodes if n.kind == "leaf"} >= {"param", "grad", "exp_avg", "exp_avg_sq", "step"}
        assert all(n.listed is (foreach and n.name != "full_like") for n in d.nodes if n.kind == "op")
    assert ("maximum" in operations(before(contents).families[1])) and "maximum" not in operations(
        before(contents).families[0]
    )


def test_edges_are_those_of_the_computation() -> None:
    """The drawing of a small step, computed on numbers, gives what the step gives."""
    ps = parameters(2, ((3,),))
    momenta = [torch.full_like(p, 0.5) for p in ps]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_mul_(momenta, 0.9)
        torch._foreach_add_(momenta, [p.grad for p in ps])
        torch._foreach_addcmul_(ps, momenta, momenta, value=-0.1)

    (d,) = before(contents_of(step)).families
    nodes = {n.name: n for n in d.nodes}
    named = {n.name: [d.nodes[a].name for a in n.args] for n in d.nodes}
    momentum = next(n for n in nodes if n not in ("mul", "add", "addcmul", "grad") and named["mul"] == [n])
    assert named == {
        "mul": [momentum],
        "add": ["mul", next(a for a in named["add"] if a != "mul")],
        "addcmul": [next(a for a in named["addcmul"] if a != "add"), "add"],
        **{n.name: [] for n in d.nodes if n.kind == "leaf"},
    }
    assert nodes["mul"].note == "0.9" and nodes["addcmul"].note == "value=-0.1"


def test_totals_are_a_drawing_of_their_own() -> None:
    contents = clipped_step()
    found = before(contents)
    (family,) = found.families
    assert len(family.members) == 6
    assert found.shared is not None
    assert operations(found.shared)[:2] == ["stack", "linalg_vector_norm"]
    (port,) = [n for n in family.nodes if n.kind == "port"]
    assert port.to == -1 and port.name == operations(found.shared)[-1]
    (norms,) = [n for n in found.shared.nodes if n.kind == "port"]
    assert (norms.name, norms.to) == ("norm", 0)
    boxes = data_of(contents)["after"]
    assert [b["kind"] for b in boxes if b["kind"] not in ("leaf", "written")] == ["contribute", "total", "fused"]


def test_original_operations_stay_and_what_is_around_them_is_taken() -> None:
    contents = orthogonal_step()
    (family,) = before(contents).families
    names = [g.labels for g in contents.grouped.all_groups]
    writers = {i for i, g in enumerate(contents.grouped.groups, len(names) - len(contents.grouped.groups))}
    kept = [n for n in family.nodes if n.kept]
    assert [n.name for n in kept] == ["matmul"] and not kept[0].groups
    taken = {n.name: set(n.groups) for n in family.nodes if n.kind == "op" and not n.kept}
    assert all(taken.values())
    assert not taken["sub"] & ({*range(len(names))} - writers)  # it comes after the product
    assert 0 in taken["add"] and taken["add"] & writers  # the new momentum is read by the product, and written
    boxes = data_of(contents)["after"]
    (product,) = [b for b in boxes if b["kind"] == "kept"]
    assert (product["name"], product["count"]) == ("matmul", 3)
    assert [boxes[a]["kind"] for a in product["args"]] == ["fused"]


def test_a_rule_is_drawn_from_its_formula() -> None:
    contents = contents_of_rule(optimizers.NpuFusedAdam(parameters(5)))
    found = before(contents)
    (family,) = found.families
    assert len(family.members) == 5 and family.members[0] == "param_0"
    assert found.operations == 5 * len(operations(family))
    assert {"param", "grad", "exp_avg", "lr"} <= {n.name for n in family.nodes if n.kind == "leaf"}
    assert all(n.groups == [0] for n in family.nodes if n.kind == "op")


def test_totals_of_the_step() -> None:
    data = data_of(adamw(True))
    assert data["totals"]["parameters"] == 6
    assert data["totals"]["nodes"][1] == data["totals"]["launches"] == 2
    assert data["totals"]["bytes"]["before"] > data["totals"]["bytes"]["after"] > 0
    assert [g["name"] for g in data["groups"]] == [g.name for g in adamw(True).grouped.groups]
    assert all(g["source"].count("for (") and g["formula"] for g in data["groups"])


def test_the_page_is_deterministic_and_holds_no_values() -> None:
    ps = parameters(3)
    with torch.no_grad():
        ps[0].fill_(1234.5678)
    contents = contents_of_rule(optimizers.NpuFusedAdam(ps))
    first = page(contents)
    contents.report.seconds["capture"] = 99.0  # times of a compile differ from run to run
    assert page(contents) == first
    assert "1234.5" not in first


def test_what_was_not_fused_is_told() -> None:
    data = data_of(unfused())
    assert data["unfused"] or data["fallback"]
    assert [name for name, _ in data["captured"]]
    assert data["families"] == [] and data["groups"] == []


def unfused() -> Contents:
    ps = parameters(2, ((4,),))

    @torch.no_grad()
    def step() -> None:
        for p in ps:
            p[:2].mul_(0.5)

    return contents_of(step)


def test_names_cannot_end_the_data() -> None:
    name = "</script><b>&\u2028'\""
    contents = contents_of_rule(optimizers.NpuFusedAdam(parameters(2)))
    renamed = [dataclasses.replace(leaf, name=name + leaf.name) for leaf in contents.grouped.leaves]
    contents = dataclasses.replace(contents, grouped=dataclasses.replace(contents.grouped, leaves=tuple(renamed)))
    text = page(contents)
    assert "<b>" not in text and "\u2028" not in text
    assert data_of(contents)["families"][0]["members"][0].startswith("</script><b>")
