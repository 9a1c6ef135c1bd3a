"""Compiled steps over every kind of parameter and gradient: right numbers, and the kernel ran at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from optimizers import NpuFusedAdam, NpuFusedAdamW
from tests.support.cases import BY_NAME, Case, over
from tests.support.training import (
    Step,
    assert_close,
    assert_one_fused_step,
    compiled,
    gradients,
    parameters,
    set_gradients,
)

SHAPES = [(4, 6), (2, 3, 4, 4), (8,), (4, 6)]
CASES = [BY_NAME[n] for n in ("adam", "lamb")]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def steps(params: list[Any], step: Step, oracle: Any, grads: Callable[[int], list[Any]], copies: bool) -> None:
    """Four steps; each must be the calls that the newest report states, with copies only where they are allowed."""
    for seed in range(4):
        made = grads(seed)
        for p, g in zip(params, made, strict=True):
            p.grad = g
        if seed:  # the first one compiles, and a report of a later one may be about a new plan
            assert_one_fused_step(step, copies)
        else:
            step()
        oracle.step(made)
        for p, g in zip(params, made, strict=True):
            assert p.grad is g
    assert_close(params, oracle.values)
    step.check(len(params))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda g: g.to(memory_format=torch.channels_last) if g.ndim == 4 else g,
    "expanded": lambda g: g[:1].expand(g.shape),
    "expanded to one": lambda g: g.flatten()[:1].reshape([1] * g.ndim).expand(g.shape),
    "sliced": lambda g: g.repeat_interleave(2, -1)[..., ::2],
    "flipped order": lambda g: torch.empty(g.shape[::-1]).permute(*reversed(range(g.ndim))).copy_(g),
    "negated": lambda g: torch._neg_view(g.neg()),
    "offset": lambda g: torch.cat([torch.zeros(3), g.flatten()])[3:].reshape(g.shape),
}


@over(CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_gradients(case: Case, layout: str) -> None:
    params = parameters(SHAPES)
    opt = case.build(params)
    step, oracle = compiled(opt), case.oracle(params)
    steps(params, step, oracle, lambda s: [LAYOUTS[layout](g) for g in gradients(params, s)], True)


def test_layouts_may_alternate() -> None:
    params = parameters(SHAPES)
    step, oracle = compiled(NpuFusedAdam(params, lr=0.02)), BY_NAME["adam"].oracle(params)
    oracle.set(weight_decay=0.0)
    for seed, change in enumerate([*LAYOUTS.values(), lambda g: g, *LAYOUTS.values()]):
        grads: list[Tensor | None] = [change(g) for g in gradients(params, seed)]
        if seed % 3 == 2:
            grads[seed % 2] = None
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if seed:
            assert_one_fused_step(step, copies=True)
        else:
            step()
        oracle.step(grads)
    assert_close(params, oracle.values)
    assert len(npu_fuse_pass.reports()) == 1


PARAMETERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "channels_last": (LAYOUTS["channels_last"], False),
    "transposed": (LAYOUTS["transposed"], False),
    "sliced": (LAYOUTS["sliced"], True),
    "row of a larger one": (lambda p: torch.stack([p * 0, p, p * 0])[1], False),
    "every other row": (lambda p: p.repeat_interleave(2, 0)[::2], True),
}


@over(CASES)
@pytest.mark.parametrize("layout", PARAMETERS)
@pytest.mark.parametrize("like", [True, False], ids=["gradients likewise", "gradients contiguous"])
def test_strides_of_parameters(case: Case, layout: str, like: bool) -> None:
    """Dense ones, in whatever order of dimensions, need no copy where the gradient lies likewise."""
    change, copies = PARAMETERS[layout]
    params = [torch.nn.Parameter(change(p.detach())) for p in parameters(SHAPES)]
    around = [p.detach()._base for p in params]
    before = [None if b is None else b.clone() for b in around]
    opt = case.build(params)
    step, oracle = compiled(opt), case.oracle(params)
    arrange = change if like else lambda g: g
    steps(params, step, oracle, lambda s: [arrange(g) for g in gradients(params, s)], copies or not like)
    for p, base, old in zip(params, around, before, strict=True):
        if base is not None and old is not None:  # what lies between is not touched
            changed = torch.ones_like(base, dtype=torch.bool)
            changed.as_strided(p.shape, p.stride(), p.storage_offset()).zero_()
            assert torch.equal(base[changed], old[changed])


@over(CASES)
@pytest.mark.parametrize("dtypes", [(F32, BF16), (F32, F64), (F64, F32), (BF16, F32)], ids=str)
def test_dtypes_of_gradients(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Gradients of another dtype than the parameters', from the start and coming and going."""
    own, other = dtypes
    params = parameters(SHAPES, own)
    for p in params:
        p.grad_dtype = None  # any
    step, oracle = (
        compiled(case.build(params, state_dtype=max(own, F32, key=lambda d: d.itemsize))),
        case.oracle(params),
    )
    tolerance = 0.1 if own is BF16 else None
    kinds = [(other, other), (own, own), (own, other)]
    for seed, (first, second) in enumerate(kinds):
        for again in range(3):
            grads = [g.to(second if i % 2 else first) for i, g in enumerate(gradients(params, 9 * seed + again))]
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            if again:  # the first may plan anew
                assert_one_fused_step(step)
            else:
                step()
            oracle.step(grads)
            assert_close(params, oracle.values, tolerance)
    step.check(len(params))


def test_dtype_of_a_parameter_changes() -> None:
    """`p.data = p.data.to(dtype)`, as module.to does: the state moves along, the step stays fused."""
    torch.manual_seed(0)  # one weight in 60 models is so small that bfloat16's steps pass it
    model = torch.nn.Linear(6, 4).double()
    params = list(model.parameters())
    oracle = BY_NAME["adamw"].oracle(params)
    oracle.options = [dict(lr=0.02)] * 2
    step = compiled(NpuFusedAdamW(params, lr=0.02))
    for seed, dtype in enumerate([F64, F32, F64, BF16, F32]):
        model.to(dtype)
        assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
        oracle.dtypes = [dtype, dtype]
        oracle.values = [v.to(dtype).double() for v in oracle.values]
        for again in range(2):
            grads = gradients(params, 10 * seed + again)
            set_gradients(params, grads)
            if again:
                assert_one_fused_step(step)
            else:
                step()
            oracle.step(grads)
        assert_close(params, oracle.values, 3e-2 if dtype is BF16 or seed == 4 else 2e-4)
        step.check(2)


def test_numbers_whose_memory_holds_something_else() -> None:
    """A negated lr (what `-lr` may be a view of) is not read from memory with the wrong sign; a plain one is fused."""
    params, copies = parameters([(3,)]), parameters([(3,)])
    lr = torch.tensor(-0.5)
    step = torch.compile(torch.optim.SGD(params, lr=torch._neg_view(lr)).step, backend="npu_fused")
    oracle = torch.optim.SGD(copies, lr=0.5)
    for said in (pytest.warns(UserWarning, match="does not hold its value"), contextlib.nullcontext()):
        for p in (*params, *copies):
            p.grad = torch.ones(3)
        with said:
            step()
        oracle.step()
    assert torch.equal(params[0], copies[0])
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.fallback is not None and "does not hold its value" in report.fallback
