"""Whole tensors in another shape: no operation of their own where that is right, left as they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from tests.support.training import assert_fused
from tests.unit.tensors.test_stacked import LR, run

Update = Callable[[list[Tensor], list[Tensor]], None]


def orthogonal(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        w, g = p.reshape(-1).to(dtype=p.dtype), grad.flatten()
        across = g.sub(w * torch.dot(w, g).div_(torch.dot(w, w).add_(1e-12)))
        norm = across.norm(2)
        across.masked_fill_(norm <= 1e-6 * g.norm(2), 0.0)
        across.mul_(g.norm(2) / norm.add_(1e-12))
        grad.copy_(across.view_as(grad))
        p.sub_(grad * torch.linalg.norm(grad), alpha=LR)


def more_dimensions(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.sub_((g.unsqueeze(0).abs() + p.unsqueeze(0)).squeeze(0), alpha=LR)


def matrix_norm(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.sub_(g * torch.linalg.norm(g, 1), alpha=LR)  # of a matrix: the largest column's


def a_view_is_written(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        g.view(-1, 1).mul_(3.0)  # the gradient sees it
        p.sub_(g, alpha=LR)


def its_tensor_is_written(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        flat = g.view(-1, 1)
        g.mul_(3.0)  # the view sees it
        p.sub_(flat.view_as(p), alpha=LR)


def a_tensor_of_that_shape_is_met(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.sub_((g.reshape(-1, 1) * torch.arange(1.0, g.numel() + 1).reshape(-1, 1)).view_as(p), alpha=LR)


def rows_of_the_view(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.sub_(g * g.reshape(1, -1).cumsum(1).max() + g.reshape(1, -1).sum(0).sum(), alpha=LR)


def another_order(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.sub_(g.t().reshape(p.shape), alpha=LR)


@pytest.mark.parametrize("update", [orthogonal, more_dimensions, a_view_is_written, its_tensor_is_written])
def test_a_whole_view_is_the_tensor(update: Update) -> None:
    want, got = run(update, False, torch.float64), run(update, True, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=4e-6)
    assert_fused(npu_fuse_pass.reports()[-1], parameters=4)


@pytest.mark.parametrize("update", [a_tensor_of_that_shape_is_met, rows_of_the_view, another_order, matrix_norm])
def test_what_is_another_tensor_is_left_to_torch(update: Update) -> None:
    want, got = run(update, False, torch.float64), run(update, True, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=4e-6)
    assert npu_fuse_pass.reports()[-1].reasons
    if update is a_tensor_of_that_shape_is_met:  # around it all is fused
        assert npu_fuse_pass.reports()[-1].fallback is None
