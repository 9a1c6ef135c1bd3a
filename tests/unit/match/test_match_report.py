"""Matching through the pipeline: what the report of a compiled optimizer says, when it is decided, what if it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from npu_fuse_pass import lower as platforms
from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.match import find
from npu_fuse_pass.report import rows
from npu_fuse_pass.report.report import KernelMatch
from tests.support.training import assert_fused, compiled, gradients, last_report, parameters, set_gradients, train

SHAPES = [(3, 4), (5,), (2, 3), (5,)]


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Instances of one class share torch's limit of 8 compiles; decisions are remembered."""
    torch._dynamo.reset()
    find._decide.cache_clear()
    yield
    find._decide.cache_clear()


def report_of(cls: Any, options: dict[str, Any], **backend: Any) -> Any:
    """The report of the second step: at the first one torch's classes have no state yet."""
    params = parameters(SHAPES)
    opt = cls(params, **options)
    step = compiled(opt, fullgraph=False, **backend)
    train(params, step, seeds=range(2))
    report = last_report()
    if not backend:
        assert_fused(report, parameters=len(SHAPES))
    return report


ADAMW = dict(lr="0.02", beta1="0.9", beta2="0.999", epsilon="1e-08", beta1_power="0.9^step", beta2_power="0.999^step")
RULE = dict(lr="lr", beta1="betas[0]", beta2="betas[1]", epsilon="eps", beta1_power="betas[0]^step")
AMSGRAD = dict(beta1_power="0.9^x0", x0="step + 1", epsilon="1e-08·sqrt(1 - beta2_power)")
MOMENTUM = dict(lr="lr", momentum="0.9")
CENTERED = dict(lr="lr", rho="alpha", momentum="momentum", epsilon="eps")
DECAYED = dict(lr=0.02, weight_decay=0.1)

CASES: list[tuple[Any, dict[str, Any], str, dict[str, str]]] = [
    (torch.optim.Adam, dict(lr=0.02), "adamw", {**ADAMW, "weight_decay": "0"}),
    (torch.optim.Adam, dict(DECAYED, foreach=False), "adamw", {"grad": "param·0.1 + grad", **ADAMW}),
    (torch.optim.Adam, dict(lr=torch.tensor(0.02), capturable=True), "adamw", {**ADAMW, "lr": "lr"}),
    (torch.optim.AdamW, DECAYED, "adamw", {**ADAMW, "weight_decay": "(1 - 0.998)/0.02"}),
    (torch.optim.AdamW, dict(DECAYED, amsgrad=True), "adam_amsgrad", {"var": "param·0.998", **AMSGRAD}),
    (torch.optim.SGD, dict(lr=0.02, momentum=0.9), "momentum", MOMENTUM),
    (torch.optim.SGD, dict(lr=0.02, momentum=0.9, nesterov=True), "nesterov", MOMENTUM),
    (optimizers.NpuFusedAdam, dict(lr=0.02), "adamw", {"grad": "grad + param·weight_decay", **RULE}),
    (optimizers.NpuFusedAdamW, dict(lr=0.02), "adamw", {**RULE, "weight_decay": "weight_decay"}),
    (optimizers.NpuFusedAdamW, dict(lr=0.02, amsgrad=True), "adam_amsgrad", {"epsilon": "eps·sqrt(1 - beta2_power)"}),
    (optimizers.NpuFusedSGD, dict(lr=0.02, momentum=0.9), "momentum", dict(lr="lr")),
    (optimizers.NpuFusedRMSpropTF, dict(momentum=0.9), "rmsprop", CENTERED),
    (optimizers.NpuFusedRMSpropTF, dict(momentum=0.9, centered=True), "centered_rmsprop", CENTERED),
    # epsilon beside the root
    (torch.optim.RMSprop, dict(momentum=0.9, centered=True), "", {}),
    # the first update takes the gradient undampened, and looks ahead by the whole momentum
    (optimizers.NpuFusedSGD, dict(lr=0.02, momentum=0.9, nesterov=True), "", {}),
    (torch.optim.SGD, dict(lr=0.02), "", {}),
    (optimizers.NpuFusedLamb, dict(lr=0.02), "", {}),
]


def sorted_products(text: str) -> str:
    """A sum of products in an order that does not depend on hashes."""
    return " + ".join(sorted("·".join(sorted(term.split("·"))) for term in text.split(" + ")))


@pytest.mark.parametrize(
    ("cls", "options", "kernel", "arguments"), CASES, ids=[f"{i}-{c[0].__name__}-{c[2]}" for i, c in enumerate(CASES)]
)
def test_the_report_names_the_kernel(cls: Any, options: dict[str, Any], kernel: str, arguments: dict[str, str]) -> None:
    report = report_of(cls, options)
    (row,) = report.groups
    (line,) = [line for line in str(report).splitlines() if line.startswith("      match: ")]
    in_json = json.loads(json.dumps(report.to_json()))["groups"][0]
    if not kernel:
        assert row.match is None and row.no_match
        assert line == f"      match: none, {row.no_match}"
        assert in_json["match"] is None and in_json["no_match"] == row.no_match
        return
    assert row.match.kernel == kernel and row.no_match == ""
    assert row.match.tolerance == 1e-6
    found = {name: sorted_products(text) for name, text in row.match.arguments.items()}
    assert found.items() >= {name: sorted_products(text) for name, text in arguments.items()}.items(), found
    assert row.match.tensors["var"] == "param"
    assert line.startswith(f"      match: {kernel} (within 1e-06): ")
    assert all(f"{name} = {text}" in line for name, text in row.match.arguments.items())
    assert in_json["match"]["arguments"] == row.match.arguments
    assert in_json["match"]["tensors"] == row.match.tensors


def test_roles_of_the_leaves() -> None:
    (row,) = report_of(torch.optim.AdamW, dict(lr=0.02)).groups
    assert row.match.tensors == {"var": "param", "m": "exp_avg", "v": "exp_avg_sq"}


def test_a_cpu_compile_does_not_pay() -> None:
    """Nothing is decided before the report is read; then once, and its time is shown apart."""
    report = report_of(torch.optim.Adam, dict(lr=0.02))
    assert "match" not in report.seconds and find._decide.cache_info().misses == 0
    assert isinstance(report.groups[0].match, KernelMatch)
    assert find._decide.cache_info().misses == 1
    assert list(report.seconds) == ["capture", "group", "lower", "match"]
    head = str(report).splitlines()[0]
    assert f"lower {report.seconds['lower']:.2f}), then match {report.seconds['match']:.2f}" in head
    before = sum(seconds for name, seconds in report.seconds.items() if name != "match")
    assert f"compiled in {before:.2f} s" in head
    assert report.to_json()["seconds"].keys() == report.seconds.keys()
    assert find._decide.cache_info().misses == 1


def test_the_npu_knows_before_it_lowers(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []

    def lower(leaves: Sequence[Leaf], groups: Sequence[Group], *given: Any) -> platforms.Lowered:
        decided.append(find._decide.cache_info().misses)
        assert {*given[-1]} == {g.name for g in groups}  # the matches
        return platforms.Lowered(None, [rows.group_report(g, leaves, "npu", "", 0, 0) for g in groups])

    monkeypatch.setitem(platforms.LOWERINGS, "npu", lower)
    report = report_of(optimizers.NpuFusedAdam, dict(lr=0.02), platform="npu")
    assert decided == [1] and report.platform == "npu"
    assert report.groups[0].match.kernel == "adamw"
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
    assert f"({stages})" in str(report) and "then match" not in str(report)


def test_a_structure_is_decided_once_in_a_process() -> None:
    """Another learning rate and other shapes are the same structure."""
    for options in (dict(lr=0.02), dict(lr=0.03)):
        torch._dynamo.reset()
        assert report_of(torch.optim.Adam, options).groups[0].match.kernel == "adamw"
    assert find._decide.cache_info().misses == 1
    assert find._decide.cache_info().maxsize  # bounded


@pytest.mark.parametrize("error", [ImportError("no sympy here"), RecursionError("too deep"), ValueError("a bug")])
def test_a_failure_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(find, "Algebra", fail)
    report = report_of(torch.optim.Adam, dict(lr=0.02))
    (row,) = report.groups
    assert row.match is None
    assert row.no_match == f"matching failed: {type(error).__name__}: {error}"
    assert row.no_match in str(report) and report.fallback is None


def test_sympy_is_loaded_when_something_is_matched() -> None:
    """Neither the package nor the stage loads it (torch does, for Dynamo); without it there is a reason."""
    code = """
import sys
import torch, npu_fuse_pass.match.find, npu_fuse_pass.report.report
print("sympy" in sys.modules)
sys.modules["sympy"] = None
from npu_fuse_pass.match.find import match_formula
from npu_fuse_pass.ir.text import parse
text = '''slot 0: f32
slot 1: f32
slot 2: f32
slot 3: scalar
%0: f32 = cast($3, f32)
%1: f32[] = mul($0, %0)
%2: f32[] = add(%1, $1)
%3: f32[] = mul(%0, %2)
%4: f32[] = sub($2, %3)
write $0 = %2
write $2 = %4'''
print(match_formula(parse(text)).reason)
del sys.modules["sympy"]
npu_fuse_pass.match.find._decide.cache_clear()
print(match_formula(parse(text)).kernel.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, reason, kernel = done.stdout.splitlines()
    assert loaded == "False" and kernel == "momentum"
    assert reason.startswith("matching failed: ModuleNotFoundError: import of sympy")


def test_what_writes_temporaries_has_no_kernel() -> None:
    """Groups ahead of original operations (Muon's products) give tensors that those read."""
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    opt = torch.optim.Muon(params, lr=0.02)
    set_gradients(params, gradients(params, 0))
    compiled(opt, fullgraph=False)()
    rows = last_report().groups
    assert {row.writes for row in rows} == {"leaves", "temporaries"}
    assert all(row.match is None and row.no_match for row in rows)


def test_reports_stay_after_the_optimizer() -> None:
    """A report that is read late needs no tensor: nothing of the optimizer is kept alive for it."""
    report = report_of(torch.optim.Adam, dict(lr=0.02))
    torch._dynamo.reset()
    assert report.groups[0].match.kernel == "adamw"
    assert npu_fuse_pass.reports()[-1] is report
