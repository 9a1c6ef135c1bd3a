"""`torch.set_default_device` says where a user's new tensors go: it changes nothing of what the host computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from steps import assert_same, parameters, set_gradients

import npu_fuse_pass
import optimizers
from npu_fuse_pass.backend import npu_fused

CASES: dict[str, Callable[[Any], Any]] = {
    "stock Adam": lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=0.1),
    "stock ASGD": lambda params: torch.optim.ASGD(params, lr=0.02, foreach=False),
    "Adam": lambda params: optimizers.NpuFusedAdam(params, lr=0.02, weight_decay=0.1),
    "Lamb, one norm for all": lambda params: with_global_norm(optimizers.NpuFusedLamb(params, lr=0.02)),
}


def with_global_norm(optimizer: Any) -> Any:
    optimizer.use_global_grad_norm = True
    return optimizer


@pytest.mark.parametrize("kernels", ["auto", "elementwise"])
@pytest.mark.parametrize("name", CASES)
def test_steps_under_another_default_device(name: str, kernels: str, on_meta: None) -> None:
    with torch.device("cpu"):
        ours, eager = (CASES[name](parameters()) for _ in range(2))
        for opt in (ours, eager):
            set_gradients(opt.param_groups[0]["params"], 0)
            opt.step()  # torch's own optimizers make their states here, on the default device
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "kernels": kernels})
    for k, missing in enumerate([(), (), (1,), ()] if "stock" not in name else [(), (), ()], 1):
        with torch.device("cpu"):
            for opt in (ours, eager):
                set_gradients(opt.param_groups[0]["params"], k, missing)
            eager.step()
        with harness.record():
            step()
        assert_same(ours, eager, 1e-6)
    assert npu_fuse_pass.reports()[-1].fallback is None
