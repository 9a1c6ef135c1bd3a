"""Numbers at the edges of their dtype, and a learning rate of 0: the compiled step gives what the eager one gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers

pytestmark = pytest.mark.usefixtures("shipped_kernels")

STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, dict(amsgrad=True)),
    "Adam weight_decay": (torch.optim.Adam, dict(weight_decay=0.1)),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, dict(amsgrad=True)),
    "NAdam": (torch.optim.NAdam, {}),
    "NAdam decoupled": (torch.optim.NAdam, dict(decoupled_weight_decay=True, weight_decay=0.1)),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop centered": (torch.optim.RMSprop, dict(centered=True, momentum=0.9)),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "SGD": (torch.optim.SGD, dict(momentum=0.9)),
    "Rprop": (torch.optim.Rprop, {}),
}


def run(make: Any, options: dict[str, Any], compiled: bool, start: Tensor, grads: list[Tensor], lrs: Any) -> list[Any]:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    p = torch.nn.Parameter(start.clone())
    opt = make([p], **options)
    step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
    for g, lr in zip(grads, lrs, strict=True):
        if lr is not None:
            opt.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        step()
    if compiled:
        assert any(r.groups and not r.fallback for r in npu_fuse_pass.reports()), npu_fuse_pass.reports()
    return [p.detach(), *(v for n, v in opt.state[p].items() if isinstance(v, Tensor) and n != "step")]


WARMED_UP = [(n, torch.float32, False) for n in STOCK]
WARMED_UP += [(n, d, False) for n in ("Adam amsgrad", "AdamW") for d in (torch.float64, torch.bfloat16)]
WARMED_UP += [(n, torch.float32, True) for n in ("Adam", "AdamW amsgrad", "NAdam")]


@pytest.mark.parametrize(("name", "dtype", "foreach"), WARMED_UP, ids=str)
def test_a_learning_rate_of_zero(name: str, dtype: torch.dtype, foreach: bool) -> None:
    """As a warmup starts: elements that have had no gradient stay, and everything goes on as in an eager step."""
    make, options = STOCK[name]
    grads = [torch.tensor([0.0, 1.0, 2.0, -3.0], dtype=dtype)] * 4
    given = dict(options, foreach=foreach, lr=0.0)
    args = (torch.ones(4, dtype=dtype), grads, (0.0, 0.0, 0.125, 0.25))
    tolerance = 3 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    for want, got in zip(run(make, given, False, *args), run(make, given, True, *args), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_of_zero_for_one_number(shape: tuple[int, ...], name: str) -> None:
    """A parameter of one element is computed with numbers: a temperature, a scale, a gate."""
    make, options = STOCK[name]
    grads = [torch.full(shape, grad) for grad in (0.0, 0.0, 2.0, -3.0)]
    given, args = dict(options, foreach=False, lr=0.0), (torch.ones(shape), grads, (0.0, 0.0, 0.125, 0.25))
    for want, got in zip(run(make, given, False, *args), run(make, given, True, *args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


LARGE = {torch.float16: 400.0, torch.float32: 3e19, torch.float64: 1e155}
SQUARED = [(n, torch.float32, False) for n in ("Adam weight_decay", "NAdam", "RAdam", "RMSprop centered", "Adadelta")]
SQUARED += [(n, d, False) for n in ("Adam", "RMSprop") for d in LARGE if d != torch.float32]
SQUARED += [("Adam", torch.float32, True), ("RMSprop", torch.float16, True)]  # foreach Adam in float16: docs/limits.md


@pytest.mark.parametrize(("name", "dtype", "foreach"), SQUARED, ids=str)
def test_a_square_that_its_dtype_does_not_hold(name: str, dtype: torch.dtype, foreach: bool) -> None:
    (make, options), large = STOCK[name], LARGE[dtype]
    grads = [torch.tensor([1.0, large, -large], dtype=dtype)] * 2
    given = dict(options, foreach=foreach)
    args = (torch.zeros(3, dtype=dtype), grads, (None, None))
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    for want, got in zip(run(make, given, False, *args), run(make, given, True, *args), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("use_global_grad_norm", [False, True])
def test_norms_of_tiny_and_huge_updates(use_global_grad_norm: bool) -> None:
    options = dict(lr=0.1, use_global_grad_norm=use_global_grad_norm)
    for grad in (1e-42, 1e-28, 3e-23, 1e-20, 1e18, 1e30, float("inf")):
        args = (torch.linspace(1e-3, 1, 4), [torch.full((4,), grad)] * 2, (None, None))
        want, got = (run(optimizers.NpuFusedLamb, options, compiled, *args) for compiled in (False, True))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "read", [torch.max, torch.min, lambda g: torch._foreach_max([g])[0]], ids=["max", "min", "list"]
)
def test_the_largest_of_no_elements_is_an_error(read: Any) -> None:
    """As eagerly: not infinite."""
    torch._dynamo.reset()

    def update(p: Tensor, g: Tensor) -> None:
        p.sub_(g * read(g))

    with pytest.raises(RuntimeError):
        torch.compile(update, backend="npu_fused")(torch.ones(0, 3), torch.ones(0, 3))
