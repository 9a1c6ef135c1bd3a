"""A new optimizer is one file and one row: what is derived from the table of optimizers picks another row up."""

from __future__ import annotations

import pathlib
import re

import pytest

import optimizers
from npu_fuse_pass.tools.selftest import cases as selftest
from npu_fuse_pass.tools.selftest import parity
from scripts import conversion_cases, support_table
from tests.support.cases import Case
from tests.support.planted import copy_of_the_project, run_tests
from tests.support.training import FULL, parameters

ROW = optimizers.Row("adan", conversion_cases.adan, dict(lr=0.02))
FILE = '''"""Adan: Xie et al., arXiv 2208.06677, without its restarts."""

from __future__ import annotations

import torch

from npu_fuse_pass.rules import rule, zeros


@rule(
    states=dict(m=zeros, v=zeros, n=zeros, previous=zeros),
    defaults=dict(lr=1e-3, beta1=0.98, beta2=0.92, beta3=0.99, eps=1e-8),
)
def adan(param, grad, m, v, n, previous, *, step, lr, beta1, beta2, beta3, eps):
    """Adan."""
    change = torch.where(step == 1, 0.0, grad - previous)
    ahead = grad + beta2 * change
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * change
    n = beta3 * n + (1 - beta3) * ahead * ahead
    root = (n / (1 - beta3**step)).sqrt() + eps
    return param - lr * (m / (1 - beta1**step) + beta2 * v / (1 - beta2**step)) / root, m, v, n, grad
'''
ORACLE = """

def adan(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, **o: Any) -> Tensor:
    zero = torch.zeros_like(p)
    d = g - s.get("previous", g)
    s["m"], s["v"] = 0.98 * s.get("m", zero) + 0.02 * g, 0.92 * s.get("v", zero) + 0.08 * d
    s["n"], s["previous"] = 0.99 * s.get("n", zero) + 0.01 * (g + 0.92 * d) ** 2, g
    slope = s["m"] / (1 - 0.98**t) + 0.92 * s["v"] / (1 - 0.92**t)
    return p - o["lr"] * slope / ((s["n"] / (1 - 0.99**t)).sqrt() + 1e-8)
"""


@pytest.fixture(autouse=True)
def another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "ROWS", (*optimizers.ROWS, ROW))


def test_the_self_test_compares_it() -> None:
    found = {case.name: case for quick in (True, False) for case in selftest.cases(quick)}
    assert {"adan", "adan, float16 parameters", "adan, bfloat16 parameters"} <= found.keys()
    assert found["adan"].quick
    assert parity.compare(found["adan"], "cpu", "cpu").verdict == "ok"


def test_the_support_table_has_it() -> None:
    (make,) = [make for label, make in support_table.rows() if label == "`optimizers.adan`"]
    assert support_table.row("adan", make)[-1] == "fused"


def test_an_optimizer_without_an_independent_formula_is_refused() -> None:
    with pytest.raises(AssertionError, match=re.escape("adan(p, g, s, t, **options) in tests/support/oracles.py")):
        Case(**vars(ROW)).oracle(parameters())


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="the slow tier")
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_its_tests_run(wrong: bool, tmp_path: pathlib.Path) -> None:
    """What docs/optimizers.md says, done in a copy of the project; a rule that is not its formula is noticed."""
    copy = copy_of_the_project(tmp_path)
    (copy / "optimizers" / "adan.py").write_text(FILE.replace("beta2 * v", "beta1 * v") if wrong else FILE)
    table, oracles = copy / "optimizers" / "__init__.py", copy / "tests" / "support" / "oracles.py"
    text = table.read_text().replace("from .lamb import", "from .adan import adan as adan\nfrom .lamb import", 1)
    table.write_text(text.replace("ROWS: tuple[Row, ...] = (", 'ROWS = (\n    Row("adan", adan, dict(lr=0.02)),', 1))
    oracles.write_text(oracles.read_text() + ORACLE)
    names = ("semantics_values", "numerics", "resume", "master_weights", "backend")
    files = [f"tests/behaviour/test_{name}.py" for name in names]
    code, output = run_tests(copy, ["-k", "adan", *files], {"OMP_WAIT_POLICY": "PASSIVE"})
    assert code == int(wrong), output[-3000:]
    if wrong:
        assert "test_against_the_formula[eager-adan]" in output
    else:
        assert int(re.findall(r"(\d+) passed", output)[-1]) >= 20, output[-300:]
