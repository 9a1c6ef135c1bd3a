"""What the optimizers compute in special places: NaN, infinities, zero norms, new options, clipping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizers import NpuFusedAdam, NpuFusedLamb, NpuFusedRMSpropTF, NpuFusedSGD
from tests.support.cases import BY_NAME, CASES, NPU, ONE_EACH, Case, over
from tests.support.training import (
    MODES,
    Step,
    assert_close,
    clones,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)

modes = pytest.mark.parametrize("mode", MODES)
INF, NAN = float("inf"), float("nan")


@over(CASES)
@modes
def test_against_the_formula(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    train(params, step, oracle, range(6))
    assert_close(params, oracle.values)
    for p, states in zip(params, oracle.states, strict=True):
        assert_close([opt.state[p][n] for n in case.states], [states[n] for n in case.states])
    step.check(len(params))


@over([c for c in CASES if c.stock])
def test_against_torch_optim(case: Case) -> None:
    params = parameters(dtype=torch.float64)
    others = clones(params)
    opt, stock = case.build(params), case.stock(others, **case.options)
    train(params, opt.step, seeds=range(6))
    train(others, stock.step, seeds=range(6))
    assert_close(params, others, 1e-13)


@over(CASES)
@modes
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_bad_gradient_stays_where_it_is(case: Case, mode: str, value: float) -> None:
    """Inside its element, for LAMB inside its tensor, with a global norm anywhere; nothing spreads later."""
    params = parameters()
    oracle = case.oracle(params)
    step = Step(case.build(params), mode)
    train(params, step, oracle, [0])
    grads = gradients(params, 1)
    grads[0][1, 2] = value
    set_gradients(params, grads)
    step()
    oracle.step(grads)
    train(params, step, oracle, [2])
    step.check(len(params))
    if case.spread == "all":
        assert not math.isnan(value) or all(p.isnan().all() for p in params)
        return
    assert_close(params[1:], oracle.values[1:])
    hit = torch.ones(3, 4, dtype=torch.bool)
    if case.spread == "element":
        hit = torch.zeros(3, 4, dtype=torch.bool)
        hit[1, 2] = True
    assert params[0][1, 2].isfinite() == oracle.values[0][1, 2].isfinite()
    assert_close([params[0][~hit]], [oracle.values[0][~hit]])


@over(NPU)
@modes
def test_no_weight_decay_leaves_infinities_alone(case: Case, mode: str) -> None:
    """0 * inf would be NaN; where(weight_decay == 0, g, g + weight_decay * p) is not."""
    params = parameters()
    with torch.no_grad():
        params[0][0, 0], params[1][2] = INF, -INF
    oracle = case.oracle(params)
    oracle.set(weight_decay=0.0)
    step = Step(case.build(params, weight_decay=0.0), mode)
    train(params, step, oracle)
    assert params[0][0, 0] == INF
    assert params[1][2] == -INF
    finite = [v.isfinite() for v in oracle.values]
    assert [int((~f).sum()) for f in finite] == [1, 1, 0, 0, 0]
    assert_close([p[f] for p, f in zip(params, finite, strict=True)],
                 [v[f] for v, f in zip(oracle.values, finite, strict=True)])  # fmt: skip
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_groups_with_options_of_their_own(case: Case, mode: str) -> None:
    """Other constants in another group: the same kernel computes both."""
    params = parameters([(3, 4), (5,), (2, 3, 2), (7,)])
    oracle = case.oracle(params)
    name = "learning_rate" if "learning_rate" in case.options else "lr"
    own = {name: 0.5, "weight_decay": 0.3}  # Paddle's is a factor of the global learning rate
    for options in oracle.options[2:]:
        options.update(own)
        options[name] *= case.options[name] if name == "learning_rate" else 1
    step = Step(case.build([{"params": params[:2]}, {"params": params[2:], **own}]), mode)
    train(params, step, oracle)
    assert_close(params, oracle.values)
    step.check(len(params))
    assert mode == "eager" or [(g.updates, g.launches) for g in last_report().groups] == [(len(params), 1)]


@modes
def test_lamb_by_hand(mode: str) -> None:
    """Zero parameter or update: ratio 1. Norm limited to 10. No bias correction. `adam`: ratio 1."""
    values = [[0.0, 0.0], [3.0, 4.0], [30.0, 40.0], [3.0, 4.0]]
    params = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]
    zero, small, large, still = params
    for p in params:
        p.grad = torch.tensor([2.0, 2.0], dtype=torch.float64)
    still.grad = torch.zeros(2, dtype=torch.float64)
    step = Step(NpuFusedLamb(params, lr=0.5, betas=(0.75, 0.96), eps=0.0 + 1e-12), mode)
    step()
    u = 0.25 * 2 / math.sqrt(0.04 * 4)  # both elements; 1 with a bias correction
    assert u == pytest.approx(1.25)
    norm = u * math.sqrt(2)
    assert_close([zero], [torch.tensor([-0.5 * u] * 2)])
    assert_close([small], [torch.tensor([3.0, 4.0], dtype=torch.float64) - 0.5 * 5 / norm * u])
    assert_close([large], [torch.tensor([30.0, 40.0], dtype=torch.float64) - 0.5 * 10 / norm * u])
    assert torch.equal(still, torch.tensor([3.0, 4.0], dtype=torch.float64))
    step.check(4)
    opt = NpuFusedLamb([small], lr=0.5, betas=(0.75, 0.96), eps=1e-12, adam=True)
    small.data.zero_()
    Step(opt, mode)()
    assert_close([small], [torch.tensor([-0.5 * u] * 2)])


@modes
def test_lamb_attributes_may_change(mode: str) -> None:
    params = parameters()
    case = BY_NAME["lamb"]
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    for seed, (adam, use) in enumerate([(False, False), (True, False), (True, True), (False, True)]):
        opt.adam, opt.use_global_grad_norm = adam, use
        oracle.set(adam=adam, use_global_grad_norm=use)
        train(params, step, oracle, [seed])
    assert_close(params, oracle.values)
    step.check(len(params))


@modes
def test_decoupled_decay_is_without_lr(mode: str) -> None:
    (p,) = parameters([(4,)], torch.float64)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    Step(NpuFusedRMSpropTF([p], lr=0.5, weight_decay=0.25, decoupled_decay=True), mode)()
    assert_close([p], [before * 0.75])


@modes
def test_sgd_first_step_and_dampening(mode: str) -> None:
    """The first buffer is the undampened gradient, per parameter; dampening needs momentum to matter."""
    a, b = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    step = Step(NpuFusedSGD([a, b], lr=1.0, momentum=0.5, dampening=0.25), mode)
    a.grad = torch.ones(2, dtype=torch.float64)
    step()
    b.grad = torch.ones(2, dtype=torch.float64)
    step()
    assert a.tolist() == [-2.25] * 2  # 1, then 0.5 + 0.75
    assert b.tolist() == [-1.0] * 2
    opt = NpuFusedSGD([a], lr=1.0, dampening=0.5)
    Step(opt, mode)()
    assert a.tolist() == [-3.25] * 2
    assert "momentum_buffer" not in opt.state.get(a, {})


@over([BY_NAME["sgd"], BY_NAME["sgd_momentum"], BY_NAME["adam"], BY_NAME["adamw"]])
@modes
def test_options_may_change_between_steps(case: Case, mode: str) -> None:
    """Against torch.optim; momentum that comes and goes, and weight decay to and from 0."""
    params = parameters(dtype=torch.float64)
    others = clones(params)
    opt, stock = case.build(params), case.stock(others, **case.options)
    step = Step(opt, mode)
    sgd = case.make is NpuFusedSGD
    changes: list[dict[str, Any]] = [{}, {"lr": 0.1}, {"weight_decay": 0.2}, {"weight_decay": 0.0}]
    changes += [{"momentum": 0.5}, {"momentum": 0.0}, {"momentum": 0.9}] if sgd else [{"betas": (0.5, 0.75)}]
    for seed, change in enumerate([*changes, {"lr": torch.tensor(0.2)}, {"lr": 0}]):
        grads = gradients(params, seed)
        for some, o, run in ((params, opt, step), (others, stock, stock.step)):
            o.param_groups[0].update(change)
            set_gradients(some, grads)
            run()
    assert_close(params, others, 1e-7)  # a tensor as lr is float32 in torch.optim
    step.check(len(params))


@pytest.mark.parametrize("order", [1, 2, 3.5, INF, "inf"], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1000.0, INF])
def test_clip_grad_norm_fused(order: Any, max_norm: float) -> None:
    params = [*parameters(), *parameters([(3,)], torch.float16), *parameters([(2, 2)], torch.float64)]
    opt = NpuFusedAdam([{"params": params[:2]}, {"params": params[2:]}])
    grads: list[Tensor | None] = [g * 3 for g in gradients(params, 0)]
    grads[1] = None
    set_gradients(params, grads)
    held = [p.grad for p in params]
    everything = np.concatenate([g.double().numpy().ravel() for g in grads if g is not None])
    want = float(np.linalg.norm(everything, float(order)))
    norm = opt.clip_grad_norm_fused_(max_norm, order)
    assert isinstance(norm, Tensor)
    assert float(norm) == pytest.approx(want, rel=1e-6)
    factor = min(1.0, max_norm / (want + 1e-6))
    assert [p.grad for p in params] == held or all(p.grad is h for p, h in zip(params, held, strict=True))
    for p, g in zip(params, grads, strict=True):
        if g is not None and factor == 1.0:
            assert torch.equal(p.grad, g)
        elif g is not None:
            assert_close([p.grad], [g.double() * factor], max(1e-6, torch.finfo(g.dtype).eps))


def test_clip_grad_norm_fused_special_values() -> None:
    params = parameters()
    opt = NpuFusedSGD(params, lr=0.1)
    assert float(opt.clip_grad_norm_fused_(1.0)) == 0.0  # no gradients
    half = parameters([(400,)], torch.float16)
    half[0].grad = torch.full((400,), 200.0, dtype=torch.float16)  # the sum of squares overflows in float16
    assert float(NpuFusedSGD(half, lr=0.1).clip_grad_norm_fused_(2000.0)) == 4000.0
    assert torch.equal(half[0].grad, torch.full((400,), 100.0, dtype=torch.float16))
    grads = gradients(params, 0)
    grads[0][0, 0] = NAN
    set_gradients(params, grads)
    assert opt.clip_grad_norm_fused_(1.0).isnan()
    assert all(torch.equal(p.grad, g) for p, g in zip(params[1:], grads[1:], strict=True))
    for bad in (-1.0, NAN, "1", None, True):
        with pytest.raises(ValueError, match="max_norm"):
            opt.clip_grad_norm_fused_(bad)
    for bad in (0, -2, NAN, "two", None):
        with pytest.raises(ValueError, match="norm_type"):
            opt.clip_grad_norm_fused_(1.0, bad)
