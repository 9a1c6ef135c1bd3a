"""Steps that are like an earlier one are bound at once, and whatever makes a step another one is noticed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import Parameters, Twins, adjacent
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import npu_fuse_pass
import optimizers
from npu_fuse_pass.lowerings.npu.layout import bind, binding_cache
from npu_fuse_pass.tensors.same import SameTensors

SHAPES = [(4, 5), (3,), (2, 2), (5, 4), (3,)]
MAKE: dict[str, Callable[[Parameters], Any]] = {
    "ours": lambda p: optimizers.NpuFusedAdam(p, lr=0.02),
    "stock": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, foreach=False),
}


pytestmark = pytest.mark.usefixtures("afresh")


class Counted(Twins):
    """`looks`: how often tensors were looked at one by one."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        parameters = lambda: [torch.nn.Parameter(t.clone()) for t in adjacent(SHAPES, 0)]  # noqa: E731
        super().__init__(MAKE[name], parameters, strict=False)
        self.looks, one_by_one = 0, bind.Binder._bind_one_by_one

        def counted(*args: Any) -> None:
            self.looks += 1
            one_by_one(*args)

        monkeypatch.setattr(bind.Binder, "_bind_one_by_one", counted)

    def run(self, k: int, gradients: Callable[[Any, Parameters], object] = lambda *_: None) -> int:
        """One step with new gradients; whether tensors were looked at one by one."""
        before = self.looks
        self.step(k, change=gradients)
        return self.looks - before

    def settled(self) -> None:
        """After steps that are like each other."""
        assert [self.run(k) for k in range(4)][2:] == [0, 0]
        assert npu_fuse_pass.reports()[-1].fallback is None


def transposed(t: Tensor) -> Tensor:
    """The same values with the elements of a matrix in the other order."""
    return t.t().contiguous().t()


def set_grad(i: int, made: Callable[[Tensor], Tensor]) -> Callable[[Any, Parameters], None]:
    def change(optimizer: Any, params: Parameters) -> None:
        grad = params[i].grad
        params[i].grad = None if grad is None else made(grad)

    return change


def negative(t: Tensor) -> Tensor:
    """A view whose memory holds the negatives of its values."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view.as_strided(t.shape, view.stride())


def dense_negative(t: Tensor) -> Tensor:
    found = torch._neg_view(-t)
    assert found.is_neg() and found.is_contiguous() and torch.equal(found, t)
    return found


def reallocate(optimizer: Any, params: Parameters) -> None:
    params[1].data = params[1].data.clone()


def exchange(optimizer: Any, params: Parameters) -> None:
    """Memory of parameters of one shape, with what is in it."""
    params[0].data, params[3].data = params[3].data.view(4, 5), params[0].data.view(5, 4)


def other_order(optimizer: Any, params: Parameters) -> None:
    params[2].data = transposed(params[2].data)


def missing(optimizer: Any, params: Parameters) -> None:
    params[1].grad = None


# What happens to a step, and whether its tensors are looked at one by one.
CHANGES: dict[str, tuple[Callable[[Any, Parameters], object], int]] = {
    "a parameter is elsewhere": (reallocate, 0),
    "parameters changed places": (exchange, 0),
    "a parameter in another order": (other_order, 1),
    "a gradient in another order": (set_grad(2, transposed), 1),
    "a gradient with gaps": (set_grad(1, lambda g: torch.stack([g, g], 1)[:, 0]), 1),
    "one number for a whole gradient": (set_grad(0, lambda g: g[:1, :1].expand_as(g)), 1),
    "a negative view": (set_grad(1, dense_negative), 1),
    "a negative view with gaps": (set_grad(1, negative), 1),
    "no gradient": (missing, 1),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, looks = CHANGES[change]
    twins = Counted(name, monkeypatch)
    twins.settled()
    if name == "stock" and change == "no gradient":
        return  # another graph of Dynamo's
    assert twins.run(4, function) == looks
    for k in range(5, 8):
        twins.run(k)
    assert npu_fuse_pass.reports()[-1].fallback is None


def test_a_replaced_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(optimizer: Any, params: Parameters) -> None:
        state = optimizer.state[params[0]]
        state["momentum_buffer"] = 2 * state["momentum_buffer"]

    twins = Counted("stock", monkeypatch)
    twins.settled()
    for k in range(4, 7):
        twins.run(k, replace)


def test_the_same_gradient_missing_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Counted("ours", monkeypatch)
    assert [twins.run(k, missing) for k in range(5)][2:] == [0, 0, 0]


def shared_gradient(optimizer: Any, params: Parameters) -> None:
    params[3].grad = params[0].detach().view(5, 4)


def shared_parameters(optimizer: Any, params: Parameters) -> None:
    params[1].data = params[0].data.view(-1)[1:4]


@pytest.mark.parametrize("share", [shared_gradient, shared_parameters])
@pytest.mark.parametrize("name", MAKE)
def test_shared_memory_is_noticed(
    name: str, share: Callable[[Any, Parameters], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Counted(name, monkeypatch)
    twins.settled()
    with pytest.warns(UserWarning, match="share memory"):
        assert twins.run(4, share) == 0
    assert "share memory" in str(npu_fuse_pass.reports()[-1].fallback)


@pytest.mark.parametrize("name", MAKE)
def test_memory_is_free_after_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of gradients, of parameters that went elsewhere, and of all states with their optimizer."""
    twins = Counted(name, monkeypatch)
    twins.settled()
    grad = twins.both[0][0].grad
    assert grad is not None
    old = [StorageWeakRef(t.untyped_storage()) for t in (grad, twins.both[0][1].data)]
    del grad
    twins.change(reallocate)
    twins.change(lambda optimizer, params: optimizer.zero_grad())
    assert [ref.expired() for ref in old] == [True, True]
    states = twins.ours.state[twins.both[0][0]].values()
    old = [StorageWeakRef(t.untyped_storage()) for t in states if isinstance(t, Tensor)]
    del states, twins
    monkeypatch.undo()
    gc.collect()
    assert all(ref.expired() for ref in old)


# These tests can fail ------------------------------------------------------------------------------------------------

PLANTED: dict[str, tuple[Any, str, Any, str]] = {
    "another kind is not noticed": (SameTensors, "match", lambda *_: True, "a negative view"),
    "who takes part is not compared": (binding_cache.operator, "is_not", lambda *_: True, "no gradient"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_noticed(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong, change = PLANTED[planted]
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises((AssertionError, RuntimeError, AttributeError, TypeError)):
        test_a_change_is_noticed(change, "ours", monkeypatch)


def test_shared_memory_that_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding_cache, "apart", lambda *_: True)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_shared_memory_is_noticed("ours", shared_gradient, monkeypatch)
