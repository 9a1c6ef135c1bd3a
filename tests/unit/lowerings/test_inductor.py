"""`fuse_pass` as a hook of real Inductor: what it compiles, runs and caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import npu_fuse_pass
from tests.support.training import clones, error, gradients, last_report, parameters, profiled, set_gradients
from tests.unit.ir.test_functional import SHAPES, STOCK, assert_rewritten, steps

pytestmark = pytest.mark.usefixtures("afresh")


HOOKS = ("post_grad_custom_pre_pass", "post_grad_custom_post_pass", "joint_custom_post_pass")
TRIED = [
    ("Adam", True, HOOKS[0]),
    ("SGD momentum", True, HOOKS[0]),
    ("Adam", False, HOOKS[1]),
    ("NAdam", False, HOOKS[2]),
]


class Seen:
    """A second hook, which Inductor calls last: the graphs that it is about to compile."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(graph)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "foreach", "hook"), TRIED, ids=lambda x: str(x))
def test_inductor_compiles_the_rewritten_graph(name: str, foreach: bool, hook: str) -> None:
    """Real Inductor: fused nodes are in the graph that it compiles, and the numbers are eager's."""
    cls, options = STOCK[name]
    params, seen = parameters(SHAPES), Seen()
    others = clones(params)
    hooks: dict[str, Any] = {HOOKS[1]: seen, hook: npu_fuse_pass.fuse_pass}
    if hook == HOOKS[1]:
        hooks = {hook: [npu_fuse_pass.fuse_pass, seen]}
    with torch._inductor.config.patch(force_disable_caches=True, **hooks):
        steps(cls(params, foreach=foreach, **options), params, "inductor", 4)
    steps(cls(others, foreach=foreach, **options), others, None, 4)
    assert seen.graphs and len(seen.graphs) == len(npu_fuse_pass.reports())
    for graph in seen.graphs:
        assert_rewritten(graph, 1)
    for report in npu_fuse_pass.reports():
        assert report.fallback is None and not report.unfused and [g.updates for g in report.groups] == [len(SHAPES)]
        assert [g.kernel for g in report.groups] == ["npu_fused.multi_tensor_kernel"]
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5


@pytest.mark.slow
def test_inductor_with_transposed_gradients() -> None:
    """The fused node's results have the layout that its shape propagation promises."""
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5, 4).t())]
    others = clones(params)
    pairs = [(p, torch.optim.Adam(p)) for p in (params, others)]
    with fresh_cache(), torch._inductor.config.patch(post_grad_custom_pre_pass=npu_fuse_pass.fuse_pass):
        step = torch.compile(pairs[0][1].step, backend="inductor")
        for _ in range(3):
            grads = [torch.randn(3, 4).t(), torch.randn(4, 5)]
            for p, q, g in zip(params, others, grads, strict=True):
                p.grad, q.grad = g, g
            step()
            pairs[1][1].step()
    assert [g.updates for g in last_report().groups] == [2]
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5


@pytest.mark.slow
def test_a_graph_from_inductors_cache_runs_the_kernel() -> None:
    """It is not rewritten again, so it has no report; its operations are there all the same."""
    with (
        fresh_cache(),
        torch._inductor.config.patch(fx_graph_cache=True, post_grad_custom_pre_pass=npu_fuse_pass.fuse_pass),
    ):
        for reports, hits in ((1, 0), (0, 1)):
            torch._dynamo.reset()
            npu_fuse_pass.clear_reports()
            before = counters["inductor"]["fxgraph_cache_hit"]
            params = parameters(SHAPES)
            others = clones(params)
            step = torch.compile(torch.optim.Adam(params).step, backend="inductor")
            steps(torch.optim.Adam(others), others, None, 3)
            for seed in range(3):
                set_gradients(params, gradients(params, seed))
                kernels, _ = profiled(step)
            assert len(kernels) == 1 and kernels[0].startswith("update_"), kernels
            assert len(npu_fuse_pass.reports()) == reports
            assert counters["inductor"]["fxgraph_cache_hit"] - before == hits
            assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5


def test_inductor_can_cache_it() -> None:
    """The pass has Inductor's type and an identity that changes with its sources and options."""
    assert isinstance(npu_fuse_pass.fuse_pass, CustomGraphPass)
    assert npu_fuse_pass.fuse_pass.uuid() == npu_fuse_pass.FusePass().uuid()
    assert npu_fuse_pass.fuse_pass.uuid() != npu_fuse_pass.FusePass(strict=True).uuid()


def test_the_class_in_the_place_of_a_pass_is_refused() -> None:
    with pytest.raises(npu_fuse_pass.OptionError, match=r"FusePass\(strict=.*allowed are True and False"):
        npu_fuse_pass.FusePass(fx.Graph())  # type: ignore[arg-type]  # as Inductor calls what it is given
