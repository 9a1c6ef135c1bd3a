"""Dumps on the NPU: GE graphs as torchair writes them, a listing to read, and groups' names on GE's operations."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import torch
from steps import parameters, set_gradients

import npu_fuse_pass
import optimizers
from npu_fuse_pass.__main__ import main
from npu_fuse_pass.lowerings.npu.environment import require

GE_FILES = ("05_ge.txt", "05_ge_optimized.pbtxt", "05_ge_original.pbtxt")
BETWEEN = {
    "Data",
    "Const",
    "NetOutput",
    "Assign",
    "Unpack",
    "Reshape",
    "Pack",
    "ReduceSum",
    "ConcatV2",
    "Cast",
}  # of no group
STEPS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "stock": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "rule": lambda params: optimizers.NpuFusedAdam(params, lr=0.1, weight_decay=0.1),
    "two stages": lambda params: optimizers.NpuFusedLamb(params, lr=0.1, use_global_grad_norm=True),
}


@pytest.fixture
def ge() -> Iterator[harness.Recording]:
    torch._dynamo.reset()
    with harness.record() as recording:
        yield recording
    torch._dynamo.reset()


def step_of(opt: torch.optim.Optimizer, dump: pathlib.Path, **options: Any) -> Callable[[], Any]:
    given = {"platform": "npu", "dump": dump, **options}
    return torch.compile(opt.step, backend=npu_fuse_pass.npu_fused, options=given)


def folder(root: pathlib.Path) -> pathlib.Path:
    (found,) = root.glob("rank_0/compile_000")
    return found


@pytest.mark.parametrize("name", STEPS)
def test_graphs_listing_and_names(name: str, ge: harness.Recording, tmp_path: pathlib.Path) -> None:
    for run in ("one", "two"):  # which are the same
        torch._dynamo.reset()
        params = parameters()
        opt = STEPS[name](params)
        set_gradients(params, 0)
        step_of(opt, tmp_path / run)()
    report = npu_fuse_pass.reports()[-1]
    assert report.platform == "npu" and not report.reasons
    names = {g.name for g in report.groups}
    graph = ge.graphs[-1]
    marked = {op.name.partition("/")[0] for op in graph.ops if "/" in op.name}
    assert marked == names
    assert not {op.type for op in graph.ops if "/" not in op.name} - BETWEEN
    files = folder(tmp_path / "two")
    for file in GE_FILES:
        text = (files / file).read_text()
        assert text == (folder(tmp_path / "one") / file).read_text()
        assert all(name in text for name in names)
    final = (files / "05_ge_optimized.pbtxt").read_text()
    written = re.findall(r'^    name: "(.*)"\n    op: "(.*)"$', final, re.MULTILINE)
    assert written == [(op.name, op.type) for op in graph.ops]  # what GE has got
    original = (files / "05_ge_original.pbtxt").read_text()
    assert original.startswith("# the GE graph that torchair's converters made") and 'op: "Assign"' in original
    assert "GE makes of that exists on the device only" in final and 'op: "Assign"' not in final
    listed = (files / "05_ge.txt").read_text()
    assert f"{len(written)} operations: " in listed
    for op in graph.compute_ops():
        assert f"{op.type} × " in listed
    fused = report.fused_graph
    assert fused is not None and names <= {node.name for node in fused.graph.nodes}


def test_repeated_operations_are_listed_once(ge: harness.Recording, tmp_path: pathlib.Path) -> None:
    params = [torch.nn.Parameter(torch.ones(3 + i % 5)) for i in range(100)]
    set_gradients(params, 0)
    step_of(torch.optim.SGD(params, lr=0.1, momentum=0.9), tmp_path, layout="list", kernels="elementwise")()
    text = (folder(tmp_path) / "05_ge.txt").read_text()
    assert len(ge.graphs[-1].ops) > 400
    assert "× 100, of which the first:" in text and len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) < 500


def test_what_runs_now_is_what_is_there(ge: harness.Recording, tmp_path: pathlib.Path) -> None:
    """A graph that GE refuses is replaced in the dump by the one that runs instead."""
    params = parameters()
    opt = optimizers.NpuFusedAdam(params, lr=0.1)
    set_gradients(params, 0)
    ge.failing["load"], ge.only = RuntimeError("planted"), frozenset({"AdamApplyOneAssign"})
    step = step_of(opt, tmp_path)
    with pytest.warns(UserWarning, match="without dedicated operations"):
        step()
    for file in GE_FILES:
        text = (folder(tmp_path) / file).read_text()
        assert "AdamApplyOneAssign" not in text and "Sqrt" in text


def test_the_users_own_graph_dump_is_the_users(ge: harness.Recording, tmp_path: pathlib.Path) -> None:
    torchair = require()
    config = torchair.CompilerConfig()
    config.debug.graph_dump.type = "txt"
    (tmp_path / "mine").mkdir()
    config.debug.graph_dump.path = str(tmp_path / "mine")
    params = parameters()
    set_gradients(params, 0)
    step_of(torch.optim.SGD(params, lr=0.1), tmp_path / "dump", torchair_config=config)()
    assert len(list((tmp_path / "mine").iterdir())) == 2
    assert not (folder(tmp_path / "dump") / "05_ge.txt").exists()
    plain = torchair.CompilerConfig()
    torch._dynamo.reset()
    step_of(torch.optim.SGD(params, lr=0.1), tmp_path / "plain", torchair_config=plain)()
    assert not plain.debug.graph_dump.enabled and (folder(tmp_path / "plain") / "05_ge.txt").exists()


def test_the_command_for_an_npu(
    ge: harness.Recording, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["NpuFusedAdam", "--params", "3", "--shape", "4x4", "--platform", "npu", "--check", "--out", str(tmp_path)]
    status = main(["dump", *given])
    said = capsys.readouterr()
    assert status == 0 and "everything is fused" in said.out, said
    assert {p.name for p in folder(tmp_path).iterdir()} >= set(GE_FILES)
