"""The selftest where torch_npu loads and no NPU is there; its parity through the real torchair."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import harness
import pytest

from npu_fuse_pass.tools.selftest import cases, parity
from tests.support.cases import BY_NAME

ROOT = pathlib.Path(__file__).resolve().parents[2]


def selftest(folder: pathlib.Path, **environment: str | None) -> tuple[int, str]:
    """Exit status and report of the command in a process of its own; None takes a variable away."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    given = {name: value for name, value in variables.items() if value is not None}
    command = [sys.executable, "-m", "npu_fuse_pass", "selftest", "--out", "report.md"]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    return done.returncode, (folder / "report.md").read_text()


def test_it_ends_plainly_where_no_npu_is(tmp_path: pathlib.Path) -> None:
    status, text = selftest(tmp_path)
    assert status == 1
    assert "**Nothing was run, because of NPU: torch.npu finds none.** To go on: a machine with an Ascend NPU" in text
    version = importlib.metadata.version("torch_npu")
    for line in (f"- ok torch_npu: {version}", "- ok torchair: loads", "- note CANN: torch_npu finds no version"):
        assert line in text


def test_it_ends_plainly_where_cann_is_missing(tmp_path: pathlib.Path) -> None:
    """`import torch` itself fails then, because it loads every backend that is installed."""
    folders = os.environ["LD_LIBRARY_PATH"].split(os.pathsep)
    others = os.pathsep.join(folder for folder in folders if "cann" not in folder)
    status, text = selftest(tmp_path, LD_LIBRARY_PATH=others, TORCH_DEVICE_BACKEND_AUTOLOAD=None)
    assert status == 1
    assert "because of torch: RuntimeError: Failed to load the backend extension: torch_npu" in text
    assert "source CANN's set_env.sh first" in text


@pytest.mark.parametrize("name", ["adam", "lamb", "adamw, bfloat16 parameters"])
def test_parity_through_torchair(name: str) -> None:
    row, comma, half = name.partition(", ")
    label = BY_NAME[row].label + comma + half
    (case,) = [c for c in cases.cases(quick=False) if c.name == label]
    with harness.record() as graphs:
        outcome = parity.compare(case, "npu", "cpu")
    assert outcome.verdict == "ok", outcome
    assert sum(g.runs for g in graphs.graphs) == parity.STEPS


def test_parity_notices_a_graph_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import interpreter

    real = interpreter.evaluate
    monkeypatch.setattr(interpreter, "evaluate", lambda graph, inputs: [x * 1.0001 for x in real(graph, inputs)])
    (case,) = [c for c in cases.cases(quick=False) if c.name == "torch.optim.Adam"]
    with harness.record():
        assert parity.compare(case, "npu", "cpu").verdict == "WRONG"
