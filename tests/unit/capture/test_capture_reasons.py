"""Stage 1, capture: scalars that optimizers share, and the reasons for what is left unfused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx

import npu_fuse_pass
from npu_fuse_pass.capture.graph import capture
from tests.support.graphs import check, traced
from tests.unit.capture.test_capture import f64

pytestmark = pytest.mark.usefixtures("same_numbers")


def test_shared_scalars_that_read_each_other():
    """NAdam's product of momenta: one counter and one product for all parameters."""

    def step(count: Any, product: Any, p: Any, q: Any, g: Any, h: Any) -> None:
        count.add_(1)
        product.mul_(torch.pow(0.9, count))
        p.sub_(g * product * count)
        q.sub_(h * product * count)

    tensors = [torch.randn(n) for n in (5, 7, 5, 7)]
    check(step, f64(3.0), f64(0.7), *tensors, tolerance=2e-7)


def test_shared_scalars_swap_and_old_values_are_returned():
    def step(a: Any, b: Any, p: Any, q: Any) -> Any:
        old = a.clone()
        a.copy_(b)
        b.copy_(old)
        p.mul_(a)
        q.mul_(b)
        return old

    check(step, f64(3.0), f64(0.7), torch.randn(5), torch.randn(7), tolerance=2e-7)


class CountsInPython(torch.optim.Optimizer):
    """An optimizer as users write them: a Python int counts the steps, a float holds the rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            p.sub_(p.grad * (self.param_groups[0]["lr"] / min(state["step"], 3)))


def test_an_int_counter_that_becomes_dynamic():
    """From its second value on, Dynamo passes the counter as a number of its own."""
    torch._dynamo.reset()
    first = torch.randn(5)
    p, q = torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.clone())
    eager, other = CountsInPython([p]), CountsInPython([q])
    step = torch.compile(other.step, backend="npu_fused")
    npu_fuse_pass.clear_reports()
    for t in range(5):
        eager.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.1 * (t + 1)
        p.grad, q.grad = torch.full((5,), t + 1.0), torch.full((5,), t + 1.0)
        eager.step()
        step()
        torch.testing.assert_close(p, q, rtol=2e-7, atol=0)
    assert not any(r.fallback or r.unfused for r in npu_fuse_pass.reports())


# Reasons -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "view": (lambda p, q: p.as_strided((2,), (1,)).add_(1), "add", "view"),
    "a size": (lambda p, q: p.mul_(p.size(0)), "size", "size"),
}


KEPT = {
    "broadcast by copy": (lambda p, q: p.copy_(q), "copy_", r"broadcasts \(4,\) to \(4, 4\)"),
    "broadcast": (lambda p, q: p.add_(q), "add_", r"broadcasts.*\(4,\).*\(4, 4\)"),
    "no row": (lambda p, q: p.copy_(torch.logit(p)), "logit", "no place in a fused kernel"),
    "matrix product": (lambda p, q: p.add_(p @ p), "matmul", "no place in a fused kernel"),
    "unknown form": (lambda p, q: p.copy_(torch.round(p, decimals=2)), "round", "form"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_no_row_stays_an_original_operation(name):
    """The update around it is fused all the same."""
    function, op, reason = KEPT[name]
    captured = capture(traced(function, torch.rand(4, 4), torch.rand(4)))
    (unfused,) = captured.unfused
    assert unfused.op == op and re.search(reason, unfused.text), unfused
    assert [len(segment.calls) for segment in captured.segments] == [1] and len(captured.updates) == 1


def norms_of_each_other(p: Any, q: Any) -> None:
    p.mul_(p.norm() + q.norm())
    q.mul_(p.norm())


def sums_of_each_other(p: Any, q: Any) -> None:
    p.mul_(p.sum((0, 1)) + q.mean())
    q.sub_(p.sum() * 0.01)
    p.add_(q.amax())


def one_element_beside_rows(p: Any, q: Any) -> None:
    """Where the row has one element, too, it is no number."""
    rows = q.reshape(4, 1)
    average = rows.square().mean(dim=0)
    q.sub_((rows / (average.sqrt() + rows.mean(dim=1).unsqueeze(1).abs())).view_as(q))
    p.mul_(0.5).add_(p.sqrt())


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("step", [norms_of_each_other, sums_of_each_other, one_element_beside_rows])
def test_tensors_of_different_shapes_that_meet_cost_no_fallback(step: Any) -> None:
    got, want = ([torch.linspace(0.5, 1, 16).view(4, 4), torch.linspace(-1, 2, 4)] for _ in range(2))
    compiled = torch.compile(step, backend="npu_fused")
    for _ in range(2):
        step(*want)
        compiled(*got)
    torch.testing.assert_close(got, want)
    (report,) = npu_fuse_pass.reports()
    assert report.groups and report.fallback is None
    assert all("numbers of other tensors" in reason.text for reason in report.unfused), report


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_operation_and_the_reason(name):
    function, op, reason = REFUSED[name]
    captured = capture(traced(function, torch.rand(4, 4), torch.rand(4)))
    (unfused,) = captured.unfused
    assert captured.updates == [] and op in unfused.op
    assert unfused.text
    assert re.search(reason, unfused.text), unfused


def test_bool_tensors():
    """Masks that come in and comparisons that go out; in whatever way, never with a crash."""

    def step(mask: Any, p: Any, g: Any) -> Any:
        p.copy_(torch.where(mask, p, g))
        return p > 0

    tensors = [torch.randn(5) > 0, torch.randn(5), torch.randn(5)]
    if not capture(traced(step, *tensors)).unfused:
        check(step, *tensors)


def test_what_torch_recorded_must_agree():
    """A graph whose recorded shapes contradict what is understood is refused, not computed."""
    gm = traced(lambda p, g: p.copy_(p + g), torch.rand(4), torch.rand(4))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["val"] = torch.rand(2, 2)
    (unfused,) = capture(gm).unfused
    assert "understood as" in unfused.text


def test_a_graph_without_recorded_values_is_refused_not_guessed():
    gm = fx.symbolic_trace(lambda p, g: p.copy_(p + g))
    assert capture(gm).unfused
