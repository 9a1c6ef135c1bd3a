"""Optimizers that this project has never heard of: fused without registration of any kind, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from tests.support.papers_norms import INLINE, WITH_LISTS
from tests.support.tolerances import PAPER
from tests.support.training import clones, compiled, gradients, parameters, profiled, set_gradients, stated_calls

F32, F64 = torch.float32, torch.float64
SHAPES: dict[torch.dtype, list[tuple[int, ...]]] = {F32: [(3, 4), (5,), (20, 30)], F64: [(7,), (2, 3, 2)]}
RATES = (0.01, 0.02, 0.015, 0.005, 0.03, 0.0)

pytestmark = pytest.mark.usefixtures("afresh")


def relative(got: Tensor, want: Tensor, before: Tensor) -> float:
    """The error relative to the larger of the new and the old value; ATen's float32 norms are 1e-7 off themselves."""
    got, want, before = (t.detach().double() for t in (got, want, before))
    return float(((got - want).abs() / (1e-2 + torch.maximum(want.abs(), before.abs()))).max())


def values_of(opt: Any, params: Any) -> list[Any]:
    """Parameters, states and what the optimizer keeps in its group (Dynamo adds "capturable" to it)."""
    kept = [v for k, v in opt.param_groups[0].items() if k not in ("params", "capturable")]
    return [*params, *(v for p in params for v in opt.state[p].values()), *kept]


def assert_same(got: Any, want: Any, before: Any) -> None:
    """Numbers stay numbers of their type; tensors are equal within their dtype's limit."""
    assert type(got) is type(want), (got, want)
    if not isinstance(got, Tensor):
        assert got == pytest.approx(want, rel=1e-14)
        return
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative(got, want, before) <= PAPER[got.dtype], (got, want)


def train_both(cls: Any, foreach: bool) -> tuple[Any, Any]:
    """Six steps of an eager and a compiled optimizer from the same values, each with another rate, compared at each."""
    params = [p for dtype, shapes in SHAPES.items() for p in parameters(shapes, dtype)]
    others = clones(params)
    opt, eager = cls(params, foreach=foreach), cls(others, foreach=foreach)
    step = compiled(opt, fullgraph=False)
    for seed, rate in enumerate(RATES):
        before = [p.detach().clone() for p in params]
        grads = gradients(params, seed)
        for o, own in ((opt, params), (eager, others)):
            o.param_groups[0]["lr"] = rate
            set_gradients(own, grads)
        step()
        eager.step()
        pairs = list(zip(values_of(opt, params), values_of(eager, others), strict=True))
        for i, (a, b) in enumerate(pairs):
            assert_same(a, b, before[i] if i < len(before) else b)
        with torch.no_grad():  # the next step starts from the same values
            for a, b in pairs:
                if isinstance(a, Tensor):
                    b.copy_(a)
    assert not step.said, step.said
    set_gradients(params, gradients(params, 9))
    return step, params


def check_reports() -> None:
    """Every compile fused everything: one group for each dtype, of all its parameters; the rest are 0-dim counters."""
    assert npu_fuse_pass.reports()
    for report in npu_fuse_pass.reports():
        assert report.fallback is None, report
        assert not report.unfused, report
        groups = [g for g in report.groups if g.bytes_per_element]
        assert [(g.dtype, g.updates) for g in groups] == [("f32", len(SHAPES[F32])), ("f64", len(SHAPES[F64]))], report


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("cls", WITH_LISTS, ids=lambda c: c.__name__)
def test_papers(cls: Any, foreach: bool) -> None:
    step, _ = train_both(cls, foreach)
    check_reports()
    kernels, _ = profiled(step)
    assert sorted(kernels) == stated_calls(npu_fuse_pass.reports()[-1])


@pytest.mark.parametrize("cls", INLINE, ids=lambda c: c.__name__)
def test_states_created_in_the_step(cls: Any) -> None:
    """Their first step makes and returns states; later graphs read them. Counters may be Python numbers."""
    step, _ = train_both(cls, False)
    check_reports()
    kernels, _ = profiled(step)
    assert sorted(kernels) == stated_calls(npu_fuse_pass.reports()[-1])


def test_loop_and_foreach_are_one_formula() -> None:
    """Where both forms do the same operations in the same order (Signum's do), groups and bits are the same."""
    found = []
    for foreach in (False, True):
        torch._dynamo.reset()
        (cls,) = (c for c in WITH_LISTS if c.__name__ == "Signum")
        _, params = train_both(cls, foreach)
        found.append(({g.name for g in npu_fuse_pass.reports()[-1].groups}, params))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, q) for p, q in zip(found[0][1], found[1][1], strict=True))


def test_at_least_eight() -> None:
    """None of them is torch's, and none is known to the package by name."""
    names = {cls.__name__ for cls in (*WITH_LISTS, *INLINE)}
    assert len(names) >= 12
    assert not names & set(dir(torch.optim))
