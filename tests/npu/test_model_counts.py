"""What scripts/bench.py --model npu counts: operations of torch_npu.optim's code, nodes of emitted GE graphs."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import harness
import interpreter
import kernels
import pytest
import torch
from ge_cases import emit

import npu_fuse_pass
import optimizers

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))

import bench_cases
import bench_model
import npu_graphs
import npu_kernels_table
import npu_model
import npu_peers

SHAPES = [(64, 8), (32,), (100,)]
ELEMENTS = 512 + 32 + 100

# Read from the wheel's source: operations, bytes per element. They do not depend on how many parameters there are.
BY_HAND: list[tuple[str, dict[str, Any], int, int]] = [
    ("NpuFusedAdam", {}, 8, 80),  # mul_ add_ mul_ addcmul_ sqrt div add_ addcdiv_
    ("NpuFusedAdam", dict(weight_decay=0.1), 9, 92),  # add
    ("NpuFusedAdam", dict(amsgrad=True), 9, 92),  # maximum
    ("NpuFusedAdamW", {}, 9, 88),  # mul_
    ("NpuFusedSGD", dict(lr=0.1), 1, 12),
    ("NpuFusedSGD", dict(lr=0.1, momentum=0.9), 3, 32),
    ("NpuFusedSGD", dict(lr=0.1, momentum=0.9, weight_decay=0.1), 4, 44),
    ("NpuFusedRMSpropTF", {}, 6, 64),  # pow sub add_ add sqrt_ addcdiv_
    ("NpuFusedRMSpropTF", dict(momentum=0.9), 9, 92),  # mul_ neg add_
    ("NpuFusedRMSpropTF", dict(momentum=0.9, weight_decay=0.1), 10, 104),
]


@pytest.mark.parametrize(("name", "options", "launches", "size"), BY_HAND, ids=str)
def test_torch_npus_optimizers_by_hand(name: str, options: dict[str, Any], launches: int, size: int) -> None:
    for shapes in (SHAPES, SHAPES * 7):
        work = npu_peers.torch_npu_optim(name, shapes, **options)
        assert (work.launches, work.syncs) == (launches, 0)
        assert work.moved == size * ELEMENTS * len(shapes) // len(SHAPES)


def test_torch_npus_lamb_waits_for_the_device_per_parameter() -> None:
    """12 operations for all, 9 for each: sum sqrt clamp, sum sqrt, eq, eq, div, fill_; both eq are waited for."""
    for n in (1, 4):
        work = npu_peers.torch_npu_optim("NpuFusedLamb", [(10,)] * n)
        assert (work.launches, work.syncs) == (12 + 9 * n, 2 * n)


def test_torch_npu_is_left_as_it_was() -> None:
    import torch_npu
    from torch_npu.optim import npu_fused_optim_base as base

    before = base.npu_combine_tensors, torch_npu.get_npu_format
    npu_peers.torch_npu_optim("NpuFusedAdam", SHAPES)
    assert (base.npu_combine_tensors, torch_npu.get_npu_format) == before


def graph_of(build: Any, *tensors: torch.Tensor) -> list[npu_graphs.Node]:
    graph = emit((build, tensors, tensors[0]))
    return npu_graphs.nodes_of(graph, [t.to("meta") for t in tensors], interpreter, kernels)


def test_bytes_of_nodes_by_hand() -> None:
    from torchair._ge_concrete_graph import ge_apis as ge

    x, y = torch.empty(10), torch.empty(10, 10)
    assert graph_of(lambda a, b: ge.Mul(a, b), x, x) == [("Mul", 120)]
    assert graph_of(lambda a: ge.Mul(a, a), x) == [("Mul", 80)]  # one tensor is read once
    assert graph_of(lambda a, b: ge.Add(a, b), y, x) == [("Add", 840)]  # broadcast
    assert graph_of(lambda a: ge.ReduceSum(a, [0]), x) == [("ReduceSum", 44 + 8)]  # and the axis, int64
    assert graph_of(lambda a: ge.Reshape(a, [2, 5]), x) == []


@pytest.mark.parametrize("adjacent", [False, True], ids=["apart", "adjacent"])
def test_graphs_of_ours_agree_with_the_report(adjacent: bool) -> None:
    """Nodes on tensors, and what they move, from the graph and from the report of the same compile."""
    shapes = [(1000,), (500,), (2000,)]
    nodes, seconds = npu_graphs.emitted(lambda p: optimizers.NpuFusedAdam(p, lr=1e-3), shapes, adjacent)
    (group,) = npu_fuse_pass.reports()[-1].groups
    large = [size for _, size in nodes if size > 2000]
    assert group.launches <= len(nodes)
    assert len(large) >= group.launches
    assert sum(large) / 3500 == pytest.approx(group.bytes_per_element, rel=0.02)
    assert 0 < seconds < 10
    with harness.record() as graphs:
        assert not graphs.graphs  # the patched run is gone


def test_only_a_graph_is_slower_by_its_head() -> None:
    tasks, peers = [50_000_000, 40], {"peer": npu_model.eager([50_000_000])}
    assert "2 nodes" in npu_model.compare(npu_model.eager(tasks), peers).why
    assert "head of 30 us" in npu_model.compare(npu_model.static_graph(tasks[:1]), peers).why


def test_the_page_has_the_table_that_the_script_prints() -> None:
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "npu.md").read_text(encoding="utf-8")
    assert "\n".join(npu_kernels_table.table(100)) in page


def test_the_whole_model_of_a_small_workload(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_model, "WORKLOADS", [bench_cases.Workload("3 x 64", [(64,)] * 3, large=False)])
    assert bench_model.main("", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("MODELLED, not measured")
    *_, operations, generated, _ = (block.splitlines() for block in printed.split("\n\n"))
    assert operations[2].startswith("| 3 x 64 | Adam | ") and len(operations) == len(generated) == 2 + 5
    assert all(row.count(" (3, ") == 2 for row in generated[2:-1])  # beside one launch: numbers; a table or GE's graph
    found = json.loads((tmp_path / "model.json").read_text())
    assert found["modelled"] is True
    assert [c["optimizer"] for c in found["cells"]] == [f.name for f in bench_model.FAMILIES]
    for cell in found["cells"]:
        ours = cell["contestants"][bench_model.APART]
        assert ours["launches"] == 1 and sum(ours["node types"].values()) == ours["nodes"]
        stock = {bench_model.STOCK, bench_model.STOCK_ADJACENT} & cell["verdict"].keys()
        assert bool(stock) == (cell["optimizer"] in ("Adam", "AdamW", "SGD momentum"))
        for verdict in cell["verdict"].values():
            assert verdict["why"] or verdict["ratio"] >= 1
            assert verdict["with our Python"]["ratio"] <= verdict["ratio"] + 1e-9
