"""What a graph returns: values, and which of them are views of what else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.reasons import Code
from optimizers import NpuFusedSGD
from tests.support.graphs import traced
from tests.support.training import last_report

Function = Callable[[Tensor, Tensor], Any]


def part_of_what_is_written(p: Tensor, g: Tensor) -> Any:
    t = p * 2
    u = t[:1]
    t.add_(1)
    return u


def view_of_what_is_written(p: Tensor, g: Tensor) -> Any:
    t = p * 2
    u = t.view(2, 1)
    t.add_(1)
    return u


def written_in_part(p: Tensor, g: Tensor) -> Any:
    t = p * 2
    t[:1].add_(1)
    return t


def both(p: Tensor, g: Tensor) -> Any:
    t = p * 2
    return t, t.view(-1, 1)


def two_parts(p: Tensor, g: Tensor) -> Any:
    t = torch.stack([p, g])
    return t[0], t[1:]


def view_of_an_argument(p: Tensor, g: Tensor) -> Any:
    return g.view(-1, 1)


def expanded(p: Tensor, g: Tensor) -> Any:
    return g.mean().expand(3)


def detached(p: Tensor, g: Tensor) -> Any:
    return p.detach()


def detached_and_written(p: Tensor, g: Tensor) -> Any:
    return p.detach().mul_(2)


def the_same_tensor(p: Tensor, g: Tensor) -> Any:
    t = p * 2
    return t, t.add_(1), p, p.float()


def only_a_part(p: Tensor, g: Tensor) -> Any:
    return (p * 2)[0]


def elements(p: Tensor, g: Tensor) -> Any:
    return torch.stack([p.norm(), g.norm()]).clamp_(max=3.0).unbind()


def one_element_twice(p: Tensor, g: Tensor) -> Any:
    t = p * 2
    return t[0], t[1:], t[:1]


VIEWS: list[Function] = [
    *(part_of_what_is_written, view_of_what_is_written, written_in_part, both, two_parts),
    *(view_of_an_argument, expanded, one_element_twice),
]
FUSED: list[Function] = [detached, detached_and_written, the_same_tensor, only_a_part, elements]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("function", [*VIEWS, *FUSED])
def test_what_is_returned_shares_memory_with_what_it_does_eagerly(function: Function) -> None:
    def step(p: Tensor, g: Tensor) -> Any:
        with torch.no_grad():
            p.add_(g, alpha=-0.5)
            found = function(p, g)
        return found if isinstance(found, tuple) else (found,)

    p, q = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    g, h = (torch.tensor([1.0, 3.0]) for _ in range(2))
    compiled = torch.compile(step, backend="npu_fused")
    for _ in range(2):
        got, want = compiled(p, g), step(q, h)
        assert [x is p for x in got] == [x is q for x in want]
        assert [x.requires_grad for x in got] == [x.requires_grad for x in want]
        assert [x.stride() for x in got] == [x.stride() for x in want]
        for x, y in zip((*got, p, g), (*want, q, h), strict=True):  # whatever shares memory with it changes, too
            if 0 not in x.stride():
                x.data.mul_(3)
                y.data.mul_(3)
            for a, b in zip((*got, p, g), (*want, q, h), strict=True):
                assert torch.equal(a, b)
    if function in FUSED:
        assert last_report().fallback is None and last_report().groups


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    "view", [lambda p: p.detach()[:1], lambda p: p.detach().view(1, 2), Tensor.detach, lambda p: p]
)
def test_a_view_of_a_parameter_that_the_graph_holds(view: Callable[[Tensor], Tensor]) -> None:
    """The graph ahead of a step has the optimizer's parameters as attributes."""
    found = []
    for compiled in (True, False):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        p.grad = torch.ones(2)
        opt = NpuFusedSGD([p], lr=0.1)

        def step(x: float, p: Any = p, opt: Any = opt) -> Tensor:
            with torch.no_grad():
                p.mul_(0.5)
                opt.param_groups[0]["lr"] = x
                part = view(p)
            opt.step()
            return part

        found.append((torch.compile(step, backend="npu_fused") if compiled else step)(0.2))
    assert torch.equal(*found) and found[0].max() < 1
    assert last_report().groups


@pytest.mark.parametrize("function", [both, two_parts, view_of_an_argument, expanded])
def test_a_view_that_is_returned_has_a_reason(function: Function) -> None:
    def update(p: Tensor, g: Tensor) -> Any:
        p.add_(g)
        return function(p, g)

    assert Code.VIEW_RETURNED in {r.code for r in capture(traced(update, torch.ones(2), torch.ones(2))).unfused}


class Noting(torch.optim.Optimizer):
    """Keeps what is neither a number nor a tensor of its own."""

    def __init__(self, params: Any, reads: bool) -> None:
        super().__init__(params, {"lr": 0.1, "warm": True, "reads": reads})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(n=0, buf=torch.zeros_like(p), shown=p.detach())
                s["n"] += 1
                if s["n"] == 2:
                    s["flat"] = s["buf"].view(-1)
                s["flat" if s["n"] > 2 else "buf"].add_(1.0)
                s["late"], s["odd"], group["warm"] = s["n"] > 2, bool(s["n"] % 2), s["n"] < 2
                s["any"] = bool((p.grad > 0).any()) if group["reads"] else None
                p.sub_(s["buf"] * group["lr"])


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("compiling", [npu_fuse_pass.compile_step, None])
def test_states_that_are_views_and_truth_values(compiling: Any) -> None:
    def trained(how: Any) -> Any:
        p = torch.nn.Parameter(torch.zeros(2, 2))
        opt = Noting([p], compiling is not None)
        step = how(opt) if how is not None else opt.step
        for _ in range(5):
            p.grad = torch.ones(2, 2)
            step()
        assert opt.state[p]["shown"] is not p and not opt.state[p]["shown"].requires_grad
        kinds = {k: type(v) for k, v in opt.state[p].items()}
        return (
            p,
            opt.param_groups[0]["warm"],
            kinds,
            {k: torch.as_tensor(v) for k, v in opt.state[p].items() if v is not None},
        )

    p, warm, kinds, states = trained(compiling or (lambda opt: torch.compile(opt.step, backend="npu_fused")))
    q, warm_, kinds_, states_ = trained(None)
    assert (warm, kinds) == (warm_, kinds_)
    torch.testing.assert_close([p, *states.values()], [q, *states_.values()])
    assert any(r.groups or r.fallback for r in npu_fuse_pass.reports())


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("of", ["max", "min"])
@pytest.mark.parametrize("dimension", [0, -1])
def test_an_extremum_of_a_dimension(of: str, dimension: int) -> None:
    """By position, where `max` also takes a second tensor."""

    def step(p: Tensor, g: Tensor) -> None:
        p.sub_(g)
        p.mul_(getattr(g.abs(), of)(dimension)[0].sum())

    p, g = torch.ones(2, 3), torch.arange(6.0).view(2, 3) + 1
    q = p.clone()
    torch.compile(step, backend="npu_fused")(p, g)
    step(q, g)
    torch.testing.assert_close(p, q)
    assert last_report().groups or last_report().fallback


def counted_from_before(p: Tensor, count: Tensor, last: Tensor) -> Any:
    before = count.clone()
    last.copy_(count)
    count.add_(1)
    p.add_(1)
    return before


def exchanged(p: Tensor, count: Tensor, last: Tensor) -> Any:
    before = count.clone()
    count.copy_(last)
    last.copy_(before)
    p.add_(1)


def of_a_part(p: Tensor, count: Tensor, last: Tensor) -> Any:
    order = p.argsort()
    before = order[0].clone()
    order.add_(1)
    last.copy_(before)
    p.add_(1)
    return before, order


def twice(p: Tensor, count: Tensor, last: Tensor) -> Any:
    place = p.argmax()
    p.add_(1)
    return place, place.clone(), count.clone(), count.clone()


@pytest.mark.parametrize("function", [counted_from_before, exchanged, of_a_part, twice])
def test_a_copy_of_an_integer_is_what_it_was_when_it_was_made(function: Callable[..., Any]) -> None:
    """Such numbers are copied beside the kernels, before these write them."""
    found = []
    for step in (function, torch.compile(function, backend="npu_fused")):
        arguments = [torch.tensor([1.0, 3.0, 2.0]), torch.tensor(2**40), torch.tensor(2**62 + 1)]
        made = step(*arguments) or ()
        tensors = [*arguments, *(made if isinstance(made, tuple) else (made,))]
        memory = [t.untyped_storage().data_ptr() for t in tensors]
        found.append(([t.tolist() for t in tensors], [memory.index(m) for m in memory]))
    assert found[0] == found[1]
    assert last_report().groups and not last_report().fallback
