"""Compiled steps while parameters, gradients and groups come, go and move: as torch.optim, and always fused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from optimizers import NpuFusedAdam, NpuFusedSGD
from tests.behaviour.test_backend_inputs import BF16, F32, F64, LAYOUTS, SHAPES, steps
from tests.support.cases import BY_NAME
from tests.support.training import (
    assert_close,
    assert_fused,
    assert_one_fused_step,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
)


def twins(shapes: Any = SHAPES, cls: Any = NpuFusedAdam, stock: Any = torch.optim.Adam, **options: Any) -> Any:
    params = parameters(shapes, F64)
    others = clones(params)
    opt = cls(params, **options)
    return params, opt, compiled(opt), others, stock(others, **options)


def both(params: Any, step: Any, others: Any, stock: Any, seed: int, missing: Any = (), plain: bool = True) -> None:
    """One step of both; fused, and equal."""
    grads = [None if i in missing else g for i, g in enumerate(gradients(params, seed))]
    set_gradients(params, grads)
    set_gradients(others, grads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if len(missing) < len(params) and seed and plain:
            assert_one_fused_step(step, copies=True)
        else:
            step()
    stock.step()
    assert_close(params, others, 1e-13)


def test_all_gradients_none() -> None:
    """First, in between and last: nothing changes, and the next gradients are taken."""
    params, opt, step, others, stock = twins()
    everyone = tuple(range(len(params)))
    for seed, missing in enumerate([everyone, (), everyone, (1,), everyone]):
        before = copy.deepcopy(opt.state_dict())
        both(params, step, others, stock, seed, missing, plain=seed != 1)
        if missing == everyone:
            after = opt.state_dict()
            assert before["state"].keys() == after["state"].keys()
            for i, entry in before["state"].items():
                assert all(torch.equal(v, after["state"][i][k]) for k, v in entry.items())
    step.check(len(params))


@pytest.mark.parametrize("shapes", [[()], [(0,)], [(1,)], [(), (0,), (3, 0), (1, 1), (2, 3)], [(0, 2), ()]], ids=str)
@pytest.mark.parametrize("name", ["adam", "sgd_momentum", "lamb", "lamb_global", "paddle_rmsprop"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_0_dim_and_0_size(shapes: Any, name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    params = parameters(shapes, dtype)
    step, oracle = compiled(case.build(params)), case.oracle(params)
    steps(params, step, oracle, lambda s: gradients(params, s), False)


def test_empty_groups() -> None:
    params, opt, step, others, stock = twins()
    for o in (opt, stock):
        o.add_param_group({"params": [], "lr": 0.5})
    for seed in range(3):
        both(params, step, others, stock, seed)
    empty = NpuFusedAdam([{"params": []}, {"params": []}])
    nothing = compiled(empty)
    for _ in range(3):
        nothing()
    empty.add_param_group({"params": parameters([(3,)])})
    (p,) = empty.param_groups[2]["params"]
    p.grad = torch.ones(3)
    nothing()
    assert_one_fused_step(nothing)


def test_frozen_and_unfrozen() -> None:
    """requires_grad=False, later True; a gradient that comes late; a gradient of a frozen parameter."""
    params, opt, step, others, stock = twins(lr=0.01, weight_decay=0.1)
    for p in (params[0], others[0]):
        p.requires_grad_(False)
    for seed in range(2):
        both(params, step, others, stock, seed, (0, 2))
    assert params[0] not in opt.state
    both(params, step, others, stock, 2, (2,), plain=False)  # the gradient of a frozen parameter counts, as in torch
    for p in (params[0], others[0]):
        p.requires_grad_(True)
    both(params, step, others, stock, 3, plain=False)
    for seed in range(4, 6):
        both(params, step, others, stock, seed)
    step.check(len(params))
    assert [int(opt.state[p]["step"]) for p in params] == [4, 6, 3, 6]


def test_step_counters_differ() -> None:
    params, opt, step, others, stock = twins(lr=0.01, weight_decay=0.1)
    for seed, missing in enumerate([(), (0,), (0, 1), (2,), ()]):
        both(params, step, others, stock, seed, missing)
    for o, some in ((opt, params), (stock, others)):
        o.state[some[1]]["step"] = torch.tensor(100.0)
        o.state[some[2]]["step"].fill_(7.0)
    for seed in range(5, 8):
        both(params, step, others, stock, seed)
    assert [int(opt.state[p]["step"]) for p in params] == [6, 103, 10, 8]
    assert [int(e["step"]) for e in opt.state_dict()["state"].values()] == [6, 103, 10, 8]
    assert len(npu_fuse_pass.reports()) == 1


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "cpu": lambda p: p.cpu(),
    "into one buffer": lambda p: torch.cat([p.flatten(), p.flatten()])[: p.numel()].reshape(p.shape),
    "transposed": LAYOUTS["transposed"],
    "sliced": LAYOUTS["sliced"],
    "channels_last": LAYOUTS["channels_last"],
}


@pytest.mark.parametrize("move", MOVES)
def test_data_is_moved(move: str) -> None:
    """Between steps, once and again: the new storage is updated, the old one is left alone."""
    params, _, step, others, stock = twins(lr=0.01)
    for seed in range(6):
        if seed % 2:
            old = [p.data for p in params]
            values = [p.detach().clone() for p in params]
            for p in params:
                p.data = MOVES[move](p.data)
            both(params, step, others, stock, seed, plain=False)
            for p, data, value in zip(params, old, values, strict=True):
                assert p.data_ptr() == data.data_ptr() or torch.equal(data, value)
        else:
            both(params, step, others, stock, seed)
    step.check(len(params))


RESHAPED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "view": ((4, 4), lambda p: p.view(2, 8)),
    "flattened": ((4, 4), torch.flatten),
    "transposed, with the same strides": ((4, 1), lambda p: p.as_strided((1, 4), (1, 1))),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("how", RESHAPED)
def test_data_gets_another_shape(how: str, is_compiled: bool, copied: bool) -> None:
    """Its states have the old one: refused before anything is changed, in the same memory, too."""
    shape, change = RESHAPED[how]
    first, other = parameters([(3,), shape])
    opt = NpuFusedAdam([first, other], lr=0.01)
    if is_compiled:
        npu_fuse_pass.compile_optimizer_(opt)
    for p in (first, other):
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    if is_compiled:
        assert_fused(last_report(), parameters=2)
    other.grad = None
    other.data = change(other.data.clone() if copied else other.data)
    other.grad = torch.ones_like(other)
    before = first.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 1 .* shape"):
            opt.step()
    assert torch.equal(first, before) and int(opt.state[first]["step"]) == 2


@pytest.mark.parametrize("missing", [(), (0,)])
def test_data_is_transposed_in_its_memory(missing: tuple[int, ...]) -> None:
    params, _, step, others, stock = twins(lr=0.01, shapes=[(3,), (4, 4)])
    for seed in range(4):
        if seed == 2:
            for p in (params[1], others[1]):
                p.grad = None
                p.data = p.data.t()
        both(params, step, others, stock, seed, missing, plain=False)
    step.check(len(params))


def test_added_groups() -> None:
    """Other options, other dtypes, other options that change the structure."""
    params, opt, step, others, stock = twins(lr=0.01, cls=NpuFusedSGD, stock=torch.optim.SGD)
    both(params, step, others, stock, 0)
    for seed, extra in enumerate([{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"lr": 0.5}], 1):
        more = parameters([(5, 2), (3,)], F64, seed=seed)
        copies = clones(more)
        opt.add_param_group({"params": more, **extra})
        stock.add_param_group({"params": copies, **extra})
        params, others = [*params, *more], [*others, *copies]
        both(params, step, others, stock, 10 * seed, plain=False)
        both(params, step, others, stock, 10 * seed + 1)
        step.check(len(params))
    half = parameters([(3, 2)], BF16)
    opt.add_param_group({"params": half, "lr": 0.25})
    half[0].grad = torch.ones(3, 2, dtype=BF16)
    want = half[0].detach() - 0.25
    step()
    assert torch.equal(half[0], want)
    assert_fused(last_report(), parameters=len(params) + 1)
    assert {g.dtype for g in last_report().groups} == {"f64", "bf16"}


@pytest.mark.parametrize("name", ["lr", "betas"])
def test_numbers_that_change_in_place(name: str) -> None:
    """The same object, a tensor or a tuple that holds one, has another value at every step."""
    params, opt, step, others, stock = twins()
    number = torch.tensor(0.1, dtype=F64)
    opt.param_groups[0][name] = number if name == "lr" else (number, 0.999)
    for seed in range(6):
        number.fill_(0.1 + 0.1 * seed)
        stock.param_groups[0][name] = float(number) if name == "lr" else (float(number), 0.999)
        both(params, step, others, stock, seed)
