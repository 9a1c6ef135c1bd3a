"""Numbers of several parameters in one vector: read entry by entry where that is right, left as they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from tests.support.training import assert_fused

LR = 0.1
Lists = tuple[list[Tensor], list[Tensor]]


def trust_ratios(params: list[Tensor], grads: list[Tensor]) -> None:
    p_norms = torch.stack(torch._foreach_norm(params)).clamp_(max=10.0)
    g_norms = torch.stack(torch._foreach_norm(grads))
    usable = (p_norms > 0.0) & (g_norms > 0.0)
    ratios = torch.where(usable, p_norms, 1.0) / torch.where(usable, g_norms, 1.0)
    torch._foreach_mul_(grads, ratios.unbind())
    torch._foreach_add_(params, grads, alpha=-LR)


def step_sizes(params: list[Tensor], grads: list[Tensor]) -> None:
    sizes = (1.0 - torch.tensor([0.1 * (i + 1) for i in range(len(params))])).mul_(LR)
    torch._foreach_addcmul_(params, grads, sizes.neg().unbind(0))


def largest_norm(params: list[Tensor], grads: list[Tensor]) -> None:
    norms = torch.stack([g.norm() for g in grads]).float().square_()
    whole = norms.sum().reshape(1)
    for p, g, scale in zip(params, grads, [2.0 / (norms + 1.0)[i] for i in range(len(params))], strict=True):
        p.sub_(g * scale * torch.rsqrt(whole + 1.0).reshape(()), alpha=LR)


def norm_of_one_element(params: list[Tensor], grads: list[Tensor]) -> None:
    norm = torch.stack([n.to(n.device) for n in torch._foreach_norm(grads)]).square_().sum().reshape(1)
    norm.sqrt_().squeeze_(0).add_(1e-12)  # the tensor itself has no dimension from here on
    torch._foreach_sub_(params, torch._foreach_mul(grads, LR / norm))
    for p, scale in zip(
        params, [norm.unsqueeze(0), norm.view(1, 1).flatten(), norm.reshape(1).squeeze(), norm], strict=True
    ):
        p.add_(p * scale)


def more_dimensions_than_the_tensors(params: list[Tensor], grads: list[Tensor]) -> None:
    norm = torch.stack(torch._foreach_norm(grads)).sum().reshape(1, 1, 1)
    for p, g in zip(params, grads, strict=True):
        p.sub_((g * norm).sum(0).sum(0) * LR)  # of shape (1, 1, n), then (n,)


def the_base_of_a_squeezed_view_is_read(params: list[Tensor], grads: list[Tensor]) -> None:
    whole = torch.stack(torch._foreach_norm(grads)).sum()
    whole.reshape(1).squeeze_(0).mul_(LR)  # the number sees it
    torch._foreach_sub_(params, torch._foreach_mul(grads, whole))


def taken_before_a_write(params: list[Tensor], grads: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm(grads))
    entries = norms.unbind()
    norms.mul_(3.0)  # the entries see it
    torch._foreach_addcmul_(params, grads, [e.expand(g.shape) for e, g in zip(entries, grads, strict=True)], value=-LR)


def an_entry_is_written(params: list[Tensor], grads: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm(grads))
    norms[0].fill_(5.0)  # the vector sees it
    torch._foreach_sub_(params, torch._foreach_mul(grads, (norms * LR).unbind()))


def a_clone_is_written(params: list[Tensor], grads: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_sub_(params, torch._foreach_mul(grads, norms.clone().mul_(LR).unbind()))
    torch._foreach_sub_(params, torch._foreach_mul(grads, norms.unbind()))


def a_vector_of_its_own(params: list[Tensor], grads: list[Tensor]) -> None:
    norms = torch.stack(torch._foreach_norm(grads)) * torch.arange(1.0, 5.0)
    torch._foreach_sub_(params, torch._foreach_mul(grads, (norms * LR).unbind()))


def the_view_is_written(params: list[Tensor], grads: list[Tensor]) -> None:
    whole = torch.stack(torch._foreach_norm(grads)).sum()
    whole.reshape(1).mul_(LR)  # the number sees it
    torch._foreach_sub_(params, torch._foreach_mul(grads, whole))


class Stepped(torch.optim.Optimizer):
    def __init__(self, params: Any, update: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        super().__init__(params, {})
        self.update = update

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        params = self.param_groups[0]["params"]
        self.update(params, [p.grad for p in params])


def run(update: Callable[[list[Tensor], list[Tensor]], None], compiled: bool, dtype: torch.dtype) -> list[Tensor]:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3, 4), (5,), (2, 3), (7,))]
    opt = Stepped([torch.nn.Parameter(p) for p in params], update)
    step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
    for _ in range(2):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        step()
    return [p.detach() for p in opt.param_groups[0]["params"]]


@pytest.mark.parametrize("update", [trust_ratios, step_sizes, largest_norm, a_clone_is_written, norm_of_one_element])
def test_entry_by_entry(update: Callable[[list[Tensor], list[Tensor]], None]) -> None:
    want, got = run(update, False, torch.float64), run(update, True, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    assert_fused(npu_fuse_pass.reports()[-1], parameters=4)


LEFT = [
    taken_before_a_write,
    an_entry_is_written,
    a_vector_of_its_own,
    the_view_is_written,
    the_base_of_a_squeezed_view_is_read,
]


def test_more_dimensions_than_the_tensors() -> None:
    want, got = (run(more_dimensions_than_the_tensors, *how) for how in ((False, torch.float64), (True, torch.float32)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.reasons


@pytest.mark.parametrize("update", LEFT)
def test_what_torch_sees_through_views_is_left_to_torch(update: Callable[[list[Tensor], list[Tensor]], None]) -> None:
    want, got = run(update, False, torch.float64), run(update, True, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
    assert npu_fuse_pass.reports()[-1].reasons
    if update is a_vector_of_its_own:  # around it all is fused
        assert npu_fuse_pass.reports()[-1].fallback is None
