"""A rule that does not read its gradients: a parameter without one stays as it is."""

from __future__ import annotations

from typing import Any

import harness
from steps import OnNpu, assert_close, parameters, set_gradients
from torch import Tensor

from npu_fuse_pass.rules import ones, rule


@rule(states={"slow": ones}, defaults={"lr": 0.125})
def pull(param: Tensor, grad: Tensor, slow: Tensor, *, lr: Tensor) -> Any:
    return param + lr * (slow - param), slow + 1


def test_a_parameter_without_a_gradient_stays() -> None:
    optimizers: list[Any] = [pull(parameters()) for _ in range(2)]
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        set_gradients(params, 1)
        params[1].grad = None
    with harness.record():
        OnNpu(optimizers[0]).step()
    optimizers[1].step()
    for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)
