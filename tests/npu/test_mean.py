"""A rule that computes with the size of its tensors: the host's part of a step knows it for every member."""

from __future__ import annotations

from typing import Any

import harness
import torch
from steps import OnNpu, assert_close, parameters, set_gradients
from torch import Tensor

from npu_fuse_pass.rules import rule


@rule(defaults={"lr": 0.1})
def centred(param: Tensor, grad: Tensor, *, step: Tensor, lr: Tensor) -> Tensor:
    return param - lr * (grad - grad.mean())


def test_a_mean_is_over_the_elements_of_each_tensor() -> None:
    optimizers: list[Any] = [centred(parameters()) for _ in range(2)]
    for optimizer in optimizers:
        set_gradients(optimizer.param_groups[0]["params"], 1)
    with harness.record():
        OnNpu(optimizers[0]).step()
    optimizers[1].step()
    for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)
        assert not torch.equal(p, torch.zeros_like(p)) or not p.numel()
