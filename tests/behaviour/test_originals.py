"""What the originals cannot do and ours must: parameters, gradients and storage, eager and compiled.

The numbers are compared with oracles.py, formulas in float64 that share nothing with the code under test.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.cases import ONE_EACH, Case, over
from tests.support.training import MODES, Step, assert_close, gradients, parameters, set_gradients, train

modes = pytest.mark.parametrize("mode", MODES)


@over(ONE_EACH)
@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_bf16_and_fp64_parameters(case: Case, mode: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    oracle = case.oracle(params)
    opt = case.build(params, state_dtype=torch.float32 if dtype.itemsize == 2 else None)
    step = Step(opt, mode)
    train(params, step, oracle)
    assert_close(params, oracle.values, {2: 2 * torch.finfo(dtype).eps, 8: 1e-11}[dtype.itemsize])
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_half_precision_states(case: Case, mode: str) -> None:
    """By default states have the parameter's dtype, as in torch.optim: three digits in bfloat16."""
    params = parameters(dtype=torch.bfloat16)
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    train(params, step, oracle)
    assert {opt.state[p][s].dtype for p in params for s in case.states} == {torch.bfloat16}
    assert_close(params, oracle.values)


@over(ONE_EACH)
@modes
def test_gradient_replaced_or_none(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    train(params, step, oracle)
    for seed in range(10, 16):
        grads: list[Tensor | None] = list(gradients(params, seed))
        grads[seed % 5] = None
        set_gradients(params, grads)
        before, count = params[seed % 5].detach().clone(), opt.state[params[seed % 5]]["step"].item()
        step()
        oracle.step(grads)
        assert torch.equal(params[seed % 5], before)
        assert opt.state[params[seed % 5]]["step"].item() == count
    set_gradients(params, [None] * len(params))
    step()
    train(params, step, oracle, [20])
    assert_close(params, oracle.values)
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_reallocated_parameters(case: Case, mode: str) -> None:
    """`p.data = x`, `.cpu()` and `.to()`: other storage, other strides, other dtype."""
    module = torch.nn.Conv2d(3, 4, 2)
    params = list(module.parameters())
    oracle = case.oracle(params)
    step = Step(case.build(params), mode)
    train(params, step, oracle)
    for p, value in zip(params, oracle.values, strict=True):
        p.data = torch.full_like(p, 0.5)
        value.fill_(0.5)
    train(params, step, oracle, [4, 5])
    module.cpu().to(memory_format=torch.channels_last)
    assert not params[0].is_contiguous()
    train(params, step, oracle, [6, 7])
    assert_close(params, oracle.values)
    module.double()
    oracle.dtypes = [torch.float64] * 2
    train(params, step, oracle, [8, 9])
    assert_close(params, oracle.values, 2e-4)
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_late_unfrozen_and_added_parameters(case: Case, mode: str) -> None:
    params = parameters()
    late, frozen = params[1], params[2]
    frozen.requires_grad_(False)
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    for seed in range(8):
        if seed == 4:
            frozen.requires_grad_(True)
        if seed == 6:
            added = parameters([(4, 2), (3,)], seed=9)
            opt.add_param_group({"params": added})
            oracle.add(added, case.options)
            params = params + added
        grads: list[Tensor | None] = list(gradients(params, seed))
        if seed < 2:
            grads[1] = None
        if not frozen.requires_grad:
            grads[2] = None
        set_gradients(params, grads)
        step()
        oracle.step(grads)
    assert_close(params, oracle.values)
    assert [opt.state[p]["step"].item() for p in (params[0], late, frozen, *added)] == [8, 6, 4, 2, 2]
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_per_parameter_step_counts(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    for seed in range(6):
        grads = [g if seed % (i + 1) == 0 else None for i, g in enumerate(gradients(params, seed))]
        set_gradients(params, grads)
        step()
        oracle.step(grads)
    assert_close(params, oracle.values)
    assert [opt.state[p]["step"].item() for p in params] == oracle.counts == [6, 3, 2, 2, 2]
    step.check(len(params))


def strided() -> list[torch.nn.Parameter]:
    """Transposed, every second column, a slice of a larger storage, channels_last."""
    made = [torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.randn(20)[5:11].view(2, 3)]
    return [torch.nn.Parameter(p) for p in (*made, torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))]


@over(ONE_EACH)
@modes
def test_storage_of_any_layout(case: Case, mode: str) -> None:
    """Parameters of any strides, with gradients of their own, of other strides, expanded or sliced."""
    torch.manual_seed(0)
    params = strided()
    outside = params[2].untyped_storage()
    oracle = case.oracle(params)
    step = Step(case.build(params), mode)
    for seed in range(6):
        grads = gradients(params, seed)
        grads[0] = torch.full((1, 1), 0.25).expand(3, 4)
        grads[1] = grads[1].t().contiguous().t() if seed % 2 else torch.randn(3, 9)[:, 1:8:2]
        grads[3] = grads[3].contiguous() if seed % 3 else grads[3].to(memory_format=torch.channels_last)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        step()
        oracle.step(grads)
    assert_close(params, oracle.values)
    assert params[2].untyped_storage().data_ptr() == outside.data_ptr()
    step.check(len(params))


@over(ONE_EACH)
@modes
def test_module_attribute_replaced(case: Case, mode: str) -> None:
    """As in torch.optim: the optimizer goes on with the parameter object that it was given."""
    module = torch.nn.Linear(3, 2)
    params = list(module.parameters())
    oracle = case.oracle(params)
    step = Step(case.build(module.parameters()), mode)
    train(params, step, oracle, [0])
    module.weight = torch.nn.Parameter(torch.ones(2, 3))
    module.bias = None
    train(params, step, oracle, [1, 2])
    assert_close(params, oracle.values)
    assert torch.equal(module.weight, torch.ones(2, 3))
    step.check(2)


@over(ONE_EACH)
@modes
def test_in_place_changes_and_reads(case: Case, mode: str) -> None:
    params = parameters()
    oracle = case.oracle(params)
    step = Step(case.build(params), mode)
    for seed in range(4):
        train(params, step, oracle, [seed])
        assert_close([p.detach().clone() for p in params], oracle.values)
        with torch.no_grad():
            for p, value in zip(params, oracle.values, strict=True):
                p.mul_(0.5).add_(0.1)
                value.mul_(0.5).add_(0.1)
    train(params, step, oracle, [9])
    assert_close(params, oracle.values)
    step.check(len(params))
