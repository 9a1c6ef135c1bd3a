"""The tail of a training step as one GE graph: unscaling, clipping, the step, an average of the parameters."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from steps import assert_close, assert_same, set_gradients, twins

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS
from tests.support.cases import BY_NAME

OPTIONS: dict[str, Any] = {"platform": "npu"}


def tail_of(opt: Any, averages: list[torch.Tensor], scale: torch.Tensor | None) -> Any:
    params = opt.param_groups[0]["params"]

    def tail() -> None:
        if scale is not None:
            torch._amp_foreach_non_finite_check_and_unscale_([p.grad for p in params], opt.found_inf, scale)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 0.1)

    return tail


@pytest.mark.parametrize("name", ["adam", "sgd_momentum", "lamb", "rmsprop_tf_centered"])
def test_one_graph(name: str, ge: harness.Recording) -> None:
    run(name, None, dict(OPTIONS, strict=True), fullgraph=True)
    assert [g.runs for g in ge.graphs] == [4]
    [report] = npu_fuse_pass.reports()
    assert report.fallback is None and not report.unfused
    assert {g.lowering for g in report.groups} == {"npu"}


def test_unscaling_runs_as_it_is(ge: harness.Recording) -> None:
    """Step counters advance on the host: they cannot depend on a gradient that is not finite."""
    with pytest.warns(UserWarning, match="0-dim state is computed from a tensor"):
        run("adam", torch.tensor(0.5), OPTIONS, fullgraph=True)
    assert not ge.graphs
    assert "0-dim state is computed from a tensor" in (npu_fuse_pass.reports()[-1].fallback or "")


def test_a_norm_of_clipped_gradients_runs_as_it_is(ge: harness.Recording) -> None:
    with pytest.warns(UserWarning, match="a total depends on another total"):
        run("lamb_global", None, OPTIONS, fullgraph=True)
    assert not ge.graphs


@pytest.mark.parametrize("op", REASONS)
def test_what_no_vector_unit_has_runs_as_it_is(op: str, ge: harness.Recording) -> None:
    """GE operations have none of what generated kernels refuse."""
    params = [torch.nn.Parameter(torch.full((5,), 1.25)) for _ in range(2)]
    function, two = getattr(torch, op), op in ("atan2", "fmod", "hypot")

    def step() -> None:
        with torch.no_grad():
            for p in params:
                p.copy_(function(p, p * 0.4) if two else function(p))

    with pytest.warns(UserWarning, match=f"{op}: has no GE operation"):
        torch.compile(step, backend=npu_fused, options=OPTIONS)()
    assert not ge.graphs


def run(name: str, scale: torch.Tensor | None, options: dict[str, Any], fullgraph: bool) -> None:
    both = twins(BY_NAME[name])
    steps, averages = [], []
    for opt in both:
        averages.append([p.detach().clone() for p in opt.param_groups[0]["params"]])
        if scale is not None:
            opt.found_inf = torch.zeros(())
        steps.append(tail_of(opt, averages[-1], scale))
    compiled = torch.compile(steps[0], backend=npu_fused, fullgraph=fullgraph, options=options)
    for k in range(4):
        for opt in both:
            set_gradients(opt.param_groups[0]["params"], k)
            if scale is not None:
                opt.found_inf.zero_()
                if k == 2:
                    opt.param_groups[0]["params"][1].grad.view(-1)[0] = float("inf")
        compiled()
        steps[1]()
        if scale is not None:
            assert float(both[0].found_inf) == float(both[1].found_inf) == (k == 2)
    assert_same(*both, 2e-6)
    for a, b in zip(*averages, strict=True):
        assert_close(a, b, 2e-6)
