"""The files of a dump: the same bytes in every process, code that runs, and one name for a group everywhere."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys
import time

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass import pipeline
from npu_fuse_pass.options import Options
from tests.support import forked
from tests.support.dump_cases import CASES, compiled
from tests.support.training import another_hash_seed, gradients, profiled, set_gradients

ROOT = pathlib.Path(__file__).resolve().parents[3]
COMPILES = [f"{name}/rank_0/compile_{i:03}" for name, (_, count) in CASES.items() for i in range(count)]


MAKE = ROOT / "tests" / "support" / "dump_cases.py"


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    root = tmp_path_factory.mktemp("dumps")
    made = forked.run_script(MAKE, str(root), cwd=ROOT, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert made.returncode == 0, made.stderr
    return root


def run_script(path: pathlib.Path) -> tuple[int, str]:
    """What 03_fused_graph.py gives and prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = runpy.run_path(str(path))["main"]()
    return status, printed.getvalue()


def summary(folder: pathlib.Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


def test_two_processes_write_the_same_bytes(dumps, tmp_path):
    """With other hashes of strings."""
    env = {**os.environ, "PYTHONHASHSEED": another_hash_seed(), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(MAKE), str(tmp_path)], cwd=ROOT, env=env, check=True, capture_output=True)
    again = tmp_path
    files = sorted(p.relative_to(dumps) for p in dumps.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert {str(f.parent) for f in files} == set(COMPILES)
    for file in files:
        if file.name == "summary.json":  # times are nowhere else
            one, two = summary((dumps / file).parent), summary((again / file).parent)
            assert one.pop("seconds") and two.pop("seconds")
            assert one == two
        else:
            assert (dumps / file).read_bytes() == (again / file).read_bytes(), file


@pytest.mark.parametrize("folder", COMPILES)
def test_the_fused_graph_computes_what_the_captured_one_does(dumps, folder):
    status, printed = run_script(dumps / folder / "03_fused_graph.py")
    assert status == 0, printed


@pytest.mark.parametrize(
    ("folder", "change", "into"),
    [
        ("adam/rank_0/compile_000", "= sqrt(", "= abs("),  # in a formula
        ("adam/rank_0/compile_000", "0.999,", "0.998,"),  # a number of the fused graph
        ("adam/rank_0/compile_000", "1e-08 /", "9.0 /"),  # in the captured graph
        ("sgd/rank_0/compile_001", "0.9,", "0.8,"),
        ("muon/rank_0/compile_000", "= div(", "= mul("),
        ("rows/rank_0/compile_000", "f64[] = sum_over(", "f64[] = amax_over("),
        ("double/rank_0/compile_000", "0.999,", "0.998,"),
        ("tail/rank_0/compile_000", "f64 = minimum(", "f64 = maximum("),
        ("tail/rank_0/compile_000", "_foreach_addcmul_(", "_foreach_addcdiv_("),
    ],
)
def test_the_script_notices_an_error(dumps, tmp_path, folder, change, into):
    text = (dumps / folder / "03_fused_graph.py").read_text()
    assert change in text
    script = tmp_path / "script.py"
    script.write_text(text.replace(change, into, 1))
    status, printed = run_script(script)
    said = "fused 9 NaN and 0 inf of 9" if folder.startswith("muon") else "relative difference up to"
    assert status == 1 and said in printed


def test_the_script_is_a_program(dumps, tmp_path):
    text = (dumps / "sgd" / "rank_0" / "compile_001" / "03_fused_graph.py").read_text()
    (tmp_path / "wrong.py").write_text(text.replace("0.9,", "0.8,", 1))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = forked.run_script(tmp_path / "wrong.py", cwd=tmp_path, environment=env)
    assert result.returncode == 1 and "params___0, torch.float32 (4, 3): relative difference" in result.stdout, result


def test_the_script_has_what_its_graphs_call(tmp_path):
    """Also what fx calls by names of its own."""
    graph = torch.fx.Graph()
    param, grad, rate = map(graph.placeholder, ("param", "grad", "rate"))
    for node, value in ((param, torch.ones(3)), (grad, torch.ones(3)), (rate, 0.5)):
        node.meta["example_value"] = value
    scaled = graph.call_function(torch.Tensor.mul, (grad, graph.call_function(math.pow, (rate, 2))))
    graph.call_function(torch.Tensor.sub_, (param, scaled))
    graph.output(())
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    pipeline.fuse_graph(gm, Options("cpu", dump=tmp_path)).report.raise_if_unfused()
    (script,) = tmp_path.rglob("03_fused_graph.py")
    text = script.read_text()
    assert "torch_Tensor_sub_ = torch.Tensor.sub_" in text and "from math import pow as math_pow" in text
    assert run_script(script)[0] == 0


def test_the_script_writes_integers(tmp_path):
    def step(param, count, last, places):
        last.copy_(count)
        count.add_(1)
        places.add_(1)
        param.mul_(0.5)

    arguments = [torch.ones(3), torch.tensor(2), torch.tensor(1), torch.arange(3)]
    torch.compile(step, backend="npu_fused", options={"dump": tmp_path})(*arguments)
    (script,) = tmp_path.rglob("03_fused_graph.py")
    assert run_script(script) == (0, "the fused graph computes what the captured one does\n")


@pytest.mark.parametrize("folder", COMPILES)
def test_one_name_for_a_group(dumps, folder):
    """Report, formulas, groups, FX node, kernel symbol and table."""
    names = [g["name"] for g in summary(dumps / folder)["groups"]]
    assert names
    text = {p.name[:2]: p.read_text() for p in (dumps / folder).iterdir()}
    for name in names:
        assert f"\n{name}  × " in text["01"]
        assert re.search(rf"group \d+: {name}  × ", text["02"])
        assert f"{name} = torch.ops.npu_fused.multi_tensor_update.default(" in text["03"]
        assert f'extern "C" void {name}(const Args* args)' in text["04"]
        assert re.search(rf"^{name} ", text["ta"], re.MULTILINE)


def test_the_profilers_range_has_that_name(tmp_path):
    params = [torch.nn.Parameter(torch.ones(3))]
    step = compiled(torch.optim.Adagrad(params, lr=0.1).step, tmp_path)
    set_gradients(params, gradients(params, 0))
    step()
    kernels, _ = profiled(step)
    assert kernels == [g["name"] for g in summary(tmp_path / "rank_0" / "compile_000")["groups"]]


@pytest.mark.parametrize("folder", COMPILES)
def test_every_value_of_a_kernel_has_its_name(dumps, folder):
    """And where that is one line of the formula, it is the line that stands above the kernel."""
    text = (dumps / folder / "04_kernel.cpp").read_text()
    values = [line for line in text.splitlines() if re.match(r"\s*const \w+ v\d+ = ", line)]
    assert values and all("  // " in line for line in values)
    pointers = [line for line in text.splitlines() if re.match(r"\s*(const )?\w+\* __restrict__ t\d+ = ", line)]
    assert pointers and all("  // " in line for line in pointers)
    named = [line.removeprefix("//   ") for line in text.splitlines() if re.match(r"//   x\d+ = ", line)]
    for line in named:
        assert any(f"  // {line}"[:150] in v for v in values), line


def test_stages_without_original_operations_are_told(dumps):
    text = (dumps / "rows" / "rank_0" / "compile_000" / "02_groups.txt").read_text()
    assert re.search(r"^segment 1: update_\w+$", text, re.MULTILINE)
    assert "as they were" not in text


def test_numbers_and_members_are_told(dumps):
    text = (dumps / "adam" / "rank_0" / "compile_000" / "01_updates.txt").read_text()
    assert "8 parameters are updated" in text
    rates = re.findall(r"-\(1/\(1 - 0.9\^\w+'\)·([\d.]+)\)", text)
    assert sorted(set(rates)) == ["0.01", "0.1"]
    assert "× 2  f32[4, 3]" not in text  # those of other numbers are listed apart
    groups = (dumps / "adam" / "rank_0" / "compile_000" / "02_groups.txt").read_text()
    assert "numbers in the graph: 0.1 × 2, 0.01 × 3" in groups
    assert "differs from group 1: dtype bf16 instead of f32" in groups


def test_no_values_of_tensors(tmp_path):
    params = [torch.nn.Parameter(torch.full((3,), 123.4375)), torch.nn.Parameter(torch.full((), 123.4375))]
    opt = torch.optim.Adam(params, lr=0.1)
    set_gradients(params, [torch.full_like(p, 123.4375) for p in params])
    compiled(opt.step, tmp_path)()
    for path in tmp_path.rglob("*.*"):
        assert "123.43" not in path.read_text(), path


def test_a_thousand_parameters_are_short_and_quick(tmp_path):
    params = [torch.nn.Parameter(torch.ones(3 + i % 3)) for i in range(1000)]
    set_gradients(params, gradients(params, 0))
    plain = npu_fuse_pass.rule(defaults=dict(lr=0.1))(lambda param, grad, *, lr: (param - lr * grad,))
    compiled(plain(params).step, tmp_path / "warm")()
    torch._dynamo.reset()
    begin = time.perf_counter()
    torch.compile(plain(params).step, backend="npu_fused")()
    middle = time.perf_counter()
    compiled(plain(params).step, tmp_path)()
    seconds = (time.perf_counter() - middle) - (middle - begin)
    folder = tmp_path / "rank_0" / "compile_000"
    sizes = {p.name: len(p.read_text()) for p in folder.iterdir()}
    print(f"a dump of 1000 parameters takes {seconds:.2f} s, and {sum(sizes.values())} characters")
    assert "× 334  f32[3]  " in (folder / "01_updates.txt").read_text()
    graphs = ("index.html", "00_dynamo_graph.py", "03_fused_graph.py")  # they have lines for every parameter
    assert max(sizes[name] for name in graphs) < 1000 * len(params)
    assert max(size for name, size in sizes.items() if name not in graphs) < 100_000
    assert seconds < 20
