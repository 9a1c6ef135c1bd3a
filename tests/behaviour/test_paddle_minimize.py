"""Methods of optimizers.paddle.RMSProp: step, clear_grad, zero_grad and minimize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers.paddle import ClipGradByGlobalNorm, RMSProp
from tests.support.paddle_support import Loop, both_modes, stable
from tests.support.training import Step, assert_close, gradients, parameters, set_gradients

# Methods ----------------------------------------------------------------------------------------------------


@both_modes
def test_step_returns_none_and_takes_no_closure(mode: str) -> None:
    params = parameters()
    set_gradients(params, gradients(params, 0))
    opt = RMSProp(0.1, parameters=params)
    before = [p.detach().clone() for p in params]
    for wrong in (lambda: opt.step(lambda: 0.0), lambda: opt.step(closure=None)):
        with pytest.raises(TypeError):
            wrong()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert Step(opt, mode)() is None


def test_hooks_run_once_per_step() -> None:
    params = parameters()
    set_gradients(params, gradients(params, 0))
    opt = RMSProp(0.1, parameters=params)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("clear", ["clear_grad", "clear_gradients"])
def test_clear_grad_makes_zeros_or_none(clear: str) -> None:
    params = parameters()
    set_gradients(params, [*gradients(params, 0)[:-1], None])
    opt = RMSProp(0.1, parameters=params)
    kept = params[0].grad
    assert getattr(opt, clear)() is None
    assert params[0].grad is kept
    assert [None if p.grad is None else int(p.grad.count_nonzero()) for p in params] == [0, 0, 0, 0, None]
    getattr(opt, clear)(set_to_zero=False)
    assert [p.grad for p in params] == [None] * len(params)


def test_zero_grad_is_torchs() -> None:
    params = parameters()
    opt = RMSProp(0.1, parameters=params)
    set_gradients(params, gradients(params, 0))
    opt.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


# minimize ---------------------------------------------------------------------------------------------------


def quadratic(params: Sequence[Tensor]) -> Tensor:
    """A loss whose gradient is 2 * p."""
    return sum(((p * p).sum() for p in params), torch.zeros((), dtype=params[0].dtype))


def after_minimize(params: Sequence[Tensor], loop: Loop) -> None:
    loop.step([2 * v for v in loop.values])
    assert_close(params, loop.values)


@pytest.mark.parametrize("clear", ["clear_grad", "zero_grad", "set_to_none"])
def test_minimize_runs_backward_after_a_clear(clear: str) -> None:
    params = parameters(dtype=torch.float64)
    opt, loop = RMSProp(0.02, parameters=params), Loop(params)
    for _ in range(3):
        operators, pairs = opt.minimize(quadratic(params))
        assert operators == []
        assert [p for p, _ in pairs] == params
        assert all(g is p.grad for p, g in pairs)
        after_minimize(params, loop)
        if clear == "clear_grad":
            opt.clear_grad()
        else:
            opt.zero_grad(set_to_none=clear == "set_to_none")


def test_minimize_does_not_run_backward_again() -> None:
    params = parameters(dtype=torch.float64)
    opt, loop = RMSProp(0.02, parameters=params), Loop(params)
    for _ in range(3):
        loss = quadratic(params)
        loss.backward()  # a second one would raise, and would double the gradients
        opt.minimize(loss)
        after_minimize(params, loop)
        opt.clear_grad()


def test_minimize_uses_gradients_that_were_written_by_hand() -> None:
    params = parameters(dtype=torch.float64)
    opt, loop = RMSProp(0.02, parameters=params), Loop(params)
    opt.minimize(quadratic(params))
    loop.step([2 * v for v in loop.values])
    opt.clear_grad()
    for p in params:
        p.grad.add_(1.0)
    opt.minimize(quadratic(params))
    loop.step([torch.ones_like(v) for v in loop.values])
    assert_close(params, loop.values)
    opt.clear_grad()
    params[0].grad = torch.ones_like(params[0])  # another tensor; the others have zeros
    opt.minimize(quadratic(params))
    loop.step([torch.full_like(v, float(i == 0)) for i, v in enumerate(loop.values)])
    assert_close(params, loop.values)


def test_minimize_says_when_nothing_was_cleared() -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, parameters=params)
    opt.minimize(quadratic(params))
    with pytest.warns(UserWarning, match="last call"):
        opt.minimize(quadratic(params))


def test_minimize_with_a_clip_that_writes_gradients() -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, parameters=params, grad_clip=ClipGradByGlobalNorm(0.1))
    loop = Loop(params, clip=("global", 0.1))
    for _ in range(3):
        opt.minimize(quadratic(params))
        after_minimize(params, loop)
        opt.clear_grad()
    opt.step()  # writes the zeros again: still no gradient was produced
    loop.step([torch.zeros_like(v) for v in loop.values])
    opt.minimize(quadratic(params))
    after_minimize(params, loop)


@pytest.mark.parametrize("by", ["parameter", "name"])
@pytest.mark.parametrize("how", ["parameters", "no_grad_set"])
def test_minimize_updates_the_chosen_parameters(by: str, how: str) -> None:
    params = parameters(dtype=torch.float64)
    names = [f"layer.{i}" for i in range(len(params))]
    opt = RMSProp(0.02, parameters=list(zip(names, params, strict=True)))
    before = [p.detach().clone() for p in params]
    loop = Loop(params)
    items = params if by == "parameter" else names
    chosen = {"parameters": items[:2]} if how == "parameters" else {"no_grad_set": {*items[2:]}}
    _, pairs = opt.minimize(quadratic(params), **chosen)
    assert [p for p, _ in pairs] == params[:2]
    loop.step([2 * before[0], 2 * before[1], None, None, None])
    assert_close(params, loop.values)
    assert [p.grad is None for p in params] == [False, False, True, True, True]


def test_minimize_leaves_other_gradients_alone() -> None:
    params = parameters(dtype=torch.float64)
    opt = RMSProp(0.02, parameters=params)
    before = [p.detach().clone() for p in params]
    loss = quadratic(params)
    loss.backward()
    kept = [(p.grad, p.grad._version) for p in params[1:]]
    opt.minimize(loss, parameters=params[:1], no_grad_set=set())
    assert all(p.grad is g and g._version == v for p, (g, v) in zip(params[1:], kept, strict=True))
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"startup_program": object()}, ValueError, "static graphs"),
        ({"loss": 1.0}, TypeError, "loss should be a Tensor"),
        ({"parameters": ["w"]}, ValueError, "model.named_parameters()"),
        ({"no_grad_set": {"w"}}, ValueError, "model.named_parameters()"),
        ({"parameters": [torch.zeros(2, 7)]}, ValueError, "(2, 7)"),
        ({"parameters": [1]}, TypeError, "parameters should hold parameters or names"),
        ({"parameters": "w"}, TypeError, "parameters should be a list"),
        ({"no_grad_set": torch.zeros(1)}, TypeError, "no_grad_set should be a list"),
    ],
    ids=stable,
)
def test_minimize_refuses(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    params = parameters()
    opt = RMSProp(0.1, parameters=params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(kind) as e:
        opt.minimize(**{"loss": quadratic(params), **arguments})
    assert message in str(e.value)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(params, before, strict=True))


def test_minimize_names_what_it_has_where_a_name_is_unknown() -> None:
    model = torch.nn.Linear(2, 2)
    opt = RMSProp(0.1, parameters=model.named_parameters())
    with pytest.raises(ValueError, match=r"'w'.*does not update"):
        opt.minimize(model(torch.ones(1, 2)).sum(), parameters=["w"])


@both_modes
def test_gradients_made_in_inference_mode(mode: str) -> None:
    """They count no versions; clearing, clipping and stepping need none."""
    params, others = parameters(), parameters()
    for ps, inside in ((params, True), (others, False)):
        opt = RMSProp(0.1, parameters=ps, grad_clip=ClipGradByGlobalNorm(0.5))
        step = Step(opt, mode)
        for seed in range(3):
            with torch.inference_mode(inside and seed > 0):
                set_gradients(ps, gradients(ps, seed))
                step()
                opt.clear_grad()
    assert all(torch.equal(p, o) for p, o in zip(params, others, strict=True))
