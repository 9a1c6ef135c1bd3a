"""`python -m npu_fuse_pass doctor`: its parts, its errors, and a walk through what is broken in tests/broken."""

from __future__ import annotations

import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from npu_fuse_pass.__main__ import main
from npu_fuse_pass.lowerings.cpu import kernel as cpu_kernel
from npu_fuse_pass.tools.doctor import Diagnosis, examine
from npu_fuse_pass.tools.observe import Observed, observe
from tests.support.forked import run_script

ROOT = pathlib.Path(__file__).resolve().parents[3]
BROKEN = pathlib.Path(__file__).parents[3] / "tests" / "broken"
HEAD = "import torch, optimizers, npu_fuse_pass\n"
HEAD += "p = torch.nn.Parameter(torch.randn(1000))\nq = torch.nn.Parameter(torch.randn(500))\n"
LOOP = "for _ in range(9):\n    p.grad, q.grad = torch.randn(1000), torch.randn(500)\n    {step}\n"

pytestmark = pytest.mark.usefixtures("afresh")


def diagnose(folder: pathlib.Path, made: str, step: str = "opt.step()", **given: bool) -> Diagnosis:
    script = folder / "train.py"
    script.write_text(HEAD + f"opt = {made}\n" + LOOP.format(step=step))
    (seen,) = observe(str(script), [], 3)
    assert seen.steps == 3
    return examine(seen, **given)


def found(diagnosis: Diagnosis) -> str:
    return "\n".join(diagnosis.findings)


@pytest.mark.parametrize(
    ("made", "step"),
    [
        ("torch.optim.Adam([p, q], weight_decay=0.1)", "opt.step()"),
        ("optimizers.NpuFusedAdam([p, q], weight_decay=0.1)", "opt.step()"),
        ("optimizers.NpuFusedAdam([p, q], weight_decay=0.1)", 'torch.compile(opt.step, backend="npu_fused")()'),
    ],
    ids=["stock", "ours", "ours, compiled"],
)
def test_the_gain_is_measured(made: str, step: str, tmp_path: pathlib.Path) -> None:
    result = diagnose(tmp_path, made, step, check_numerics=True)
    assert not result.findings, found(result)
    result.report.raise_if_unfused()
    now, fused = result.calls
    assert now is not None and now >= 16 and fused == 1
    assert result.report.bytes_per_element["after"] == 28 < result.report.bytes_per_element["before"]
    measured = {who.partition(" (")[0].partition(",")[0]: size for who, size in result.memory.items()}
    assert measured["fused"] == 0
    assert measured["torch_npu.optim"] == 3 * 4 * 1500  # root, quotient, decayed gradient
    assert measured["torch.optim.Adam"] >= 4 * 1500  # the root; the decayed gradient is given up before
    assert measured["as the script runs it"] >= 2 * 4 * 1000  # one parameter after the other
    text = str(result)
    assert f"now {now}, fused 1" in text and "fused 28" in text and "in the way: nothing" in text
    assert "(modelled" in text and result.report.groups[0].name in text


WAYS = {
    "fused kernels of torch": ("torch.optim.Adam([p, q], fused=True)", "opt.step()", "fused=True"),
    "closure": ("torch.optim.SGD([p, q])", "opt.step(lambda: None)", "closure"),
    "hidden": ("torch.optim.Adafactor([p, q])", "opt.step()", "Adafactor reads its step counter"),
    "lr": ("torch.optim.SGD([p, q])", "opt.step(); opt.param_groups[0]['lr'] *= 0.5", "lr=torch.tensor"),
    "betas": (
        "torch.optim.Adam([p, q])",
        "opt.step(); opt.param_groups[0]['betas'] = (p.numel() * _ / 1e4, 0.9)",
        "betas",
    ),
    "None": ("torch.optim.SGD([p, q])", "q.grad = None if _ % 2 else q.grad; opt.step()", "set_to_none=False"),
    "tied": ("torch.optim.SGD([p, torch.nn.Parameter(p.detach()[2:9])])", "opt.step()", "share memory"),
    "sparse": ("torch.optim.SGD([p, q])", "p.grad = p.grad.to_sparse(); opt.step()", "sparse=False"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_stands_in_the_way_is_named(way: str, tmp_path: pathlib.Path) -> None:
    made, step, says = WAYS[way]
    assert says in found(diagnose(tmp_path, made, step))


@pytest.mark.parametrize("change", ["opt.param_groups[0]['lr'] *= 0.5", "q.grad = None if _ % 2 else q.grad"])
def test_what_ours_takes_is_not_in_the_way(change: str, tmp_path: pathlib.Path) -> None:
    assert not diagnose(tmp_path, "optimizers.NpuFusedSGD([p, q], lr=0.1)", f"{change}; opt.step()").findings


ROADS = {
    "compile_optimizer_": ("npu_fuse_pass.compile_optimizer_(torch.optim.SGD([p, q], lr=0.1))", "opt.step()"),
    "compile_step": ("torch.optim.SGD([p, q], lr=0.1); step = npu_fuse_pass.compile_step(opt)", "step()"),
}
CHANGES = ["pass", "opt.param_groups[0].update(lr=0.1 * _, momentum=0.1 * _)", "q.grad = None if _ % 2 else q.grad"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ROADS)
def test_what_a_rule_in_torchs_place_takes_is_not_in_the_way(way: str, change: str, tmp_path: pathlib.Path) -> None:
    made, step = ROADS[way]
    diagnosis = diagnose(tmp_path, made, f"{change}; {step}")
    assert diagnosis.report.replaces == "torch.optim.SGD" and not diagnosis.findings, found(diagnosis)


@pytest.mark.parametrize("change", CHANGES[1:])
def test_who_recompiles_for_it(change: str, tmp_path: pathlib.Path) -> None:
    """A step by torch.compile does; what compile_optimizer_ makes does not, but for classes that Dynamo captures."""
    said = found(diagnose(tmp_path, "torch.optim.SGD([p, q], lr=0.1)", f"{change}; opt.step()"))
    assert "a step by torch.compile(opt.step) recompiles" in said and "compile_optimizer_(opt), whose step" in said
    captured = (
        "npu_fuse_pass.compile_optimizer_(torch.optim.SGD([p, q], lr=0.1, momentum=0.9, nesterov=True, foreach=True))"
    )
    diagnosis = diagnose(tmp_path, captured, f"{change}; opt.step()")
    assert diagnosis.report.replaces is None and "the compiled step recompiles" in found(diagnosis)
    assert "compile_optimizer_" not in found(diagnosis)


def test_dtensors_whose_parts_lie_apart_share_no_memory() -> None:
    """A DTensor has no address of its own."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = [torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        assert not examine(Observed(torch.optim.SGD(params))).findings
    finally:
        torch.distributed.destroy_process_group()


def test_every_optimizer_of_a_loop_is_measured(tmp_path: pathlib.Path) -> None:
    """But one that steps more rarely: it is not waited for."""
    made = "one, two, rare = torch.optim.SGD([p]), torch.optim.SGD([q]), torch.optim.SGD([p])\nrare.step()\n"
    loop = LOOP.format(step="one.step(); two.step()") + "rare.step()\n"
    (tmp_path / "train.py").write_text(HEAD + made + loop)
    rare, first, second = (str(examine(seen)) for seen in observe(str(tmp_path / "train.py"), [], 2))
    for one in (first, second):
        assert "now not measured" not in one and "as the script runs it" in one
    assert "now not measured (it made fewer steps than were asked for), fused 1" in rare


def test_a_scheduler_counts_before_it_changes_anything(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train.py").write_text(
        HEAD
        + "opt = torch.optim.SGD([p, q], lr=0.1)\nscheduler = torch.optim.lr_scheduler.StepLR(opt, 30)\n"
        + LOOP.format(step="opt.step()")
    )
    assert "a scheduler" in found(examine(*observe(str(tmp_path / "train.py"), [], 1)))


def test_the_script_sees_what_it_sees_alone(tmp_path: pathlib.Path) -> None:
    """Its arguments, its folder on the path, its name; it ends in the middle of the step that was asked for."""
    (tmp_path / "mine.py").write_text("lr = 0.5\n")
    (tmp_path / "train.py").write_text(
        "import sys, mine, npu_fuse_pass\nassert __name__ == '__main__' and sys.argv[1:] == ['--a', '1'], sys.argv\n"
        + HEAD
        + "opt = torch.optim.SGD([p], lr=mine.lr)\nstep = npu_fuse_pass.compile_step(opt)\n"
        + "for i in range(9):\n    assert i < 3\n    p.grad = torch.ones(1000)\n    step()\n"
    )
    argv, path = sys.argv, list(sys.path)
    (seen,) = observe(str(tmp_path / "train.py"), ["--a", "1"], 3)
    assert seen.steps == 3 and sys.argv is argv and sys.path == path


ERRORS = {
    "no script": (None, "there is no script"),
    "never steps": ("import torch\n", "without a step of any torch.optim.Optimizer"),
    "fails": ("raise KeyError('data')\n", "failed before one of its optimizers"),
    "exits": ("import sys\nsys.exit('no GPU')\n", "failed before one of its optimizers"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_clear(name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, says = ERRORS[name]
    if source is not None:
        (tmp_path / "train.py").write_text(source)
    assert main(["doctor", "--script", str(tmp_path / "train.py")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", ["doctor --steps 0 --script x.py", "dump --steps 2 --script x.py", "dump SGD --steps 2"]
)
def test_steps_are_those_of_a_script_that_is_checked(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given.split()) == 2
    assert "it goes with --check --script" in capsys.readouterr().err


def test_a_script_without_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "train.py"]) == 2
    assert "'train.py' is a script: it comes last, after --script" in capsys.readouterr().err


# The broken examples, answered by commands alone ----------------------------------------------------------------------

DOCTOR = ["doctor", "--steps", "2", "--script"]
CHECK = ["doctor", "--check-numerics", "--script"]


def alone(*given: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A script as a user calls it."""
    path = os.pathsep.join([str(ROOT), *sys.path[1:]])
    return run_script(*given, cwd=ROOT, environment={**os.environ, "PYTHONPATH": path, **env})


def test_why_did_it_recompile(capsys: pytest.CaptureFixture[str]) -> None:
    """The run says so itself; the doctor names all that will, before anything is compiled twice; the fix is silent."""
    script = str(BROKEN / "recompiles.py")
    said = [line for line in alone(script).stderr.splitlines() if "npu_fused compiled again" in line]
    assert any("['lr'] == 0.01" in line and "What to do: make it a tensor" in line for line in said), said
    assert main([*DOCTOR, script]) == 1
    told = capsys.readouterr().out
    assert "lr is a Python number and a scheduler" in told and "lr=torch.tensor(...)" in told
    assert "gradients are None at some steps" in told and "set_to_none=False" in told
    assert main([*DOCTOR, script, "--fixed"]) == 0
    assert "in the way: nothing" in capsys.readouterr().out
    assert "compiled again" not in alone(script, "--fixed").stderr


def test_is_it_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The doctor compares on copies; the environment variable compares in the run itself, without changing the code."""
    monkeypatch.setattr(cpu_kernel, "generate", cpu_kernel.generate)  # what the script does to it is undone
    script = str(BROKEN / "wrong_kernel.py")
    assert main([*CHECK, script, "--fixed"]) == 0
    capsys.readouterr()
    assert main([*CHECK, script]) == 1
    difference = "step 1 of this compile: the fused 'param' of 'weight' (8, 8) in group update_"
    assert f"WRONG NUMBERS: {difference}" in capsys.readouterr().out
    assert f"NumericsError: {difference}" in alone(script, NPU_FUSE_CHECK_NUMERICS="1").stderr


def test_without_the_check_the_wrong_kernel_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would prove nothing."""
    monkeypatch.setattr(cpu_kernel, "generate", cpu_kernel.generate)
    monkeypatch.setattr(sys, "argv", ["wrong_kernel.py"])
    runpy.run_path(str(BROKEN / "wrong_kernel.py"))
