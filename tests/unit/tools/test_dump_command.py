"""The command `dump`: every option, what it prints, its exit status, and errors that say what is allowed."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass.__main__ import main
from tests.support.forked import run_script
from tests.support.training import forget_scripts

ROOT = pathlib.Path(__file__).resolve().parents[3]
SMALL = "--params 3 --shape 4x4 --shape 5"
FINE, WANTING, USAGE = 0, 1, 2
TRAINING = """
import sys, torch, npu_fuse_pass, optimizers
params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
def gradients():
    for p in params:
        p.grad = torch.ones(4)
gradients()
"""


@pytest.fixture(autouse=True)
def _compile_afresh() -> None:
    forget_scripts()


@pytest.fixture
def dump(capsys, tmp_path):
    """Runs the command in a folder; gives its exit status and what it printed."""

    def run(line: str, out: str = "out") -> tuple[int, str]:
        *before, after = line.partition("--script") if "--script" in line else (line, "", "")
        status = main(["dump", *shlex.split(before[0]), "--out", str(tmp_path / out), *shlex.split(before[1] + after)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def script(folder: pathlib.Path, text: str) -> str:
    (folder / "train.py").write_text(TRAINING + text)
    return str(folder / "train.py")


def summaries(root: pathlib.Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(root.glob("rank_0/compile_*/summary.json"))]


@pytest.mark.parametrize("what", [f"NpuFusedAdam {SMALL}", "--script train.py"])
def test_a_folder_that_cannot_be_written(dump, tmp_path, what):
    (tmp_path / "file").write_text("")
    status, said = dump(what, out="file/below")
    assert status == USAGE and "dump: --out" in said and "no dump can be written there" in said


def test_an_optimizer_by_name(dump, tmp_path):
    status, said = dump(f"NpuFusedAdam {SMALL} --option lr=0.5 --option betas=(0.5,0.75) --check")
    (told,) = summaries(tmp_path / "out")
    (group,) = told["groups"]
    assert status == FINE and "everything is fused" in said and group["name"] in said
    assert (group["updates"], group["elements"], told["platform"]) == (3, 16 + 5 + 16, "cpu")
    assert (tmp_path / "out" / "rank_0" / "compile_000" / "index.html").is_file()


@pytest.mark.parametrize(
    "name", ["paddle.RMSProp", "lion", "SGD --option momentum=0.9", "AdamW --option foreach=False"]
)
def test_every_library_has_names(dump, name):
    status, said = dump(f"{name} {SMALL} --check --check-numerics")
    assert status == FINE and "everything is fused" in said and ": no difference" in said, said


def test_a_model_by_name(dump, tmp_path):
    assert dump("NpuFusedSGD --option lr=0.1 --model resnet50 --check")[0] == FINE
    (told,) = summaries(tmp_path / "out")
    assert [(g["updates"], g["elements"]) for g in told["groups"]] == [(161, 25_557_032)]


def test_models_have_the_sizes_of_their_papers():
    from npu_fuse_pass.tools.model_shapes import MODELS

    sizes = {n: (len(make()), sum(map(torch.Size.numel, map(torch.Size, make())))) for n, make in MODELS.items()}
    assert sizes == {"resnet50": (161, 25_557_032), "gpt2": (148, 124_439_808)}


def test_the_script_in_scripts_is_the_same(tmp_path):
    given = ["SGD", *SMALL.split(), "--check", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = run_script(ROOT / "scripts" / "dump_graph.py", *given, cwd=tmp_path, environment=environment)
    assert result.returncode == FINE and "everything is fused" in result.stdout, result


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "give one of: the name of an optimizer, --script train.py, --diff A B"),
        ("Adam --diff a b", "give one of"),
        ("train.py", "'train.py' is a script: it comes last, after --script"),
        ("--option lr=1 --script train.py", "--option goes with the name of an optimizer"),
        ("--params 0 --diff a b", "--params goes with the name of an optimizer"),
        ("Adam --model gpt2 --params 3", "leave --params and --shape out"),
        ("NpuFusedAdan", "there is no optimizer 'NpuFusedAdan'; did you mean NpuFusedAdam"),
        ("Adam --option speed=1", "Adam has no option 'speed'; it has lr, betas, eps"),
        ("lion --option speed=1", "lion has no option 'speed'; it has lr"),
        ("Adam --option lr", "--option 'lr': write name=value, as in --option lr=0.1"),
        ("Adam --option lr=-1", "Adam(lr=-1): Invalid learning rate: -1"),
        ("Adam --model bert", "there is no model 'bert'; there are resnet50, gpt2"),
        ("Adam --shape 3xa", "--shape '3xa' is none; write 256x256, or 1024"),
        ("Adam --params 0", "--params 0: at least one parameter is needed"),
        ("--diff here there", "here is no dump: it has neither summary.json nor"),
        ("--script nowhere.py", "there is no script 'nowhere.py'"),
    ],
)
def test_errors_say_what_is_allowed(dump, line, says):
    status, said = dump(line)
    assert status == USAGE and says in said and "Traceback" not in said


def test_an_unknown_platform_is_refused(capsys):
    with pytest.raises(SystemExit) as e:
        main(["dump", "Adam", "--platform", "tpu"])
    assert e.value.code == USAGE and "'cpu', 'npu'" in capsys.readouterr().err


def test_without_torch_npu_the_platform_shows_kernels_and_says_what_it_needs(dump):
    if hasattr(torch, "npu"):
        pytest.skip("torch_npu is here")
    _, said = dump(f"NpuFusedAdam {SMALL} --platform npu")
    assert "generated NPU kernel" in said
    assert 'kernels are only shown: platform "npu" needs torch_npu' in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Adafactor", "no graph reached the backend: Adafactor reads its step counter with item()"),
        ("LBFGS", "no graph reached the backend: Dynamo does not look into LBFGS.step"),
        ("SparseAdam", "no graph reached the backend: Dynamo does not look into SparseAdam.step"),
        ("AdamW --option fused=True", "no graph reached the backend: fused=True: torch's own fused kernels are hidden"),
        ("Muon --params 3", "Muon.step: matmul: this operation has no place in a fused kernel"),
    ],
)
def test_what_is_not_fused_has_a_reason_and_a_status(dump, name, says):
    status, said = dump(f"{name} --shape 4x4 --check")
    assert status == WANTING and "not fused:" in said and says in said and "everything is fused" not in said
    assert dump(f"{name} --shape 4x4")[0] == FINE  # without --check it is told all the same
    assert says in said


COMPILES = {
    "string": 'step = torch.compile(opt.step, backend="npu_fused")',
    "function": "step = torch.compile(opt.step, backend=npu_fuse_pass.npu_fused)",
    "decorator": '@torch.compile(backend="npu_fused")\ndef step():\n    opt.step()',
    "compile_step": "step = npu_fuse_pass.compile_step(opt)",
    "imported": 'from torch import compile\nstep = compile(opt.step, backend="npu_fused", options={"strict": True})',
}


@pytest.mark.parametrize("way", COMPILES)
def test_every_compile_in_a_script_is_followed(dump, tmp_path, way):
    path = script(tmp_path, f"opt = torch.optim.SGD(params, lr=0.1)\n{COMPILES[way]}\nfor _ in range(2):\n    step()\n")
    status, said = dump(f"--check --check-numerics --script {path} --epochs 1")
    assert status == FINE and "everything is fused" in said and "2 steps were compared" in said, said
    assert [g["updates"] for told in summaries(tmp_path / "out") for g in told["groups"]] == [3]


def test_a_script_sees_its_arguments_and_may_exit(dump, tmp_path):
    path = script(tmp_path, "assert sys.argv[1:] == ['--out', 'x'] and __name__ == '__main__'\nsys.exit(3)\n")
    status, said = dump(f"--script {path} --out x")
    assert status == WANTING and "ended with exit status 3" in said


EXITS = "sys.exit('pass --data')"


def test_what_a_script_says_when_it_exits_is_printed(dump, tmp_path):
    """Python prints it at its end, which does not come here."""
    status, said = dump(f"--script {script(tmp_path, EXITS)}")
    assert status == WANTING and "pass --data" in said and "ended with exit status 1" in said


def test_a_script_that_changes_the_folder_it_is_in(dump, tmp_path, monkeypatch):
    """Dumps lie where the command was called, and where it says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    step = 'torch.compile(torch.optim.SGD(params, lr=0.1).step, backend="npu_fused")()'
    path = script(tmp_path, f"import os\nos.chdir('elsewhere')\n{step}\n")
    assert main(["dump", "--out", "out", "--script", path]) == FINE
    assert (tmp_path / "out" / "rank_0" / "compile_000" / "summary.json").is_file()
    assert not (tmp_path / "elsewhere" / "out").exists()


@pytest.mark.filterwarnings("ignore:npu_fused. Adafactor was not compiled")
@pytest.mark.parametrize("way", ["npu_fuse_pass.compile_optimizer_(other)", "npu_fuse_pass.compile_step(other)"])
def test_what_torch_hides_is_told_beside_what_is_fused(dump, tmp_path, way):
    text = f"""
opt = npu_fuse_pass.compile_optimizer_(torch.optim.SGD(params, lr=0.1))
opt.step()
other = torch.optim.Adafactor(params)
{way}
other.step()
"""
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "everything is fused" not in said, said
    assert "Adafactor.step: no graph reached the backend: Adafactor reads its step counter" in said, said


def test_a_script_that_fails(dump, tmp_path):
    status, said = dump(f"--script {script(tmp_path, '[][1]')}")
    assert status == WANTING and "failed:" in said and "IndexError" in said and "Traceback" in said


def test_a_script_that_compiles_nothing(dump, tmp_path):
    status, said = dump(f"--check --script {script(tmp_path, '')}")
    assert status == WANTING and 'nothing was compiled with torch.compile(..., backend="npu_fused")' in said
    assert "What to do: call npu_fuse_pass.compile_optimizer_(opt)" in said


def test_a_step_that_is_never_called(dump, tmp_path):
    text = 'torch.compile(torch.optim.SGD(params, lr=0.1).step, backend="npu_fused")\n'
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "SGD.step: no graph reached the backend: it was never called" in said


INLINED = """
opt = npu_fuse_pass.compile_optimizer_(torch.optim.SGD(params, lr=0.1))
tail = torch.compile(lambda: opt.step(), backend="npu_fused")
for _ in range(2):
    tail()
"""
CAPTURED = """
opt = npu_fuse_pass.compile_optimizer_(torch.optim.Adam(params, capturable=True))
for _ in range(2):
    opt.step()
"""


@pytest.mark.parametrize("text", [INLINED, CAPTURED], ids=["inlined", "captured"])
def test_a_step_that_runs_elsewhere(dump, tmp_path, text):
    """Another function has the step in its graph, or Dynamo captures it: the rule's core never runs."""
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == FINE and "everything is fused" in said, said


def test_a_core_has_the_name_of_its_step(dump, tmp_path):
    text = "npu_fuse_pass.compile_optimizer_(torch.optim.SGD(params, lr=0.1))\n"
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "SGD.step: no graph reached the backend: it was never called" in said


def test_another_backend_is_left_alone(dump, tmp_path):
    text = 'opt = torch.optim.SGD(params, lr=0.1)\ntorch.compile(opt.step, backend="eager")()\n'
    before = torch.compile
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "nothing was compiled" in said and torch.compile is before


def test_steps_past_torchs_limit_of_compiles_are_told(dump, tmp_path):
    """From then on torch runs the step eagerly and says so in its log only."""
    text = """
step = torch.compile(torch.optim.SGD(params, lr=0.1).step, backend="npu_fused")
for i in range(1, 7):
    for k, p in enumerate(params):
        p.grad = torch.ones(4) if i >> k & 1 else None  # other parameters every time
    step()
"""
    with torch._dynamo.config.patch(recompile_limit=3):
        status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "of 6 steps ran in no compiled graph; torch stops at its limit" in said, said


@pytest.mark.parametrize("variable", ["NPU_FUSE_DISABLE", "TORCHDYNAMO_DISABLE"])
@pytest.mark.parametrize("way", ["npu_fuse_pass.compile_optimizer_(opt)", COMPILES["function"] + "\nopt.step = step"])
def test_what_switches_everything_off_is_told(dump, tmp_path, monkeypatch, variable, way):
    monkeypatch.setenv(variable, "1")
    text = f"opt = torch.optim.SGD(params, lr=0.1)\n{way}\nopt.step()\n"
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and variable in said.partition("not fused:")[2], said
    assert "never called" not in said and "limit" not in said
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(4))])
    (reason,) = npu_fuse_pass.explain(opt).reasons
    assert variable in str(reason) and reason.remedy


def test_an_optimizer_past_torchs_limit_of_compiles_is_told(dump, tmp_path):
    """Instances of a class share it; the last one was called, and had gradients."""
    text = """
for _ in range(4):
    torch.compile(torch.optim.SGD(params, lr=0.1).step, backend="npu_fused")()
"""
    with torch._dynamo.config.patch(recompile_limit=3):
        status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "SGD.step: no graph reached the backend: torch stops at its limit" in said, said
    assert "never called" not in said


def test_what_a_break_leaves_out_is_told(dump, tmp_path):
    """The inner function is compiled; the loop around it is not, because it reads a value."""
    text = """
class Half(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})
    @torch.no_grad()
    def step(self):
        first, *rest = self.param_groups[0]["params"]
        first.sub_(first.grad)
        torch._dynamo.graph_break()
        for p in rest:
            if p.grad.sum().item() < 100:
                p.sub_(p.grad)
step = torch.compile(Half(params).step, backend="npu_fused")
step()
"""
    status, said = dump(f"--check --script {script(tmp_path, text)}")
    assert status == WANTING and "Half.step: compiled graphs updated 1 of 3 parameters" in said, said
    assert "graph_break()` (" in said and "train.py:16, in step" in said


def test_steps_are_measured_on_request(dump, tmp_path):
    """The page of the last compile then shows them; nothing else of the dump changes, and --diff does not care."""
    status, out = dump("NpuFusedAdam --params 2 --shape 8 --time", "timed")
    assert status == 0 and "ms compiled" in out
    page = (tmp_path / "timed/rank_0/compile_000/index.html").read_text()
    found = json.loads(re.search(r'"measured":({[^}]*})', page)[1])
    assert found.keys() == {"before", "after"} and min(found.values()) > 0
    assert dump("NpuFusedAdam --params 2 --shape 8", "untimed")[0] == 0
    assert '"measured":{}' in (tmp_path / "untimed/rank_0/compile_000/index.html").read_text()
    assert dump(f"--diff {tmp_path / 'timed'} {tmp_path / 'untimed'}")[0] == FINE


def test_an_option_may_be_a_dtype(dump):
    status, said = dump("NpuFusedAdam --params 2 --shape 8 --option state_dtype=torch.bfloat16")
    assert status == FINE and "20" in said.split("update_")[-1].splitlines()[0], said


@pytest.mark.parametrize("line", ["--time --script train.py", "NpuFusedAdam --time --platform npu"])
def test_what_cannot_be_measured(dump, line):
    assert dump(line)[0] == USAGE
