"""scripts/conversion_table.py: what it prints is what happens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import harness
import placement
import pytest
import torch
from steps import assert_close

from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.errors import GraphRefused
from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.lowerings.npu.environment import require
from npu_fuse_pass.rules.clipping import older_than
from scripts import conversion_cases, conversion_table

ROWS = {row.name: row for row in conversion_cases.ROWS}
SIZES = (1, 3)


def printed(*names: str, sizes: Sequence[int] = (2,)) -> dict[str, list[str]]:
    """Row -> its three cells."""
    lines = list(conversion_table.table([ROWS[name] for name in names], sizes))
    return {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines[4:])}


def found(name: str, n: int) -> str:
    """FX, GE and compute nodes of a compile in which the step also computes what the eager step does."""
    torch._dynamo.reset()
    both = [[torch.nn.Parameter(torch.arange(20.0).reshape(4, 5) / (k + 7)) for k in range(n)] for _ in range(2)]
    for params in both:
        for p in params:
            p.grad = p.detach().cos()
    ours, eager = (ROWS[name].make(params) for params in both)
    ours.step()
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "strict": True})
    with placement.watched() as given, harness.record() as graphs:
        step()
    for _ in range(2):
        eager.step()
    for p, q in zip(*both, strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)
    assert len(graphs) == len(given) == 1
    nodes = sum(node.op == "call_function" for node in given[0].gm.graph.nodes)
    return f"{nodes} / {len(graphs[0].ops)} / {len(graphs[0].compute_ops())}"


def test_the_cells_of_ours_are_true() -> None:
    for name, cells in printed("AdamW, for-loop", "SGD momentum, foreach", "NpuFusedLamb", sizes=SIZES).items():
        assert cells[2] == "OK " + ", ".join(found(name, n) for n in SIZES), name


@pytest.mark.parametrize("name", ["NpuFusedAdam", "NpuFusedRMSpropTF", "NpuFusedLamb"])
def test_torchair_gets_as_many_nodes_for_many_parameters_as_for_few(name: str) -> None:
    """Dedicated, in lists, elementwise: what a node costs torchair is most of a conversion."""
    few, many = (conversion_table.convert(ROWS[name].make, n, ours=True) for n in (2, 60))
    assert not few.blockers + many.blockers
    assert few.nodes[0] == many.nodes[0] <= 4  # numbers: view, unbind; one fused node; one that writes
    assert many.nodes[2] > few.nodes[2]


@pytest.mark.skipif(older_than((2, 12)), reason="older torches have no Muon, or decompose into what torchair converts")
def test_what_does_not_convert_is_named() -> None:
    rows = printed("Adam, for-loop", "ASGD, foreach", "Adagrad, for-loop", "Muon", "Adafactor", "rule lars")
    assert rows["Adam, for-loop"][0] == "`prims.fma.default`"
    assert rows["Adam, for-loop"][1].startswith("OK ")
    assert rows["ASGD, foreach"][:2] == ["`aten._foreach_reciprocal.default`, `aten._foreach_copy.default`"] * 2
    assert rows["Adagrad, for-loop"][1].startswith("Dynamo breaks the graph")
    assert all(cell.startswith("OK ") for cell in rows["Muon"])
    assert all(cell.startswith("Dynamo breaks the graph") for cell in rows["Adafactor"])
    assert rows["rule lars"][:2] == ["–", "–"]


def test_a_step_that_falls_back_is_not_called_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise GraphRefused("planted")

    monkeypatch.setattr(npu, "Program", refuse)
    assert printed("SGD, foreach")["SGD, foreach"][2] == "planted"


def test_the_times_are_of_whole_conversions(capsys: pytest.CaptureFixture[str]) -> None:
    require()
    ops = (torch.ops.aten._foreach_sqrt.default, torch.ops.prims.fma.default)
    before = [op._ge_converter for op in ops]
    assert conversion_table.main(["--time", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == list(conversion_table.TIMED)
    for line in lines:
        total, converting, within, fx, ge = map(float, re.findall(r"[\d.]+(?= s| FX| GE)", line))
        assert total >= converting >= within > 0  # as printed, in hundredths of a second
        assert fx > 3 < ge
    assert [op._ge_converter for op in ops] == before
