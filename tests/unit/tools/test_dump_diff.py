"""`dump --diff A B`: what changed between two dumps, in words."""

from __future__ import annotations

import json
import pathlib
import shutil
import warnings

import pytest
import torch

import optimizers
from npu_fuse_pass.__main__ import main
from npu_fuse_pass.tools.dump_diff import ordered

MADE = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.5),
    "lr": lambda p: torch.optim.Adam(p, lr=0.25),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.5, amsgrad=True),
    "half": lambda p: torch.optim.Adam([q.detach().half().requires_grad_() for q in p], lr=0.5),
    "one": lambda p: torch.optim.Adam(p[:1], lr=0.5),
    "two groups": lambda p: torch.optim.Adam([dict(params=p[:1], weight_decay=0.5), dict(params=p[1:])], lr=0.5),
    "muon": lambda p: torch.optim.Muon(p, lr=0.5),
    "rule": lambda p: optimizers.NpuFusedAdam(p, lr=0.5),
    "rule, lr": lambda p: optimizers.NpuFusedAdam(p, lr=0.25),
}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    root = tmp_path_factory.mktemp("dumps")
    for name, make in MADE.items():
        torch._dynamo.reset()
        opt = make([torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(5, 2))])
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(opt.step, backend="npu_fused", options={"dump": root / name})()
    return root


@pytest.fixture
def diff(dumps, capsys):
    def run(one: str | pathlib.Path, two: str | pathlib.Path) -> tuple[int, list[str]]:
        status = main(["dump", "--diff", str(dumps / one), str(dumps / two)])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_the_same(diff, dumps):
    for name in ("adam", "muon"):
        assert diff(name, name) == (0, [f"{dumps / name} and {dumps / name} show the same"])
    assert diff("rule", "rule, lr")[0] == 0  # numbers of our classes are no part of what is compiled


def test_a_number_in_the_graph(diff):
    status, said = diff("adam", "lr")
    assert status == 1
    assert any(line.startswith("01_updates.txt: was: ") and "(1 - 0.9^step')·0.5)" in line for line in said)
    assert any(line.startswith("01_updates.txt: is: ") and "(1 - 0.9^step')·0.25)" in line for line in said)
    assert any(line.startswith("02_groups.txt: is: ") and " 0.25 " in line for line in said)
    assert not any(line.startswith("group ") for line in said)


def test_an_option_that_changes_the_formula(diff):
    status, said = diff("adam", "amsgrad")
    assert status == 1
    assert "memory traffic: 36.0 bytes per element instead of 28.0" in said
    assert "  max_exp_avg_sq' = maximum(max_exp_avg_sq, exp_avg_sq') is new" in said
    assert "  known kernel: adam_amsgrad instead of adamw" in said
    assert any(
        line.startswith("  param' is ") and "max_exp_avg_sq'" in line.partition(" instead of ")[0] for line in said
    )
    assert not any("exp_avg_sq' is" in line for line in said)  # the same in another order
    back = diff("amsgrad", "adam")[1]
    assert "  max_exp_avg_sq' = maximum(max_exp_avg_sq, exp_avg_sq') is gone" in back


def test_a_dtype(diff):
    status, said = diff("adam", "half")
    assert status == 1 and "  dtype: f16 instead of f32" in said
    assert any(line.startswith("group update_") and " is now update_" in line for line in said)


def test_other_parameters(diff, dumps):
    name = json.loads((dumps / "adam" / "rank_0" / "compile_000" / "summary.json").read_text())["groups"][0]["name"]
    said = diff("adam", "one")[1]
    assert f"group {name}: parameters: 1 instead of 2" in said
    assert f"group {name}: elements: 12 instead of 22" in said


def test_a_group_that_appears_and_vanishes(diff, dumps):
    before, after = diff("adam", "two groups")[1], diff("two groups", "adam")[1]
    (appeared,) = [line for line in before if line.endswith("appeared: 1 x f32")]
    assert appeared.replace("appeared", "vanished") in after


def test_groups_of_one_formula_are_told_apart_by_the_rest(diff, dumps, tmp_path):
    """Two groups whose names change, as where their dtypes or shapes have a part in them."""
    shutil.copytree(dumps / "adam", tmp_path / "one")
    path = tmp_path / "one" / "rank_0" / "compile_000" / "summary.json"
    summary = json.loads(path.read_text())
    (group,) = summary["groups"]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    later = tmp_path / "two" / "rank_0" / "compile_000" / "summary.json"
    alone = {**group, "updates": 1, "elements": 1}
    path.write_text(json.dumps({**summary, "groups": [{**group, "name": "a"}, {**alone, "name": "b"}]}))
    later.write_text(json.dumps({**summary, "groups": [{**alone, "name": "c"}, {**group, "name": "d"}]}))
    said = diff(tmp_path / "one", tmp_path / "two")[1]
    assert "group a is now d" in said and "group b is now c" in said
    assert not any("parameters:" in line for line in said), said


def test_what_is_unfused(diff):
    status, said = diff("adam", "muon")
    assert status == 1 and "now unfused: matmul: this operation has no place in a fused kernel" in said
    assert "no longer unfused: matmul: this operation has no place in a fused kernel" in diff("muon", "adam")[1]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("torch", "9.9.0", f"torch version: 9.9.0 instead of {torch.__version__}"),
        ("fallback", "no compiler", "fallback: no compiler instead of None"),
        ("seconds", {"capture": 99.0}, None),
    ],
)
def test_a_fact_of_the_report(diff, dumps, tmp_path, key, value, says):
    shutil.copytree(dumps / "adam", tmp_path / "later")
    path = tmp_path / "later" / "rank_0" / "compile_000" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    status, said = diff("adam", tmp_path / "later")
    assert (status, said) == (1, [says]) if says else status == 0, said


def test_compiles_that_one_of_them_has(diff, dumps, tmp_path):
    shutil.copytree(dumps / "adam", tmp_path / "more")
    folders = tmp_path / "more" / "rank_0"
    shutil.copytree(folders / "compile_000", folders / "compile_001")
    (folders / "compile_000" / "04_kernel.cpp").unlink()
    status, said = diff("adam", tmp_path / "more")
    assert status == 1 and f"rank_0/compile_001 is only in {tmp_path / 'more'}" in said
    assert any(line.startswith("04_kernel.cpp is only in ") for line in said)
    assert diff(folders / "compile_001", dumps / "adam" / "rank_0" / "compile_000")[0] == 0  # folders of one compile


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("a·b + c", "c + b·a", True),
        ("a·b·c + 1/sqrt(b' + a')", "1/sqrt(a' + b') + c·b·a", True),
        ("a - b", "b - a", False),
        ("a/b", "b/a", False),
        ("a - (b - c)", "a - b - c", False),
        ("x^2", "2^x", False),
        ("where(a == b, c, d)", "where(a == b, d, c)", False),
        ("a + betas[0]", "betas[1] + a", False),
        ("not readable a b", "a b not readable", False),
    ],
)
def test_order_is_no_change(one, two, same):
    assert (ordered(one) == ordered(two)) == same
