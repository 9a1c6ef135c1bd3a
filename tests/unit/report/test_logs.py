"""What a compile says: stages, one warning with a remedy, recompiles with their cause, and torch's trace log."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from npu_fuse_pass import options
from npu_fuse_pass.report import causes
from tests.support.training import gradients, parameters, set_gradients, warned

STAGES = ("capture", "group", "match", "lower", "rewrite")
SCRIPT = """
import torch, npu_fuse_pass
p = torch.nn.Parameter(torch.ones(3))
opt = torch.optim.Adam([p], lr=0.01)
step = torch.compile(opt.step, backend="npu_fused")
for lr in (0.01, 0.02):
    opt.param_groups[0]["lr"] = lr
    p.grad = torch.ones(3)
    step()
assert len(npu_fuse_pass.reports()) == 2
assert all(r.fallback is None and len(r.groups) == 1 for r in npu_fuse_pass.reports())
npu_fuse_pass.reports()[-1].fused_graph
"""

pytestmark = pytest.mark.usefixtures("afresh")


# TORCH_LOGS and TORCH_TRACE, as a user sets them ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    """What a script with both variables prints, and the trace log that it leaves."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "train.py").write_text(SCRIPT)
    env = {**os.environ, "TORCH_LOGS": "+npu_fuse_pass", "TORCH_TRACE": str(folder / "logs")}
    env["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(npu_fuse_pass.__file__).parents[1]), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, str(folder / "train.py")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (log,) = (folder / "logs").iterdir()
    return done.stderr, log


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_shown_with_its_time_and_result(run: tuple[str, pathlib.Path], stage: str) -> None:
    lines = re.findall(rf"\] (?:\[\S+\] )?{stage}: (\d+\.\d+) s: (.+)", run[0])
    assert len(lines) >= (1 if stage == "rewrite" else 2), run[0]  # there are two compiles
    assert all(float(seconds) >= 0 and result != "stopped" for seconds, result in lines)


def test_the_recompile_is_announced_with_a_remedy(run: tuple[str, pathlib.Path]) -> None:
    (line,) = [line for line in run[0].splitlines() if "npu_fused compiled again" in line]
    assert "['lr'] == 0.01" in line and "What to do: make it a tensor (lr=torch.tensor" in line


def artifacts(log: pathlib.Path) -> list[tuple[str, str]]:
    """Name and text of every artifact in a trace log: a line of JSON, then its payload behind tabs."""
    found = []
    for entry in re.split(r"^(?=V\d{4} )", log.read_text(encoding="utf-8"), flags=re.MULTILINE):
        head, _, payload = entry.partition("\n")
        record = json.loads(head[head.index("{") :]) if "{" in head else {}
        if "artifact" in record:
            text = "\n".join(line.removeprefix("\t") for line in payload.splitlines())
            found.append((str(record["artifact"]["name"]), text))
    return found


def test_the_trace_log_has_reports_and_graphs(run: tuple[str, pathlib.Path]) -> None:
    found = [(name, text) for name, text in artifacts(run[1]) if name.startswith("npu_fuse_pass")]
    assert [name.removeprefix("npu_fuse_pass_") for name, _ in found] == ["report", "table", "fused_graph"] * 2
    for name, text in found:
        if name == "npu_fuse_pass_report":
            assert json.loads(text)["groups"][0]["updates"] == 1
        elif name == "npu_fuse_pass_table":
            assert text.startswith("npu_fused on cpu: 1 parameters -> 1 kernel calls per step")
        else:
            assert "multi_tensor_update" in text and "class FusedStep" in text


def test_tlparse_lists_them(run: tuple[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    places = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    tlparse = shutil.which("tlparse", path=places)
    if tlparse is None:
        pytest.skip("tlparse is not installed (requirements/test.txt has it)")
    command = [tlparse, str(run[1]), "-o", str(tmp_path / "out"), "--no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for name in ("report", "table", "fused_graph"):
        files = set(re.findall(rf'href="([^"]*npu_fuse_pass_{name}[^"]*)"', page))
        assert len(files) == 2, (name, files)
        assert all((tmp_path / "out" / file).stat().st_size for file in files)


# Recompiles -----------------------------------------------------------------------------------------------------------


def lr(i: int, opt: Any, params: list[Any]) -> None:
    opt.param_groups[0]["lr"] = 0.01 / (1 + i)


def betas(i: int, opt: Any, params: list[Any]) -> None:
    opt.param_groups[0]["betas"] = (0.9 - 0.1 * i, 0.99)


def none(i: int, opt: Any, params: list[Any]) -> None:
    if i:
        params[0].grad = None


def another(i: int, opt: Any, params: list[Any]) -> None:
    if i:
        (q,) = parameters(((7,),))
        q.grad = torch.ones(7)
        opt.add_param_group({"params": [q]})


def nothing(i: int, opt: Any, params: list[Any]) -> None:
    pass


class CapturedAdam(torch.optim.Adam):
    """Dynamo captures the step of a subclass, which may be another one."""


class CapturedSGD(torch.optim.SGD):
    """As above."""


ADAM: Callable[[Any], Any] = lambda p: CapturedAdam(p, lr=0.01)  # noqa: E731
MOMENTUM: Callable[[Any], Any] = lambda p: CapturedSGD(p, lr=0.01, momentum=0.9)  # noqa: E731
OURS: Callable[[Any], Any] = lambda p: optimizers.NpuFusedAdam(p, lr=0.01)  # noqa: E731
RECOMPILES = {
    "lr": (ADAM, lr, "lr is a Python number", "torch.tensor"),
    "betas": (ADAM, betas, "a number in a parameter group changed", "optimizers.*"),
    "None gradient": (ADAM, none, "other gradients are None", "or use an optimizer of this package"),
    "another group": (ADAM, another, "parameters were added", None),
    "first states": (MOMENTUM, nothing, "created states, as first steps do", None),
    "ours, another group": (OURS, another, "planned anew: the number of parameters changed from 2 to 3", None),
}


@pytest.mark.parametrize("name", RECOMPILES)
def test_recompiles_have_cause_and_remedy(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, change, cause, remedy = RECOMPILES[name]
    params = parameters(((3, 4), (5,)))
    opt = make(params)
    step = npu_fuse_pass.compile_step(opt)
    with caplog.at_level(logging.INFO, logger="npu_fuse_pass"):
        for i in range(2):
            set_gradients(params, gradients(params, i))
            change(i, opt, params)
            step()
    first, second = npu_fuse_pass.reports()
    assert first.cause == "compile" and first.remedies == []
    assert cause in second.cause and second.fallback is None and second.groups
    assert second.cause_remedy is None if remedy is None else remedy in second.cause_remedy
    (said,) = [r for r in caplog.records if "npu_fused compiled again" in r.getMessage()]
    assert cause in said.getMessage() and (said.levelno == logging.WARNING) == (remedy is not None)


@pytest.mark.parametrize("change", [lr, betas, none])
def test_ours_announces_nothing_where_nothing_is_compiled(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    params = parameters(((3, 4), (5,)))
    opt = OURS(params)
    step = npu_fuse_pass.compile_step(opt)
    for i in range(3):
        set_gradients(params, gradients(params, i))
        change(i, opt, params)
        step()
    assert [r.cause for r in npu_fuse_pass.reports()] == ["compile"]
    assert "compiled again" not in caplog.text


def test_a_guard_that_is_not_known_is_shown_as_it_is() -> None:
    found = causes.recompile("3/1: some_new_guard(x)  # where it is\nUser stack trace: ...", False)
    assert found == causes.Cause("no longer true: some_new_guard(x)", None)


def test_another_instance_of_a_class_is_named_as_the_cause() -> None:
    for _ in range(2):
        params = parameters(((3,),))
        set_gradients(params, gradients(params, 0))
        torch.compile(torch.optim.Adam(params).step, backend="npu_fused")()
    second = npu_fuse_pass.reports()[-1]
    assert "another optimizer runs the same code" in second.cause and "compile_step" in str(second.cause_remedy)


# Fallbacks ------------------------------------------------------------------------------------------------------------


def test_tensors_that_share_memory_are_said_once_with_a_remedy() -> None:
    (p,) = parameters(((4,),))
    params = [p, torch.nn.Parameter(p.detach())]
    set_gradients(params, gradients(params, 0))
    step = npu_fuse_pass.compile_step(OURS(params))
    (said,) = warned(lambda: [step() for _ in range(3)])
    assert "share memory" in said and "What to do: give every parameter" in said


@pytest.mark.parametrize("variable", ["NPU_FUSE_DISABLE", "NPU_FUSE_VERIFY", "NPU_FUSE_CHECK_NUMERICS"])
def test_a_switch_that_is_set_to_another_value_says_so_once(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "true")
    options._say_unread.cache_clear()
    with caplog.at_level(logging.WARNING, "npu_fuse_pass"):
        for _ in range(2):
            npu_fuse_pass.explain(optimizers.NpuFusedSGD(parameters(), lr=0.1))
    (record,) = caplog.records
    assert record.message == f"npu_fused: {variable}=true switches nothing on: write {variable}=1"
