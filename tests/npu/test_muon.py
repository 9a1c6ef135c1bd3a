"""Muon: matrix products between fused updates, all of it one GE graph."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import harness
import kernels
import pytest
import torch
from steps import assert_close, set_gradients

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.emit import elementwise
from scripts import conversion_cases
from tests.support.tolerances import MUON_NPU

_muon: Any = pytest.importorskip("torch.optim._muon")  # since torch 2.9

# torchair's own converters emit these for what stays between fused updates of Muon.
BETWEEN = {"AxpyV2", "MatMul", "MatMulV2", "Transpose"}
LR = 0.02


@pytest.fixture(params=MUON_NPU)  # with one word of its source changed Muon iterates in float32
def muon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An optimizer, its eager twin, and how far the parameters may be apart after one step."""
    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert source.count(".bfloat16()") == 1
    made = types.ModuleType("muon_in_another_dtype")
    exec(source.replace(".bfloat16()", f".{request.param}()"), vars(_muon), vars(made))
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", made._zeropower_via_newtonschulz)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in ((4, 5), (6, 3), (5, 4))]
    both = [[torch.nn.Parameter(t.clone()) for t in start] for _ in range(2)]
    yield *map(conversion_cases.MUON.make, both), LR * MUON_NPU[request.param]
    torch._dynamo.reset()


def muon_steps(muon: Any, steps: int = 5) -> None:
    """Compiled and eager, compared after every step."""
    ours, theirs, apart = muon
    both = [optimizer.param_groups[0]["params"] for optimizer in (ours, theirs)]
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu"})
    for k in range(steps):
        for each in both:
            set_gradients(each, k)
        step()
        theirs.step()
        for p, q in zip(*both, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=(k + 1) * apart)
            assert_close(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"], 1e-6)


def test_muon_is_one_graph_with_its_matrix_products(muon: Any, ge: harness.Recording) -> None:
    muon_steps(muon)
    assert sum(g.runs for g in ge) == 5
    for report in npu_fuse_pass.reports():
        assert report.fallback is None and {g.lowering for g in report.groups} == {"npu"}
        assert {u.op for u in report.unfused} == {"T", "matmul", "addmm"}
        assert sum(g.updates for g in report.groups if g.writes == "leaves") == 2 * 3
    for graph in ge:
        assert graph.counts()["MatMul"] == 5 * 3
        assert set(graph.counts()) <= {*elementwise.DOCUMENTS, *BETWEEN}


@pytest.mark.parametrize("muon", ["float"], indirect=True)
def test_an_error_in_muons_products_is_noticed(
    muon: Any, ge: harness.Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = kernels.KERNELS["MatMulV2"]
    monkeypatch.setitem(kernels.KERNELS, "MatMulV2", lambda node: [1.05 * true(node)[0]])
    with pytest.raises(AssertionError, match="not close"):
        muon_steps(muon)


@pytest.mark.parametrize("muon", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("leaf", ["load", "compile", "run", "write"])
def test_muons_original_runs_where_ge_refuses(leaf: str, muon: Any, ge: harness.Recording) -> None:
    ge.failing[leaf] = RuntimeError("EZ9999: no")
    with pytest.warns(UserWarning, match="EZ9999: no"):
        muon_steps(muon, 3)
    assert all("EZ9999: no" in str(report.fallback) for report in npu_fuse_pass.reports())


@pytest.mark.parametrize("muon", ["bfloat16"], indirect=True)
def test_muons_other_tensors_run_the_original(muon: Any, ge: harness.Recording) -> None:
    """The graph takes contiguous tensors that share no memory; other ones are updated all the same."""
    for optimizer in muon[:2]:
        first = optimizer.param_groups[0]["params"][0]
        first.data = first.data.t().contiguous().t()
    with pytest.warns(UserWarning, match="not contiguous"):
        muon_steps(muon, 3)
    assert not any(g.runs for g in ge)


def test_what_is_written_through_a_view_is_part_of_the_graph(ge: harness.Recording) -> None:
    """Beside enough that is fused: a row of a product, and a view that is read again."""

    def step(p: Any, q: Any, m: Any, g: Any) -> None:
        product = p @ p
        product[1:].mul_(0.5)
        rows = product[:2]
        product.add_(p)
        p.sub_(product, alpha=LR)
        p[2:].add_(rows, alpha=LR)
        m.mul_(0.9).addcmul_(g, g, value=0.1)
        q.addcdiv_(g, m.sqrt().add_(1e-8), value=-LR)

    generator = torch.Generator().manual_seed(0)
    start = [torch.rand(s, generator=generator) for s in ((4, 4), (700,), (700,), (700,))]
    got, want = [t.clone() for t in start], [t.clone() for t in start]
    compiled = torch.compile(step, backend=npu_fused, options={"platform": "npu"})
    for _ in range(3):
        step(*want)
        compiled(*got)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-6)
    (report,) = npu_fuse_pass.reports()
    assert report.fallback is None and report.groups and sum(g.runs for g in ge) == 3
