"""Graphs that are no optimizer's, and what happens to a compiled step when the training loop changes things."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimizers
from tests.support.papers_norms import Lamb, Lion
from tests.support.training import assert_fused, clones, compiled, gradients, last_report, parameters, set_gradients

pytestmark = pytest.mark.usefixtures("afresh")


# Nothing to fuse -----------------------------------------------------------------------------------------------------


def pointwise(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2 + y).sigmoid()


def products(x: Tensor, y: Tensor) -> tuple[Tensor, int, None]:
    return x @ y.t() + 1, 3, None


def shapes(x: Tensor, y: Tensor) -> Any:
    return {"a": x.view(-1)[::2], "b": [x.size(0), x.shape], "c": y.argmax(), "d": x > y}


def returns_its_arguments(x: Tensor, y: Tensor) -> Any:
    return y, x


def empty(x: Tensor, y: Tensor) -> None:
    return None


def draws(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, 0.5) + torch.rand_like(y)


def integers(x: Tensor, y: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) // 2 + y.long().sum()


GRAPHS = [pointwise, products, shapes, returns_its_arguments, empty, draws, integers]


@pytest.mark.filterwarnings("ignore:npu_fused")
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("function", GRAPHS, ids=lambda f: f.__name__)
def test_functions_run_unchanged(function: Callable[..., Any], grad: bool) -> None:
    """Same values and types, and gradients where torch has some."""
    x, y = (torch.randn(4, 3, requires_grad=grad) for _ in range(2))
    a, b = (t.detach().clone().requires_grad_(grad) for t in (x, y))
    fused = torch.compile(function, backend="npu_fused")
    for seed in range(2):
        torch.manual_seed(seed)
        got = fused(x, y)
        torch.manual_seed(seed)
        want = function(a, b)
        flat_got, spec_got = torch.utils._pytree.tree_flatten(got)
        flat_want, spec_want = torch.utils._pytree.tree_flatten(want)
        assert spec_got == spec_want
        for g, w in zip(flat_got, flat_want, strict=True):
            assert type(g) is type(w) or isinstance(g, Parameter)
            torch.testing.assert_close(g, w) if isinstance(g, Tensor) else None
            assert not isinstance(g, Tensor) or g.requires_grad == w.requires_grad
    differentiable = [(g, w) for g, w in zip(flat_got, flat_want, strict=True) if getattr(g, "requires_grad", False)]
    for g, w in differentiable:
        g.sum().backward(retain_graph=True)
        w.sum().backward(retain_graph=True)
    if differentiable:
        torch.testing.assert_close(x.grad, a.grad)
        torch.testing.assert_close(y.grad, b.grad)


# Autograd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), ()], ids=str)
@pytest.mark.parametrize("make", [torch.optim.AdamW, optimizers.NpuFusedAdamW, Lion], ids=lambda c: c.__name__)
def test_autograd_notices_that_a_parameter_was_written(make: Any, shape: Any) -> None:
    """As eagerly: backward through a value saved before the step is an error, not a wrong gradient.

    For exactly the parameters that it changes: one without a gradient is not written.
    """
    p, q = params = [Parameter(torch.randn(shape)) for _ in range(2)]
    step = compiled(make(params, lr=0.1), fullgraph=False)
    for _ in range(3):
        p.grad, q.grad = torch.ones(shape), None
        loss, other = (p * p).sum(), (q * q).sum()
        step()
        other.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert p.requires_grad and p.is_leaf


# What a training loop does between steps ---------------------------------------------------------------------------


def new_storage(params: Any, opt: Any, t: int) -> None:
    for p in params:
        p.data = p.data.clone()


def another_layout(params: Any, opt: Any, t: int) -> None:
    for p in params:
        if p.ndim == 2:
            p.data = p.data.t().contiguous().t()


def another_dtype(params: Any, opt: Any, t: int) -> None:
    for p in params if t == 1 else []:
        p.data = p.data.double()
        p.grad = torch.ones_like(p)
        state = opt.state.get(p, {})
        for name in [n for n, v in state.items() if isinstance(v, Tensor) and v.ndim]:
            state[name] = state[name].double()


def strided_gradients(params: Any, opt: Any, t: int) -> None:
    for p in params:
        wide = torch.zeros(*p.shape, 2)
        wide[..., 0] = p.grad
        p.grad = wide[..., 0]


def transposed_gradients(params: Any, opt: Any, t: int) -> None:
    for p in params:
        p.grad = p.grad.t().contiguous().t() if p.ndim == 2 and t % 2 else p.grad


def reloaded(params: Any, opt: Any, t: int) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def states_replaced(params: Any, opt: Any, t: int) -> None:
    for p in params:
        state = opt.state.get(p, {})
        for name in [n for n, v in state.items() if isinstance(v, Tensor) and v.ndim]:
            state[name] = state[name].clone() * 0.5


def grown(params: Any, opt: Any, t: int) -> None:
    if t == 2:
        extra = Parameter(torch.ones(6))
        extra.grad = torch.full((6,), 0.5)
        opt.add_param_group({"params": [extra]})
        params.append(extra)


def late_gradient(params: Any, opt: Any, t: int) -> None:
    if t < 2:
        params[0].grad = None


def half_the_gradients(params: Any, opt: Any, t: int) -> None:
    params[t % len(params)].grad = None


def infinite(params: Any, opt: Any, t: int) -> None:
    params[0].grad.view(-1)[0] = [float("inf"), float("nan"), 0.0, -float("inf")][t % 4]


CHANGES = [new_storage, another_layout, another_dtype, strided_gradients, transposed_gradients, reloaded]
CHANGES += [states_replaced, grown, late_gradient, half_the_gradients, infinite]
MAKERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, foreach=False),
    "Lamb": lambda ps: Lamb(ps, foreach=True),
    "rule": lambda ps: optimizers.NpuFusedAdamW(ps, lr=0.05, weight_decay=0.1),
}


@pytest.mark.filterwarnings("ignore:npu_fused")
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_training_loop_does_between_steps(change: Any, maker: str) -> None:
    """Guards do not see all of it (a gradient's strides and dtype, p.data): values stay eager's."""
    params = parameters([(3, 4), (40, 50), (5,)])
    others = clones(params)
    opt, other = MAKERS[maker](params), MAKERS[maker](others)
    step = compiled(opt, fullgraph=False)
    for t in range(5):
        for own, o in ((params, opt), (others, other)):
            set_gradients(own, gradients(own, t))
            change(own, o, t)
        step()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert (p.dtype, p.stride()) == (q.dtype, q.stride())
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, equal_nan=True)
    fused = change is not another_dtype
    assert not fused or not step.said, step.said


def test_a_step_after_the_model_moved_to_half_and_back() -> None:
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, other = (optimizers.NpuFusedSGD(p, lr=0.1, momentum=0.9) for p in (params, others))
    step = compiled(opt, fullgraph=False)
    for t, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32, torch.float64]):
        for own in (params, others):
            for p in own:
                p.data = p.data.to(dtype)
            set_gradients(own, gradients(own, t))
        step()
        other.step()
        torch.testing.assert_close(params, others, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert_fused(last_report(), parameters=len(params))
