"""`python -m npu_fuse_pass selftest`, with the platform forced to the CPU, and where the device is missing."""

from __future__ import annotations

import getpass
import importlib
import json
import pathlib
import platform
import re
from typing import Any

import pytest
import torch

from npu_fuse_pass.__main__ import main
from npu_fuse_pass.lowerings.cpu import cpp_ops
from npu_fuse_pass.tools.selftest import cases, environment, parity, private, timing
from tests.support.training import tier

ROOT = pathlib.Path(__file__).resolve().parents[3]


def in_json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.rpartition("```json\n")[2].removesuffix("\n```\n"))
    return found


def selftest(out: pathlib.Path, *arguments: str) -> tuple[int, str]:
    """Exit status, and the report."""
    status = main(["selftest", "--out", str(out), *arguments])
    return status, out.read_text(encoding="utf-8")


def only(monkeypatch: pytest.MonkeyPatch, *chosen: cases.Case) -> None:
    """These cases, and no times."""
    monkeypatch.setattr(cases, "cases", lambda quick: list(chosen))
    monkeypatch.setattr(timing, "plan", lambda quick: [])
    monkeypatch.setattr(timing, "constants", lambda device, quick: {})


def case(name: str) -> cases.Case:
    return next(c for c in cases.cases(quick=False) if c.name == name)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    return selftest(tmp_path_factory.mktemp("quick") / "report.md", "--platform", "cpu", "--quick")


def test_everything_passes_on_a_cpu(quick: tuple[int, str]) -> None:
    status, text = quick
    found = in_json(text)
    assert status == 0, text
    assert "**Passed**" in text
    assert found["doing"] == ""
    assert [o["name"] for o in found["parity"]] == [c.name for c in cases.cases(quick=True)]
    for outcome in found["parity"]:
        assert outcome["verdict"] == "ok"
        assert 0 < outcome["error"] < outcome["tolerance"] == 1e-5  # float32 is never exactly float64
        assert all(re.match(r"1 x update_\w+, \d+ bytes/element", k) for k in outcome["kernels"])
    for rows in (found["environment"], found["timing"]):
        assert rows and not [r for r in rows if r.get("remedy") or r.get("failed")]
    assert all(value > 0 for value in found["constants"].values())


def test_times_are_given_for_every_contestant(quick: tuple[int, str]) -> None:
    expected = {"Adam": "Adam", "SGD, momentum": "SGD"}
    timed = in_json(quick[1])["timing"]
    assert {t["workload"] for t in timed} == set(timing.QUICK_WORKLOADS)
    for t in timed:
        name = expected[t["family"]]
        assert set(t["milliseconds"]) == {"ours", f"torch.optim.{name}, foreach", f"torch.optim.{name}, fused"}
        assert t["first_call"]["ours"] > t["milliseconds"]["ours"] > 0


def test_the_report_names_no_machine_and_no_folder(quick: tuple[int, str], tmp_path: pathlib.Path) -> None:
    for secret in (str(ROOT), str(pathlib.Path.home()), str(tmp_path.parent)):
        assert secret not in quick[1]


def test_what_is_private_is_taken_out() -> None:
    home, user, node = pathlib.Path.home(), getpass.getuser(), platform.node()
    text = private.anonymous(f'File "{home}/train/x.py", line 3; {home}/a-b/lib.so.1: cannot open; on {node} by {user}')
    assert text.startswith('File "x.py", line 3; lib.so.1: cannot open; on HOST by ')
    assert len(user) < 2 or text.endswith(" USER")
    for kept in (
        "28 bytes/element, GB/s",
        "lr/(1 - b1^t)·m/(sqrt(v)/c + eps)",
        "https://example.org/a/b",
        "torch/optim",
    ):
        assert private.anonymous(kept) == kept


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """A division that is off by 1e-4, in generated code only."""
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(cpp_ops.CPP, "div", "{0} / {1} * 1.0001f")
    only(monkeypatch, case("NpuFusedSGD"), case("NpuFusedAdam, weight_decay=0.05"))
    status, text = selftest(tmp_path / "report.md", "--platform", "cpu")
    sgd, adam = in_json(text)["parity"]
    assert status == 1
    assert "**FAILED**: 2 optimizers compared, 1 failed: NpuFusedAdam, weight_decay=0.05 (WRONG)" in text
    assert sgd["verdict"] == "ok"
    assert adam["verdict"] == "WRONG" and adam["error"] > 2e-5


OTHERS = [c for c in cases.cases(quick=False) if not c.quick]
HALF = tier([c for c in OTHERS if c.dtype is not torch.float32])


@pytest.mark.parametrize("name", [c.name for c in OTHERS if c.dtype is torch.float32 or c in HALF])
def test_the_other_optimizers_compare(name: str) -> None:
    outcome = parity.compare(case(name), "cpu", "cpu")
    assert outcome.verdict == "ok", outcome


def test_what_is_not_fused_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Right numbers are not enough: Adafactor's graphs never reach a backend whole."""
    only(monkeypatch, cases.Case("Adafactor", lambda p: torch.optim.Adafactor(p, foreach=False)))
    status, text = selftest(tmp_path / "report.md", "--platform", "cpu")
    (outcome,) = in_json(text)["parity"]
    assert status == 1
    assert outcome["verdict"] in ("NOT FUSED", "ERROR")
    assert outcome["why"]


def test_nan_and_errors_fail_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def broken(params: Any) -> Any:
        raise RuntimeError(f"no such thing in {ROOT}/x.py")

    nan = cases.Case("nan", lambda p: torch.optim.SGD(p, lr=float("nan")))
    only(monkeypatch, nan, cases.Case("broken", broken), case("NpuFusedSGD"))
    status, text = selftest(tmp_path / "report.md", "--platform", "cpu")
    assert status == 1
    assert [o["verdict"] for o in in_json(text.replace("NaN", "0"))["parity"]] == ["WRONG", "ERROR", "ok"]
    assert "RuntimeError: no such thing in x.py" in text


def test_a_contestant_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    only(monkeypatch)
    families = [timing.Family("broken", "NpuFusedAdam", "Adam", dict(lr=-1.0))]
    monkeypatch.setattr(timing, "plan", lambda quick: [(f, "8 x 256x256") for f in families])
    status, text = selftest(tmp_path / "report.md", "--platform", "cpu")
    assert status == 1
    assert "ours, broken on 8 x 256x256 (ValueError: Invalid learning rate" in text
    assert in_json(text)["timing"][0]["milliseconds"] == {}


def test_a_process_that_ends_leaves_what_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def dies(*args: Any) -> Any:
        raise KeyboardInterrupt

    only(monkeypatch, case("NpuFusedSGD"))
    monkeypatch.setattr(parity, "compare", dies)
    with pytest.raises(KeyboardInterrupt):
        selftest(tmp_path / "report.md", "--platform", "cpu")
    text = (tmp_path / "report.md").read_text()
    assert "**not finished**" in text and "parity of NpuFusedSGD" in text
    assert in_json(text)["doing"] == "parity of NpuFusedSGD"


def test_without_torch_npu_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_npu", None)
    status, text = selftest(tmp_path / "report.md")
    assert status == 1
    for said in (text, capsys.readouterr().out):
        assert "because of torch_npu" in said and 'pip install "npu-fuse-pass[npu]" torch==' in said
    asked = {f["name"] for f in in_json(text)["environment"]}
    assert {"torch", "optimizers", "protobuf", "C++ compiler and kernel cache", "NPU driver"} <= asked


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for check in ("torch_npu", "torchair", "CANN"):
        monkeypatch.setitem(environment._CHECKS["npu"], check, (lambda: "there", "", True))
    fake = type("npu", (), {"is_available": staticmethod(lambda: False)})
    monkeypatch.setattr(torch, "get_device_module", lambda name: fake)
    status, text = selftest(tmp_path / "report.md")
    assert status == 1
    assert "**Nothing was run, because of NPU: torch.npu finds none.** To go on: a machine with an Ascend NPU" in text
    assert "checked by --platform cpu" in text


def test_a_torch_that_does_not_import_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    real = importlib.import_module

    def fails(name: str, *args: Any) -> Any:
        if name == "torch":
            raise RuntimeError("Failed to load the backend extension: torch_npu. You can ...")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", fails)
    status, text = selftest(tmp_path / "report.md")
    assert status == 1
    assert "because of torch: RuntimeError: Failed to load the backend extension" in text
    assert "set_env.sh" in text


def test_without_a_compiler_nothing_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    from npu_fuse_pass.lowerings.cpu import compiler as cpu_compiler

    monkeypatch.setattr(cpu_compiler, "compiler", lambda: None)
    status, text = selftest(tmp_path / "report.md", "--platform", "cpu")
    assert status == 1
    assert "because of C++ compiler and kernel cache: none found" in text


def test_a_place_that_cannot_be_written(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["selftest", "--out", str(tmp_path / "file" / "report.md")]) == 1
    assert "--out" in capsys.readouterr().out
