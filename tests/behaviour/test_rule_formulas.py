"""Rules whose formula depends on shapes, constants or sums; operations that cannot fuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass import ones, rule, total
from tests.support.rules import same_compiled
from tests.support.training import (
    assert_close,
    at_once,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)
from tests.support.unchanged import Unchanged

SHAPED: dict[str, Callable[..., Any]] = {
    "numel": lambda param, grad, m, *, lr: (param - lr * grad / param.numel(), m),
    "mean": lambda param, grad, m, *, lr: (param - lr * grad.mean(), m),
    "mean of squares": lambda param, grad, m, *, lr: (param - lr * grad / (grad.square().mean() + 1), m),
    "norm": lambda param, grad, m, *, lr: (param - lr * grad / (grad.norm() + 1), m),
    "rank": lambda param, grad, m, *, lr: (param - lr * grad - (0.1 * param if param.ndim > 1 else 0), m),
    "root of rows": lambda param, grad, m, *, lr: (param - lr * math.sqrt(max(param.shape, default=1)) * grad, m),
    "large ones": lambda param, grad, m, *, lr: (param - lr * grad if param.numel() > 50 else param + lr * grad, m),
    "other tensor": lambda param, grad, m, *, lr: (param - lr * (grad if param.numel() > 10 else param), m),
    "other state": lambda param, grad, m, *, lr: (param - lr * grad, grad if param.numel() > 10 else param),
    "other order": lambda param, grad, m, *, lr: (param - grad if param.numel() > 10 else grad - param, m),
    "keep": lambda param, grad, m, *, lr: (param - lr * grad, m if param.numel() > 10 else param),
    "old parameter": lambda param, grad, m, *, lr: (param - lr * m, param),
    "exchanged": lambda param, grad, m, *, lr: (m - lr * grad, param),
    "tall": lambda param, grad, m, *, lr: (param * (lr if param.ndim and param.shape[0] > param.shape[-1] else 1), m),
    "size of a row": lambda param, grad, m, *, lr: (param - lr * grad / grad[0].numel(), m),
    "first element": lambda param, grad, m, *, lr: (param - lr * grad.flatten()[0], m),
    "rows": lambda param, grad, m, *, lr: (param - lr * grad.sum(-1, keepdim=True), m),
}
UNFUSED = ("first element", "rows")


@pytest.mark.parametrize("what", SHAPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:npu_fused")
def test_formulas_that_depend_on_the_shape(what: str, dtype: torch.dtype) -> None:
    made = rule(states={"m": ones}, defaults={"lr": 0.125})(SHAPED[what])
    same_compiled(made, dtype=dtype, fused=what not in UNFUSED)
    report = last_report()
    assert bool(report.unfused or report.fallback) == (what in UNFUSED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_total_of_constants_that_depend_on_the_shape(dtype: torch.dtype) -> None:
    counted = total(lambda grad: torch.tensor(1.0 / grad.numel(), dtype=grad.dtype, device=grad.device))
    made = rule(totals={"n": counted}, defaults={"lr": 0.1})(lambda param, grad, *, lr, n: param - lr * n * grad)
    same_compiled(made, dtype=dtype)


def test_a_parameter_without_a_gradient_stays_where_the_rule_does_not_read_it() -> None:
    """Of "other tensor" the small ones read no gradient; of "pull" none does."""

    @rule(states={"slow": ones}, defaults={"lr": 0.125})
    def pull(param: Tensor, grad: Tensor, slow: Tensor, *, lr: Tensor) -> Any:
        return param + lr * (slow - param), slow + 1

    for made in (pull, rule(states={"m": ones}, defaults={"lr": 0.125})(SHAPED["other tensor"])):
        for platform in ("cpu", "eager"):
            params, others = parameters(), parameters()
            opt, eager = made(params), made(others)
            step = torch.compile(opt.step, backend="npu_fused", options={"platform": platform})
            for missing in (None, 1, 0, None, 2):
                for mine in (params, others):
                    set_gradients(mine, gradients(mine, 1))
                    if missing is not None:
                        mine[missing].grad = None
                step()
                eager.step()
                assert last_report().groups
                assert not last_report().fallback
                assert_close(params, others)
                assert [float(s["step"]) for s in opt.state.values()] == [
                    float(s["step"]) for s in eager.state.values()
                ]


CONSTANT, VECTOR = torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3])
CONSTANTS: dict[str, Callable[..., Any]] = {
    "made inside": lambda param, grad, *, lr: param - lr * torch.tensor(0.3) * grad,
    "double": lambda param, grad, *, lr: param - lr * torch.tensor(0.3, dtype=torch.float64) * grad,
    "integer": lambda param, grad, *, lr: param - lr * torch.tensor(3) * grad,
    "global": lambda param, grad, *, lr: param - lr * CONSTANT * grad,
    "alone": lambda param, grad, *, lr: param - CONSTANT * grad,
    "full": lambda param, grad, *, lr: param - lr * torch.full((), 0.3) * grad,
    "like": lambda param, grad, *, lr: param - lr * torch.full_like(param, 0.3) * torch.ones_like(grad),
    "zeros": lambda param, grad, *, lr: torch.where(grad > 0, param - lr, torch.zeros_like(param)),
    "vector": lambda param, grad, *, lr: param - lr * VECTOR.sum() * grad,
    "new": lambda param, grad, *, lr: param - lr * grad.new_ones(()) * grad,
}


@pytest.mark.parametrize("what", CONSTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:npu_fused")
def test_tensor_constants(what: str, dtype: torch.dtype) -> None:
    """Right whatever the constant is; a 0-dim one is fused."""
    made = rule(defaults={"lr": 0.125})(CONSTANTS[what])
    params = same_compiled(made, dtype=dtype, fused=what not in ("vector", "new"))
    assert all(p.isfinite().all() for p in params)


@pytest.mark.filterwarnings("ignore:npu_fused")
def test_an_operation_that_cannot_fuse_is_reported() -> None:
    """Right, and said: the report names the operation; strict=True raises it."""
    made = rule(states={"m": ones}, defaults={"lr": 0.1})(
        lambda param, grad, m, *, lr: (param - lr * torch.cumsum(grad.flatten(), 0).view_as(grad), m)
    )
    same_compiled(made, fused=False)
    report = last_report()
    assert any("cumsum" in u.op and u.text for u in report.unfused)
    params = parameters()
    opt = made(params)
    train(params, opt.step)
    unchanged = Unchanged(opt)
    with pytest.raises(Exception, match=r"strict=True and not everything was fused:\s+view, cumsum"):
        compiled(opt, strict=True)()
    unchanged()
    assert issubclass(npu_fuse_pass.UnfusedError, RuntimeError)


def test_totals_and_written_gradients() -> None:
    """A rule that scales all gradients by their common norm and writes them back."""

    @rule(
        totals={"square": total(lambda grad: grad.double().square().sum())},
        defaults={"lr": 0.1, "limit": 1.0},
        writes_grad=True,
    )
    def clipped(param: Tensor, grad: Tensor, *, square: Tensor, lr: Tensor, limit: Tensor) -> Any:
        grad = grad * torch.clamp(limit / square.sqrt(), max=1)
        return param - lr * grad, grad

    params = same_compiled(clipped)
    grads = gradients(params, 3)
    opt = clipped(params)
    set_gradients(params, grads)
    held = [p.grad for p in params]
    version = [g._version for g in held]
    compiled(opt)()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert norm > 1
    assert_close([p.grad for p in params], [g / norm for g in grads], 1e-5)
    assert all(p.grad is g and g._version > v for p, g, v in zip(params, held, version, strict=True))


def test_a_rule_does_not_change() -> None:
    made = rule(defaults={"lr": 0.1})(lambda param, grad, *, lr: param - lr * grad)
    with pytest.raises(AttributeError):
        made.name = "other"  # type: ignore[misc]
    results = at_once(*[lambda: made(parameters())] * 2)
    assert results[0].param_groups[0]["lr"] == 0.1
    results[0].defaults["lr"] = results[0].param_groups[0]["lr"] = 5
    assert made.defaults["lr"] == results[1].param_groups[0]["lr"] == 0.1
    assert npu_fuse_pass.rule is rule
