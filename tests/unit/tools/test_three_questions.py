"""The three questions, answered for what is broken in tests/broken by scripts/dump_graph.py alone.

Why is my optimizer not fused, why did it recompile, is it right.
"""

from __future__ import annotations

import json
import pathlib
import runpy
import sys

import pytest

from npu_fuse_pass.lowerings.cpu import kernel as cpu_kernel
from tests.support.training import forget_scripts

ROOT = pathlib.Path(__file__).resolve().parents[3]
BROKEN = "tests/broken"

# example -> where to look, and what it says
NOT_FUSED = {
    "value_in_python": [
        "Cautious.step: no graph reached the backend: ",
        "tests/broken/value_in_python.py:26, in step",
        "What to do: decide with torch.where",
    ],
    "unknown_operation": ["Centred.step: sort: this operation has no place", "what to do: rewrite this operation"],
    "fused_flag": ["AdamW.step: no graph reached the backend: fused=True", "construct the optimizer without it"],
}


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs the script with arguments; gives its exit status and what it prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cpu_kernel, "generate", cpu_kernel.generate)  # what an example does to it is undone

    def run(out: pathlib.Path, *given: str) -> tuple[int, str]:
        forget_scripts()
        monkeypatch.setattr(sys, "argv", ["dump_graph.py", "--out", str(out), *given])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("scripts/dump_graph.py", run_name="__main__")
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(str(ended.value.code)), printed.out

    return run


@pytest.mark.parametrize("example", NOT_FUSED)
def test_why_is_my_optimizer_not_fused(ask, example, tmp_path):
    status, said = ask(tmp_path, "--check", "--script", f"{BROKEN}/{example}.py")
    assert status == 1 and "not fused:" in said and "everything is fused" not in said
    for words in NOT_FUSED[example]:
        assert words in said, said
    status, said = ask(tmp_path, "--check", "--script", f"{BROKEN}/{example}.py", "--fixed")
    assert status == 0 and "everything is fused" in said and "not fused:" not in said, said


def test_why_did_it_recompile(ask, tmp_path):
    script = f"{BROKEN}/recompiles.py"
    status, said = ask(tmp_path / "broken", "--check", "--script", script)
    assert status == 0 and len(folders(tmp_path / "broken")) == 3  # it is slow, and fused
    first, lr, none = said.split(str(tmp_path / "broken"))[1:]
    assert "compiled again" not in first
    assert "compiled again: lr is a Python number, which is part of the graph, and it changed" in lr
    assert "self.param_groups[0]['lr'] == 0.01" in lr and "what to do: make it a tensor (lr=torch.tensor(...)" in lr
    assert "compiled again: other gradients are None than before" in none
    assert "what to do: zero_grad(set_to_none=False)" in none
    status, said = ask(tmp_path / "fixed", "--check", "--script", script, "--fixed")
    assert status == 0 and "compiled again" not in said and len(folders(tmp_path / "fixed")) == 1, said


def test_is_it_right(ask, tmp_path):
    script, right = f"{BROKEN}/wrong_kernel.py", cpu_kernel.generate
    status, said = ask(tmp_path / "unasked", "--check", "--script", script)
    assert status == 0 and "everything is fused" in said  # who does not ask does not learn it
    status, said = ask(tmp_path / "broken", "--check-numerics", "--script", script)
    (folder,) = folders(tmp_path / "broken")
    (group,) = json.loads((folder / "summary.json").read_text())["groups"]
    assert status == 1 and "wrong numbers:" in said
    assert f"the fused 'param' of 'weight' (8, 8) in group {group['name']} differs from the original's by " in said
    assert group["name"] in (folder / "04_kernel.cpp").read_text() and group["formula"]  # what to look at next
    cpu_kernel.generate = right
    status, said = ask(tmp_path / "fixed", "--check-numerics", "--script", script, "--fixed")
    assert status == 0 and "3 steps were compared with the original's: no difference" in said, said


def folders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(root.glob("rank_0/compile_*"))
