"""Memory that is shared: tied and overlapping parameters, gradients and states. Right, or left to the original.

Every case runs on twins whose memory is shared in the same way, and is compared with backend="eager": Dynamo's graph as
it is. (Dynamo itself changes what some steps compute on shared memory: its `lerp` is not the eager one.)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import npu_fuse_pass
import optimizers
from npu_fuse_pass.reasons import Code
from tests.support.papers_norms import Lamb, Lion
from tests.support.training import compiled, error

LARGE = 150_000  # several threads and chunks

pytestmark = pytest.mark.usefixtures("afresh")


MAKERS: dict[str, Callable[[Any], Any]] = {
    "AdamW loop": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5, foreach=False),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5, foreach=True),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True, foreach=True),
    "Lion loop": lambda ps: Lion(ps, lr=0.1, wd=0.5),
    "Lion foreach": lambda ps: Lion(ps, lr=0.1, wd=0.5, foreach=True),
    "Lamb foreach": lambda ps: Lamb(ps, lr=0.1, wd=0.5, foreach=True),
    "rule": lambda ps: optimizers.NpuFusedAdamW(ps, lr=0.1, weight_decay=0.5),
}
over_makers = pytest.mark.parametrize("maker", MAKERS)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_both(maker: str, make: Callable[[], list[Tensor]], give: Callable[[list[Tensor], int], None]) -> list[str]:
    """Four steps of twins, compared at each; returns the reasons for which something ran unfused.

    Args:
        make: the parameters. give: sets the gradients of a step.
    """
    ours, theirs = make(), make()
    opt, other = MAKERS[maker](ours), MAKERS[maker](theirs)
    step, original = compiled(opt, fullgraph=False), torch.compile(other.step, backend="eager")
    for t in range(4):
        give(ours, t)
        give(theirs, t)
        step()
        original()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert error(p, q) <= 3e-4, f"step {t}, parameter {i}\n{p.flatten()[:8]}\n{q.flatten()[:8]}"
    reports = npu_fuse_pass.reports()
    unfused = [u.text for r in reports for u in r.unfused]
    return [*step.said, *unfused, *(str(r.fallback) for r in reports if r.fallback)]


def random_gradients(params: list[Tensor], t: int) -> None:
    for i, p in enumerate(params):
        p.grad = numbers(*p.shape, seed=100 * t + i)


# Parameters ----------------------------------------------------------------------------------------------------------


def disjoint() -> list[Tensor]:
    flat = numbers(30)
    return [Parameter(flat[:12].view(3, 4)), Parameter(flat[12:24].view(4, 3)), Parameter(flat[24:])]


TIED: dict[str, Callable[[], list[Tensor]]] = {
    "same storage": lambda: [Parameter(x) for x in [numbers(6)] for _ in range(2)],
    "another shape": lambda: [Parameter(y) for x in [numbers(3, 4)] for y in (x, x.view(12))],
    "transposed": lambda: [Parameter(y) for x in [numbers(3, 4)] for y in (x, x.t())],
    "overlapping": lambda: [Parameter(y) for x in [numbers(15)] for y in (x[:10], x[5:])],
    "overlapping by one": lambda: [Parameter(y) for x in [numbers(15)] for y in (x[:8], x[7:])],
    "large": lambda: [Parameter(y) for x in [numbers(2 * LARGE)] for y in (x[:LARGE], x[1000 : 1000 + LARGE])],
    "0-dim, same storage": lambda: [Parameter(x.view(())) for x in [numbers(1)] for _ in range(2)],
    "0-dim, in another": lambda: [Parameter(y) for x in [numbers(6)] for y in (x, x[2])],
    "among others": lambda: [*disjoint(), *(Parameter(y) for x in [numbers(15)] for y in (x[:10], x[5:]))],
}


@over_makers
@pytest.mark.parametrize("tied", TIED)
def test_tied_parameters(tied: str, maker: str) -> None:
    """Which comes first matters; a kernel for all does not know, so the original (or nothing) has to run."""
    run_both(maker, TIED[tied], random_gradients)


@over_makers
def test_parts_of_one_buffer_are_fused(maker: str) -> None:
    """Neighbours in one storage do not overlap: no reason to leave them unfused. Nor do interleaved ones."""
    assert not run_both(maker, disjoint, random_gradients)


@over_makers
def test_interleaved_parameters(maker: str) -> None:
    """Columns of one matrix share a range of addresses but no element: right, fused or not."""
    run_both(maker, lambda: [Parameter(y) for x in [numbers(4, 6)] for y in (x[:, ::2], x[:, 1::2])], random_gradients)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
@pytest.mark.parametrize("maker", [m for m in MAKERS if m != "rule"])
def test_the_same_parameter_twice(maker: str) -> None:
    def make() -> list[Tensor]:
        p, q = (Parameter(numbers(3, 4, seed=i)) for i in range(2))
        return [p, q, p]

    run_both(maker, make, random_gradients)


# Gradients -----------------------------------------------------------------------------------------------------------


def three() -> list[Tensor]:
    return [Parameter(numbers(3, 4, seed=i)) for i in range(3)]


def own_values(params: list[Tensor], t: int) -> None:
    for p in params:
        p.grad = p.detach()


def of_a_neighbour(params: list[Tensor], t: int) -> None:
    for p, other in zip(params, [*params[1:], params[0]], strict=True):
        p.grad = other.detach()


def flipped(params: list[Tensor], t: int) -> None:
    for p in params:
        p.grad = p.detach().view(-1).as_strided((4, 3), (1, 4)).t()  # contiguous; the same memory


def one_tensor(params: list[Tensor], t: int) -> None:
    grad = numbers(3, 4, seed=t)
    for p in params:
        p.grad = grad


def one_storage(params: list[Tensor], t: int) -> None:
    grad = numbers(20, seed=t)
    for i, p in enumerate(params):
        p.grad = grad[i : i + 12].view(3, 4)


def expanded(params: list[Tensor], t: int) -> None:
    for i, p in enumerate(params):
        p.grad = numbers(4, seed=10 * t + i).expand(3, 4)


def by_turns(params: list[Tensor], t: int) -> None:
    """Alright when it is compiled, shared afterwards."""
    (own_values if t % 2 else random_gradients)(params, t)


WRITTEN = [own_values, of_a_neighbour, flipped, by_turns]
READ_ONLY = [one_tensor, one_storage, expanded]


@over_makers
@pytest.mark.parametrize("give", [*WRITTEN, *READ_ONLY], ids=lambda f: f.__name__)
def test_gradients_that_share_memory(give: Any, maker: str) -> None:
    """With parameters: decay changes the gradient, too. With each other: reading is harmless."""
    reasons = run_both(maker, three, give)
    assert give in WRITTEN or not reasons, reasons


BEFORE: dict[str, Callable[[list[Tensor]], Any]] = {
    "parameters change": lambda ps: torch._foreach_add_([p.data for p in ps], 1.0),
    "gradients change": lambda ps: torch._foreach_mul_([p.grad for p in ps], 2.0),
    "gradients are clipped": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5),
}


@over_makers
@pytest.mark.parametrize("before", BEFORE)
def test_0dim_gradients_that_are_their_parameters_memory(before: str, maker: str) -> None:
    """What a function writes before the step is in the other one as well, though kernels take both for numbers."""

    def made() -> tuple[list[Tensor], Callable[[], None]]:
        ps: list[Tensor] = [Parameter(numbers(seed=1)), Parameter(numbers(3, seed=2))]
        random_gradients(ps, 0)
        ps[0].grad = ps[0].detach()
        opt = MAKERS[maker](ps)

        def function() -> None:
            with torch.no_grad():
                BEFORE[before](ps)
            opt.step()

        return ps, function

    (ours, step), (theirs, original) = made(), made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(step, backend="npu_fused")()
    torch._dynamo.reset()
    torch.compile(original, backend="eager")()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p.grad, q.grad)
    assert any(Code.SHARED_MEMORY in {x.code for x in r.reasons} for r in npu_fuse_pass.reports())


def test_a_learning_rate_that_lies_in_a_parameter() -> None:
    """It changes with the parameter, or before it: what comes first matters."""
    ps = [Parameter(torch.full((4,), 0.5)), Parameter(torch.full((3,), 0.25))]
    for p in ps:
        p.grad = torch.ones_like(p)
    opt = torch.optim.SGD(ps, lr=ps[0].detach()[1], foreach=False)
    torch.compile(opt.step, backend="npu_fused")()
    torch.testing.assert_close(ps[0].detach(), torch.zeros(4))
    torch.testing.assert_close(ps[1].detach(), torch.full((3,), 0.25))  # with the lr of after the first parameter's


# States --------------------------------------------------------------------------------------------------------------


class KeepsAStart(torch.optim.Optimizer):
    """Looks at a state that is the parameter's own memory: a `clone()` was forgotten, or not."""

    def __init__(self, params: Any, forgotten: bool) -> None:
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p]["start"] = p.detach() if forgotten else p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)
            p.add_(self.state[p]["start"]).sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("forgotten", [False, True])
def test_states_that_share_memory(forgotten: bool) -> None:
    params = three()
    others = copy.deepcopy(params)
    opt, eager = KeepsAStart(params, forgotten), KeepsAStart(others, forgotten)
    step = compiled(opt, fullgraph=False)
    for t in range(3):
        random_gradients(params, t)
        random_gradients(others, t)
        step()
        eager.step()
        torch.testing.assert_close(params, others)
    assert forgotten or not step.said


@pytest.mark.parametrize("maker", ["AdamW foreach", "rule"])
def test_strict_raises_on_shared_memory(maker: str) -> None:
    """`strict`: not even one step runs unfused, whether that is known when it is compiled or when it runs."""
    params = TIED["overlapping"]()
    before = [p.detach().clone() for p in params]
    random_gradients(params, 0)
    step = compiled(MAKERS[maker](params), fullgraph=False, strict=True)
    with pytest.raises(Exception, match=r"(?i)overlap|share|same memory"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
