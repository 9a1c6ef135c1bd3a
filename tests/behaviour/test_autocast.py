"""`with torch.autocast` in a step: fused where it changes nothing, and else the original with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import npu_fuse_pass


class Momentum(torch.optim.Optimizer):
    """As people write it whose models train in bfloat16."""

    def __init__(self, params: Any, enabled: bool) -> None:
        super().__init__(params, dict(lr=0.1, enabled=enabled))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=group["enabled"]):
                for p in group["params"]:
                    if "m" not in self.state[p]:
                        self.state[p]["m"] = torch.zeros_like(p)
                    m = self.state[p]["m"].mul_(0.9).add_(p.grad)
                    p.add_(m @ m.t() @ m, alpha=-group["lr"])


@pytest.mark.parametrize("around", [False, True], ids=["off around it", "on around it"])
@pytest.mark.parametrize("enabled", [False, True], ids=["off", "on"])
def test_autocast_in_a_step(enabled: bool, around: bool) -> None:
    found = []
    for compiled in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(3)]
        opt = Momentum(params, enabled)
        step = npu_fuse_pass.compile_step(opt) if compiled else opt.step
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) / 8
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
                step()
        found.append(params)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    report = npu_fuse_pass.reports()[-1]
    if enabled or around:
        assert report.fallback is not None and "take torch.autocast out of the step" in str(report)
    else:
        assert report.fallback is None and report.groups
