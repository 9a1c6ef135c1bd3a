"""What the originals cannot do and ours must: saving, closures, scaling and norms, eager and compiled.

The numbers are compared with oracles.py, formulas in float64 that share nothing with the code under test.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import optimizers
from tests.goldens import doc_example_parameters
from tests.support.cases import BY_NAME, ONE_EACH, Case, over
from tests.support.training import MODES, Step, assert_close, clones, gradients, parameters, set_gradients, train

modes = pytest.mark.parametrize("mode", MODES)


@over(ONE_EACH)
@modes
def test_zero_grad_to_none_is_the_default(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    for seed in range(3):
        train(params, step, oracle, [seed])
        opt.zero_grad()
        assert all(p.grad is None for p in params)
    opt.zero_grad(set_to_none=False)
    set_gradients(params, gradients(params, 5))
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    assert_close(params, oracle.values)
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_load_state_dict_into_a_used_optimizer(case: Case, mode: str) -> None:
    params, used = parameters(), parameters(seed=1)
    oracle, opt = case.oracle(params), case.build(params)
    train(params, opt.step, oracle)
    other = case.build(used)
    step = Step(other, mode)
    train(used, step, seeds=range(50, 57))
    other.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(used, params, strict=True):
            p.copy_(q)
    train(used, step, oracle, [4, 5])
    assert_close(used, oracle.values)
    step.check(len(params))


@over([c for c in ONE_EACH if c.name != "paddle_rmsprop"])
@modes
def test_closure_that_calls_backward(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum((p**2).sum() for p in params) / 2
        loss.backward()
        return loss

    for _ in range(3):
        want = sum(float((v**2).sum()) for v in oracle.values) / 2
        assert float(step(closure).detach()) == pytest.approx(want, rel=1e-5)
        oracle.step(list(oracle.values))
    assert_close(params, oracle.values)
    step.check(len(params))


@over(ONE_EACH)
@modes
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_pickle_and_deepcopy_after_a_step(case: Case, mode: str, copied: Any) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    first = Step(opt, mode)
    train(params, first, oracle)
    other = copied(opt)
    others = [p for group in other.param_groups for p in group["params"]]
    assert all(a is not b for a, b in zip(params, others, strict=True))
    before = clones(params)
    step = Step(other, mode)
    train(others, step, oracle, [4, 5])
    assert_close(others, oracle.values)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    step.check(len(params))
    train(params, first, seeds=[4, 5])  # from states of its own
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@modes
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_lamb_global_norm(mode: str, scale: float) -> None:
    """Over all groups and dtypes; divides only where it exceeds one."""
    params = [*parameters(), *parameters([(4, 2)], torch.float64, seed=1)]
    case = BY_NAME["lamb_global"]
    oracle = case.oracle(params)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05, "weight_decay": 0.1}]
    for options in oracle.options[2:]:
        options.update(lr=0.05, weight_decay=0.1)
    step = Step(case.build(groups), mode)
    for seed in range(4):
        grads = [g * scale for g in gradients(params, seed)]
        set_gradients(params, grads)
        step()
        oracle.step(grads)
    assert_close(params, oracle.values, 2e-4)
    step.check(len(params))


@modes
def test_documents_example_with_eps_1e8_is_finite(mode: str) -> None:
    params = doc_example_parameters()
    oracle = BY_NAME["adam"].oracle(params)
    options = dict(eps=1e-8, betas=(0.9, 0.999), lr=2e-3, weight_decay=0.05)
    oracle.set(**options)
    step = Step(optimizers.NpuFusedAdam(params, **options), mode)
    step()
    oracle.step([p.grad for p in params])
    assert_close(params, oracle.values)
    step.check(6)


@modes
@pytest.mark.parametrize("name", ["lamb", "lamb_global"])
def test_lamb_norms_in_float32(mode: str, name: str) -> None:
    """The squares of these parameters and gradients overflow in float16; originally nothing moved."""
    params = [torch.nn.Parameter(torch.full((300,), 40.0, dtype=torch.float16)) for _ in range(2)]
    case = BY_NAME[name]
    oracle = case.oracle(params)
    step = Step(case.build(params, lr=1.0, state_dtype=torch.float32), mode)
    oracle.set(lr=1.0)
    for _ in range(3):
        grads = [torch.full((300,), 300.0, dtype=torch.float16) for _ in params]
        set_gradients(params, grads)
        step()
        oracle.step(grads)
    assert_close(params, oracle.values)
    assert (params[0] < 39).all()
    step.check(2)


@over(ONE_EACH)
@modes
def test_gradscaler(case: Case, mode: str) -> None:
    """unscale_ and a skipped step, with a scaler that looks for `is_fused_optimizer` as torch_npu's does."""
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    opt_step = Step(opt, mode)
    opt.step = opt_step  # what a scaler calls
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for seed in range(4):
        grads = gradients(params, seed)
        set_gradients(params, [g * scaler.get_scale() for g in grads])
        bad = seed == 2
        if bad:
            params[1].grad[0] = float("inf")
        scaler.scale(torch.ones(()))
        scaler.unscale_(opt)
        before = clones(params)
        scaler.step(opt)
        scaler.update()
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        else:
            oracle.step(grads)
    assert scaler.get_scale() == 4.0
    assert not hasattr(opt, "is_fused_optimizer")
    assert_close(params, oracle.values)
    opt_step.check(len(params))
