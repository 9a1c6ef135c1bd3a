"""A checkpoint is taken over as it was saved: no state is rounded on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import optimizers
from tests.support.cases import CASES, Case, over
from tests.support.training import assert_fused, compiled, last_report, parameters, set_gradients

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def make(case: Case, dtype: torch.dtype, stored: torch.dtype | None) -> tuple[Any, Any]:
    params = parameters([(30, 10), (7,)], dtype=dtype)
    return params, case.build(params, state_dtype=stored)


def step(params: Any, opt: Any, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        set_gradients(params, [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params])
        opt.step()


def states(params: Any, opt: Any) -> list[tuple[str, torch.Tensor]]:
    return [(n, t) for p in params for n, t in sorted(opt.state.get(p, {}).items()) if n != "step"]


@over(CASES)
@pytest.mark.parametrize(("dtype", "stored"), [(BF16, F32), (F16, F32), (F32, F64), (BF16, None)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(case: Case, dtype: torch.dtype, stored: torch.dtype | None) -> None:
    """Bit for bit, also before the first step of the resumed run."""
    params, opt = make(case, dtype, stored)
    step(params, opt, range(3))
    others, other = make(case, dtype, stored)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    kept, loaded = states(params, opt), states(others, other)
    assert [(n, t.dtype) for n, t in loaded] == [(n, stored or dtype) for n, _ in kept]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(kept, loaded, strict=True))
    step(params, opt, range(3, 8))
    step(others, other, range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@over(CASES)
def test_a_checkpoint_that_its_optimizer_goes_on_with(case: Case) -> None:
    """Not saved in between: what the other one does with its tensors does not reach this one."""
    params, opt = make(case, BF16, F32)
    step(params, opt, range(3))
    others, other = make(case, BF16, F32)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(opt.state_dict())
    for seed in range(3, 8):
        step(params, opt, range(seed, seed + 1))
        step(others, other, range(seed, seed + 1))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_resumed_run_compiled() -> None:
    params = parameters([(30, 10)], dtype=BF16)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt, other = (optimizers.NpuFusedAdam(ps, lr=1e-2, state_dtype=F32) for ps in (params, others))
    first, second = compiled(opt), compiled(other)
    for seed in range(6):
        grad = torch.randn(30, 10, generator=torch.Generator().manual_seed(seed)).to(BF16)
        set_gradients(params, [grad])
        set_gradients(others, [grad.clone()])
        first()
        other.load_state_dict(copy.deepcopy(other.state_dict()))
        second()
    assert_fused(last_report(), parameters=1)
    assert torch.equal(params[0], others[0])


def test_states_are_stored_as_they_are_asked_for() -> None:
    """A checkpoint in another dtype: states of the wanted one, at once and after the next step."""
    params = parameters([(5,)], dtype=BF16)
    opt = optimizers.NpuFusedAdam(params, state_dtype=F32)
    step(params, opt, range(1))
    saved = opt.state_dict()
    for stored in (None, F64):
        others = parameters([(5,)], dtype=BF16)
        other = optimizers.NpuFusedAdam(others, state_dtype=stored)
        other.load_state_dict(saved)
        for _ in range(2):
            assert {t.dtype for _, t in states(others, other)} == {stored or BF16}
            step(others, other, range(1))


def test_hooks_see_tensors() -> None:
    """Whatever they put into a state dict is what is loaded."""
    params = parameters([(5,)], dtype=BF16)
    opt = optimizers.NpuFusedAdam(params, state_dtype=F32)
    step(params, opt, range(2))
    seen: list[Any] = []

    def double(_: Any, state_dict: Any) -> Any:
        entries = {k: {**e, "exp_avg": e["exp_avg"] * 2} for k, e in state_dict["state"].items()}
        return {**state_dict, "state": entries}

    opt.register_load_state_dict_pre_hook(double)
    opt.register_load_state_dict_post_hook(lambda o: seen.extend(t for _, t in states(params, o)))
    want = opt.state[params[0]]["exp_avg"] * 2
    opt.load_state_dict(opt.state_dict())
    assert len(seen) == 2
    assert all(type(t) is torch.Tensor for t in seen)
    assert torch.equal(seen[0], want)
    assert want.dtype == F32
    assert len(opt._optimizer_load_state_dict_pre_hooks) == 1


def test_hooks_may_change_the_layout() -> None:
    """As of torch.optim's: what is written is what hooks make of it; what they make of a file is checked."""
    params = parameters([(5,)])
    opt = optimizers.NpuFusedAdam(params, lr=0.1)
    step(params, opt, range(2))
    seen: list[Any] = []

    def wrap(_: Any, saved: Any) -> Any:
        seen.append((type(saved["state"][0]), saved["state"][0]["step"].dtype, "foreach" in saved["param_groups"][0]))
        return {"optimizer": {**saved, "state": {0: {"m": saved["state"][0].pop("exp_avg"), **saved["state"][0]}}}}

    def unwrap(_: Any, loaded: Any) -> Any:
        entry = dict(loaded["optimizer"]["state"][0])
        groups = [{**group, "lr": abs(group["lr"])} for group in loaded["optimizer"]["param_groups"]]
        return {"state": {0: {"exp_avg": entry.pop("m"), **entry}}, "param_groups": groups}

    opt.register_state_dict_post_hook(wrap)
    opt.register_load_state_dict_pre_hook(unwrap)
    want = opt.state[params[0]]["exp_avg"].clone()
    saved = opt.state_dict()
    assert list(saved) == ["optimizer"] and seen == [(dict, F32, True)]
    saved["optimizer"]["param_groups"][0]["lr"] = -0.1
    opt.state.clear()
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[params[0]]["exp_avg"], want) and opt.param_groups[0]["lr"] == 0.1
    opt.register_load_state_dict_pre_hook(lambda _, s: {**s, "state": {0: {**s["state"][0], "exp_avg": torch.ones(3)}}})
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 0 is"):
        opt.load_state_dict(saved)
    assert torch.equal(opt.state[params[0]]["exp_avg"], want)
