"""`master_weights`: half-precision parameters that learn as float32 ones do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from tests.support.cases import BY_NAME, CASES, Case, over
from tests.support.training import (
    assert_close,
    assert_fused,
    beside_float64,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(30, 10), (7,), (), (7,)]


def exact(params: Any, opt: Any) -> list[torch.Tensor]:
    """What parameters stand for: what they hold and what was rounded away."""
    return [p.detach().float() + opt.state[p]["master_residual"] for p in params]


def beside(case: Case, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """An optimizer with master weights, and the same over parameters of float32."""
    params = parameters(SHAPES, dtype=dtype)
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    return params, case.build(params, state_dtype=F32, master_weights=True), others, case.build(others)


def train(params: Any, step: Any, others: Any, other: Any, seeds: range) -> None:
    for seed in seeds:
        grads = [g.to(params[0].dtype) for g in gradients(params, seed)]
        set_gradients(params, grads)
        set_gradients(others, [g.float() for g in grads])
        step()
        other()


@over(CASES)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_steps_are_those_of_float32(case: Case, dtype: torch.dtype) -> None:
    """Bit for bit where no gradient is written: what a parameter lacks of float32 is in its residual."""
    params, opt, others, other = beside(case, dtype)
    train(params, opt.step, others, other.step, range(6))
    for p, e, q in zip(params, exact(params, opt), others, strict=True):
        assert torch.equal(e, q.detach()) if "clip" not in case.options else torch.allclose(e, q)
        assert torch.equal(p, q.to(dtype))


@over(CASES)
def test_compiled(case: Case) -> None:
    params, opt, others, other = beside(case, BF16)
    train(params, compiled(opt), others, other.step, range(6))
    assert_close(exact(params, opt), others)
    assert_fused(last_report(), parameters=len(params))


def test_a_small_lr_moves_parameters() -> None:
    """Where half precision alone loses the steps: far less error against float64 than rounding each step leaves."""
    errors = {}
    for master in (False, True):
        start, got, want = beside_float64(100, 1e-3, master_weights=master)
        errors[master] = float((got - want).norm() / (want - start).norm())
    assert errors[True] < 0.25 * errors[False], errors


def test_others_are_as_without_it() -> None:
    """float32 parameters of the same optimizer have no residual, and totals are over both kinds."""
    params = [*parameters([(5,)], dtype=BF16), *parameters([(3, 2)])]
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    options: Any = dict(lr=0.1, use_global_grad_norm=True)
    opt = optimizers.NpuFusedLamb(params, **options, state_dtype=F32, master_weights=True)
    other = optimizers.NpuFusedLamb(others, **options)
    step = compiled(opt)
    for seed in range(4):
        grads = [10 * g.to(p.dtype) for g, p in zip(gradients(params, seed), params, strict=True)]
        set_gradients(params, grads)
        set_gradients(others, [g.float() for g in grads])
        step()
        other.step()
    assert "master_residual" in opt.state[params[0]] and "master_residual" not in opt.state[params[1]]
    assert_close([*exact(params[:1], opt), params[1]], others)
    assert_fused(last_report(), parameters=2)


def test_checkpoints() -> None:
    """The residual is saved and loaded as it is; a checkpoint without it begins at nothing rounded away."""
    params, opt, others, other = beside(BY_NAME["adam"], BF16)
    train(params, opt.step, others, other.step, range(3))
    for copied in (copy.deepcopy(opt.state_dict()), pickle.loads(pickle.dumps(opt.state_dict()))):
        again = clones(params)
        resumed = BY_NAME["adam"].build(again, state_dtype=F32, master_weights=True)
        resumed.load_state_dict(copied)
        assert all(torch.equal(a, b) for a, b in zip(exact(params, opt), exact(again, resumed), strict=True))
    train(params, opt.step, others, other.step, range(3, 5))
    train(again, resumed.step, others, lambda: None, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(exact(params, opt), exact(again, resumed), strict=True))
    lacking = copy.deepcopy(opt.state_dict())
    for entry in lacking["state"].values():
        del entry["master_residual"]
    resumed.load_state_dict(lacking)
    train(again, resumed.step, others, lambda: None, range(5, 6))
    twin = copy.deepcopy(resumed)
    assert twin.master_weights and exact(twin.param_groups[0]["params"], twin)


def test_what_is_written_to_a_parameter_counts() -> None:
    params, opt, others, other = beside(BY_NAME["adam"], BF16)
    step = compiled(opt)
    train(params, step, others, other.step, range(3))
    with torch.no_grad():
        for p in params:
            p.fill_(3.0)
    set_gradients(params, [torch.zeros_like(p) for p in params])
    step()
    assert all(torch.allclose(p.float(), torch.full_like(p.float(), 3.0), atol=0.3) for p in params)


def test_a_wrong_value() -> None:
    with pytest.raises(npu_fuse_pass.OptionError, match=r"master_weights='yes': allowed are True and False"):
        optimizers.NpuFusedAdam(parameters(), master_weights="yes")


def test_a_rule_whose_state_has_the_name() -> None:
    @npu_fuse_pass.rule(states={"master_residual": npu_fuse_pass.zeros}, defaults=dict(lr=0.1))
    def mine(param, grad, master_residual, *, lr):  # type: ignore[no-untyped-def]
        return param - lr * grad, master_residual

    params = parameters([(3,)], dtype=BF16)
    set_gradients(params, [torch.ones(3, dtype=BF16)])
    with pytest.raises(npu_fuse_pass.RuleError, match="has a state 'master_residual'"):
        mine(params, master_weights=True).step()
