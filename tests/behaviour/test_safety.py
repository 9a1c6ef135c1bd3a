"""What does not fit a fused kernel: computed right all the same, or left to the original graph with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import npu_fuse_pass
import optimizers
from tests.support.papers_norms import Lion
from tests.support.training import assert_fused, compiled, gradients, last_report, parameters, set_gradients

pytestmark = pytest.mark.usefixtures("afresh")


class Own(torch.optim.Optimizer):
    """An optimizer whose step is a function on lists: params, grads, a state each."""

    def __init__(self, params: Any, update: Callable[..., Any]) -> None:
        super().__init__(params, {})
        self.update = update
        for p in self.param_groups[0]["params"]:
            self.state[p]["m"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        self.update(params, [p.grad for p in params], [self.state[p]["m"] for p in params])


SHAPES = [(3, 4), (3, 4), (5,)]


def run_both(make: Callable[[Any], Any], shapes: Any = SHAPES, dtype: Any = torch.float32, **options: Any) -> list[str]:
    """Three steps beside backend="eager" from equal values; returns every reason for something unfused."""
    params, others = parameters(shapes, dtype), parameters(shapes, dtype)
    opt, other = make(params), make(others)
    step, original = compiled(opt, fullgraph=False, **options), torch.compile(other.step, backend="eager")
    for t in range(3):
        for own in (params, others):
            set_gradients(own, gradients(own, t))
        step()
        original()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
            for name, value in opt.state[p].items():
                torch.testing.assert_close(value, other.state[q][name], rtol=2e-5, atol=1e-6)
    reports = npu_fuse_pass.reports()
    assert reports
    reasons = [u.text for r in reports for u in r.unfused] + [r.fallback for r in reports if r.fallback]
    assert all(reasons)
    return [*step.said, *map(str, reasons)]


# Order of reads and writes -------------------------------------------------------------------------------------------


def read_after_write(ps: Any, gs: Any, ms: Any) -> None:
    """A state takes the new parameter, then the old gradient is read through a list made before."""
    for p, g, m in zip(ps, gs, ms, strict=True):
        old = p.clone()
        p.sub_(g, alpha=0.1)
        m.copy_(p - old)
        p.add_(m, alpha=0.5)
        m.mul_(p)


def writes_gradients(ps: Any, gs: Any, ms: Any) -> None:
    for p, g, m in zip(ps, gs, ms, strict=True):
        g.add_(p, alpha=0.1)
        m.lerp_(g, 0.1)
        p.sub_(m)
        g.zero_()


def swaps(ps: Any, gs: Any, ms: Any) -> None:
    for p, m in zip(ps, ms, strict=True):
        old = p.clone()
        p.copy_(m)
        m.copy_(old)


def lists_after_writes(ps: Any, gs: Any, ms: Any) -> None:
    torch._foreach_mul_(ms, 0.9)
    torch._foreach_add_(ms, gs)
    before = torch._foreach_mul(ps, 1.0)
    torch._foreach_sub_(ps, ms)
    torch._foreach_copy_(ms, torch._foreach_sub(ps, before))


def through_aliases(ps: Any, gs: Any, ms: Any) -> None:
    for p, g, m in zip(ps, gs, ms, strict=True):
        p.data.mul_(0.9)
        m.detach().add_(g.data)
        p.detach().sub_(m.data, alpha=0.1)


FUSED = [read_after_write, writes_gradients, swaps, lists_after_writes, through_aliases]


@pytest.mark.parametrize("update", FUSED, ids=lambda f: f.__name__)
def test_order_of_reads_and_writes(update: Any) -> None:
    assert not run_both(lambda ps: Own(ps, update))
    assert [g.updates for g in last_report().groups] == [len(SHAPES)]


# Updates that reach beyond one parameter -----------------------------------------------------------------------------


def reads_a_neighbour(ps: Any, gs: Any, ms: Any) -> None:
    """A parameter moves towards the one before it, which has moved already."""
    for i, p in enumerate(ps):
        p.sub_(gs[i])
        if i and p.shape == ps[i - 1].shape:
            p.lerp_(ps[i - 1], 0.3)


def reads_a_neighbours_norm(ps: Any, gs: Any, ms: Any) -> None:
    for i, p in enumerate(ps):
        p.sub_(gs[i] / (1 + ps[i - 1].norm()))


def sums_over_all(ps: Any, gs: Any, ms: Any) -> None:
    """Clipping by the norm of all gradients, written out."""
    norm = torch.stack([g.norm() for g in gs]).norm()
    scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    for p, g in zip(ps, gs, strict=True):
        p.sub_(g * scale)


def sums_in_python(ps: Any, gs: Any, ms: Any) -> None:
    square = sum((g * g).sum() for g in gs)
    for p, g in zip(ps, gs, strict=True):
        p.sub_(g / (1 + square.sqrt()))


# Views and shapes ----------------------------------------------------------------------------------------------------


def writes_through_views(ps: Any, gs: Any, ms: Any) -> None:
    for p, g, m in zip(ps, gs, ms, strict=True):
        m.view(-1).add_(g.reshape(-1))
        p.view(-1)[1:].sub_(m.view(-1)[1:])
        p[0].mul_(0.5)
        p.select(0, 1).copy_(g.select(0, 1))
        p.unsqueeze(0).add_(1)


def reads_through_views(ps: Any, gs: Any, ms: Any) -> None:
    for p, g, m in zip(ps, gs, ms, strict=True):
        early = p.view(-1)
        p.sub_(g)
        m.view(-1).copy_(early)  # sees the new parameter
        p.add_(m.flatten().view_as(p).flip(0))


def assigns_slices(ps: Any, gs: Any, ms: Any) -> None:
    for p, g in zip(ps, gs, strict=True):
        p[1:] = g[:-1]
        p.flatten()[0] += 1


def normalises_rows(ps: Any, gs: Any, ms: Any) -> None:
    for p, g in zip(ps, gs, strict=True):
        p.sub_(g / (g.norm(dim=-1, keepdim=True) + 1e-6))


def multiplies_matrices(ps: Any, gs: Any, ms: Any) -> None:
    for p, g, m in zip(ps, gs, ms, strict=True):
        m.mul_(0.9).add_(g)
        flat = m.view(m.shape[0], -1)
        p.sub_((flat @ (flat.t() @ flat)).view_as(p), alpha=0.01)


def sorts(ps: Any, gs: Any, ms: Any) -> None:
    for p, g in zip(ps, gs, strict=True):
        limit = g.abs().flatten().kthvalue(2).values
        p.sub_(torch.where(g.abs() > limit, g, 0.0))


def counts_by_masks(ps: Any, gs: Any, ms: Any) -> None:
    for p, g in zip(ps, gs, strict=True):
        p[g > 0] = 0.0
        p.masked_fill_(g < -1, 2.0)


BEYOND = [reads_a_neighbour, reads_a_neighbours_norm, sums_over_all, sums_in_python, writes_through_views]
BEYOND += [reads_through_views, assigns_slices, normalises_rows, multiplies_matrices, sorts, counts_by_masks]


@pytest.mark.filterwarnings("ignore:npu_fused")
@pytest.mark.parametrize("update", BEYOND, ids=lambda f: f.__name__)
def test_right_or_left_with_a_reason(update: Any) -> None:
    """Whatever is not fused says why; whatever is fused is right (both are compared with the original graph)."""
    reasons = run_both(lambda ps: Own(ps, update))
    fused = sum(g.updates for g in last_report().groups)
    assert reasons or fused >= 1
    print(update.__name__, "fused" if not reasons else reasons[-1])


@pytest.mark.parametrize("update", [writes_through_views, assigns_slices, sorts], ids=lambda f: f.__name__)
def test_strict_raises_before_anything_is_written(update: Any) -> None:
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    before = copy.deepcopy(params)
    step = compiled(Own(params, update), fullgraph=False, strict=True)
    with pytest.raises(Exception, match="not everything was fused"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_strict_lists_all_of_it() -> None:
    """Two operations without a place in a kernel, of two parameters: both are in the message, each with its reason."""

    def update(ps: Any, gs: Any, ms: Any) -> None:
        ps[0].sub_(torch.logit(gs[0].sigmoid()))
        ps[1].sub_(torch.cumsum(gs[1], 0))
        ps[2].sub_(gs[2])

    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    with pytest.raises(Exception, match=r"(?s)logit: .*cumsum: "):
        compiled(Own(params, update), fullgraph=False, strict=True)()
    npu_fuse_pass.clear_reports()
    assert run_both(lambda ps: Own(ps, update))
    assert {u.op for r in npu_fuse_pass.reports() for u in r.unfused} >= {"logit", "cumsum"}


def test_strict_lets_through_what_is_fused() -> None:
    assert not run_both(lambda ps: Lion(ps), strict=True)
    assert not run_both(lambda ps: optimizers.NpuFusedAdam(ps), strict=True)


def test_complex_parameters_are_left_alone() -> None:
    """torch's step looks at them as pairs of real numbers: views, so the original graph runs."""
    params, others = ([Parameter(torch.full((3,), 1 + 2j))] for _ in range(2))
    opt, other = (torch.optim.Adam(p, lr=0.1) for p in (params, others))
    step, original = compiled(opt, fullgraph=False), torch.compile(other.step, backend="eager")
    for t in range(2):
        for p in (*params, *others):
            p.grad = torch.full((3,), t - 1j)
        step()
        original()
        torch.testing.assert_close(params[0], others[0])


def test_a_step_that_updates_complex_parameters_alone_is_told() -> None:
    """It has no operation on real numbers, and it is an update."""
    param = Parameter(torch.full((3,), 1 + 2j))
    opt = torch.optim.SGD([param], lr=0.1)
    step = npu_fuse_pass.compile_step(opt)
    param.grad = torch.full((3,), 1 - 1j)
    with pytest.warns(UserWarning, match=r"torch\.complex64 takes part in the update"):
        step()
    step()
    step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.7 + 2.3j))
    assert [r.code.name for r in last_report().reasons] == ["DTYPE"]
    with pytest.raises(npu_fuse_pass.UnfusedError, match="complex64"):
        npu_fuse_pass.explain(opt, strict=True)


def test_fused_is_really_asserted_here() -> None:
    """The check above notices a graph that was not fused."""
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    compiled(Own(params, sorts), fullgraph=False)()
    with pytest.raises(AssertionError):
        assert_fused(last_report(), parameters=len(SHAPES))
