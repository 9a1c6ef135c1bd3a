"""A step under a TorchDispatchMode (FlopCounterMode, say) is eager, and the others are fused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import npu_fuse_pass
import optimizers
from tests.support.training import assert_close, assert_one_fused_step, clones, gradients, parameters, set_gradients

CASES: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "a rule": (lambda p: optimizers.lion(p, lr=0.01), torch.float32),
    "a class of this package": (lambda p: optimizers.NpuFusedAdamW(p, lr=0.01), torch.float32),
    "torch's, as a rule": (lambda p: torch.optim.AdamW(p, lr=0.01), torch.float32),
    "torch's, captured": (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5), torch.bfloat16),
}
WAYS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "compile_optimizer_": lambda opt: npu_fuse_pass.compile_optimizer_(opt).step,
    "compile_step": npu_fuse_pass.compile_step,
    "torch.compile": lambda opt: torch.compile(opt.step, backend="npu_fused"),
}
# Dynamo skips the code of torch's classes for good, with every backend
TRIED = [(case, way) for case in CASES for way in WAYS if not (case.startswith("torch's") and way == "torch.compile")]


def test_what_a_rule_is_traced_under_is_no_mode_to_dynamo() -> None:
    """The flag is the process's: Dynamo would skip for good what other threads call while a rule is traced."""
    seen = []

    @npu_fuse_pass.rule(states={"m": npu_fuse_pass.zeros}, defaults={"lr": 0.1})
    def looking(param: Any, grad: Any, m: Any, *, lr: Any) -> Any:
        seen.append(torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals())
        m = 0.9 * m + grad
        return param - lr * m, m

    params = parameters(((3,), (4, 5)))
    step = npu_fuse_pass.compile_step(looking(params))
    set_gradients(params, gradients(params, 0))
    step()
    assert_one_fused_step(step)
    assert seen and not any(seen)


@pytest.mark.parametrize("under", [0, 2])
@pytest.mark.parametrize(("case", "way"), TRIED)
def test_steps_beside_one_under_a_mode_are_fused(case: str, way: str, under: int) -> None:
    make, dtype = CASES[case]
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(((3,), (4, 5)))]
    others = clones(params)
    step, eager = WAYS[way](make(params)), make(others).step
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        for seed in range(5):
            for ps in (params, others):
                set_gradients(ps, gradients(ps, seed))
            counted = FlopCounterMode(display=False) if seed == under else contextlib.nullcontext()
            with counted:  # type: ignore[attr-defined]
                step()
            eager()
    assert not [w.message for w in said if issubclass(w.category, UserWarning)]
    assert_close(params, others, 0.01 if dtype is torch.bfloat16 else None)
    assert_one_fused_step(step)
    following = clones(params)
    set_gradients(following, gradients(following, 9))
    step = WAYS[way](make(following))
    step()
    step()
    assert_one_fused_step(step)
