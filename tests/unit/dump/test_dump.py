"""What `options={"dump": folder}` leaves behind for every compile."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

import npu_fuse_pass
import optimizers
from tests.support.training import SHAPES, assert_fused, gradients, last_report, parameters, set_gradients

FILES = {"00_dynamo_graph.py", "01_updates.txt", "02_groups.txt", "04_kernel.cpp", "summary.json", "table.txt"}


def compiled_once(opt: torch.optim.Optimizer, **options: object) -> None:
    """One compiled step, with a gradient everywhere."""
    npu_fuse_pass.clear_reports()
    params = [p for group in opt.param_groups for p in group["params"]]
    set_gradients(params, gradients(params, 0))
    torch.compile(opt.step, backend="npu_fused", options=options)()


def folders(root: pathlib.Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.glob("*/*"))


def test_every_compile_has_a_folder_of_its_own(tmp_path):
    params = parameters()
    compiled_once(optimizers.NpuFusedAdam(params), dump=tmp_path)
    report = last_report()
    assert_fused(report, parameters=len(params))
    compiled_once(torch.optim.SGD(params, lr=0.1), dump=str(tmp_path))
    assert_fused(last_report(), parameters=len(params))
    assert folders(tmp_path) == ["rank_0/compile_000", "rank_0/compile_001"]
    first = tmp_path / "rank_0" / "compile_000"
    assert {p.name for p in first.iterdir()} >= FILES
    assert json.loads((first / "summary.json").read_text()) == json.loads(json.dumps(report.to_json()))
    for name in ("01_updates.txt", "02_groups.txt", "04_kernel.cpp", "table.txt"):
        assert report.groups[0].name in (first / name).read_text()


@pytest.mark.parametrize("dump", ["", 3, True])
def test_what_is_no_folder_is_refused(dump):
    with pytest.raises(npu_fuse_pass.OptionError, match="allowed are None and the path of a folder"):
        npu_fuse_pass.compile_step(optimizers.NpuFusedAdam(parameters()), dump=dump)


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="no dump in") as caught:
        compiled_once(optimizers.NpuFusedAdam(parameters()), dump=tmp_path / "file")
    assert len([w for w in caught if "npu_fused" in str(w.message)]) == 1
    assert_fused(last_report(), parameters=len(SHAPES))


def test_a_file_that_cannot_be_made_is_one_warning(tmp_path, monkeypatch):
    from npu_fuse_pass.dump import write

    def broken(contents: object) -> str:
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(write._FILES, "01_updates.txt", broken)
    monkeypatch.setitem(write._FILES, "02_groups.txt", broken)
    with pytest.warns(UserWarning, match=r"01_updates.txt \(ZeroDivisionError: planted\); 02_groups") as caught:
        compiled_once(optimizers.NpuFusedAdam(parameters()), dump=tmp_path)
    assert len([w for w in caught if "npu_fused" in str(w.message)]) == 1
    assert_fused(last_report(), parameters=len(SHAPES))
    assert (tmp_path / "rank_0" / "compile_000" / "table.txt").is_file()


def test_the_environment_asks_for_dumps_too(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_FUSE_DUMP", str(tmp_path / "env"))
    monkeypatch.setenv("RANK", "3")
    compiled_once(optimizers.NpuFusedSGD(parameters(), lr=0.1))
    assert folders(tmp_path / "env") == ["rank_3/compile_000"]
    compiled_once(optimizers.NpuFusedSGD(parameters(), lr=0.1), dump=tmp_path / "option")
    assert folders(tmp_path / "env") == ["rank_3/compile_000"]
    assert folders(tmp_path / "option") == ["rank_3/compile_000"]


def test_torch_compile_debug_puts_dumps_into_torchs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    monkeypatch.setattr(torch._dynamo.config, "debug_dir_root", str(tmp_path))
    monkeypatch.setattr(torch._dynamo.utils, "_debug_dir", None, raising=False)
    compiled_once(optimizers.NpuFusedSGD(parameters(), lr=0.1))
    assert [p.name for p in tmp_path.rglob("npu_fuse_pass/rank_0/*")] == ["compile_000"]


def test_strict_leaves_a_dump_of_what_it_refuses(tmp_path):
    opt = torch.optim.Muon(parameters(((4, 3), (5, 5))), lr=0.1)
    with pytest.raises(Exception, match="not everything was fused"):
        compiled_once(opt, dump=tmp_path, strict=True)
    assert "unfused matmul" in (tmp_path / "rank_0" / "compile_000" / "table.txt").read_text()


def test_why_two_groups_are_not_one(tmp_path):
    half = [p.bfloat16() for p in (torch.randn(3), torch.randn(4, 4))]
    params = [*parameters(), *(torch.nn.Parameter(p) for p in half)]
    compiled_once(torch.optim.Adam(params, lr=0.1), dump=tmp_path / "dtypes")
    text = (tmp_path / "dtypes" / "rank_0" / "compile_000" / "02_groups.txt").read_text()
    assert "differs from group 1: dtype bf16 instead of f32" in text
    groups = [dict(params=parameters(((3, 4),))), dict(params=parameters(((5,),)), weight_decay=0.1)]
    compiled_once(torch.optim.Adam(groups, lr=0.1), dump=tmp_path / "structure")
    text = (tmp_path / "structure" / "rank_0" / "compile_000" / "02_groups.txt").read_text()
    assert "differs from group 1: another structure: first it has step + 1 instead of 0.1·(grad - state1)" in text
