"""What the tests of the lowering share: an optimizer whose steps run through it, and one whose steps are eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.match.find import match
from npu_fuse_pass.passes.group import group
from tests.support.cases import Case
from tests.support.graphs import captured_step, step_with

SHAPES = [(4, 5), (3,), (1,), (2, 1, 6), (0, 3), (3,), (2, 3, 2, 2)]


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in params:
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return params


def set_gradients(params: Sequence[Tensor], seed: int, missing: Sequence[int] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in missing else grad


def step_both(
    ours: Any, eager: Any, step: Callable[[], Any], count: int, eager_step: Callable[[], Any] | None = None
) -> None:
    """Steps of two optimizers on the same gradients: of the first by `step`, of the second by its own or the last."""
    for k in range(count):
        for optimizer in (ours, eager):
            set_gradients(optimizer.param_groups[0]["params"], k)
        step()
        (eager_step or eager.step)()


class OnNpu:
    """Runs an optimizer's steps through the lowering, as the backend does; `kernels`: with dedicated operations."""

    def __init__(self, optimizer: Any, kernels: str = "elementwise") -> None:
        self.optimizer = optimizer
        captured = captured_step(optimizer)
        grouped = group(captured)
        found = dict(zip((g.name for g in grouped.groups), match(grouped.groups, grouped.leaves), strict=True))
        self.program = npu.Program(grouped.leaves, grouped.groups, matches=found, kernels=kernels)

    def step(self) -> None:
        step_with(self.optimizer, self.program)


def assert_same(got: Any, wanted: Any, tolerance: float) -> None:
    """Parameters and states of two optimizers."""
    for p, q in zip(got.param_groups[0]["params"], wanted.param_groups[0]["params"], strict=True):
        assert_close(p, q, tolerance)
        assert set(got.state[p]) == set(wanted.state[q])
        for name, value in wanted.state[q].items():
            assert_close(got.state[p][name], value, tolerance)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within the tolerance relative to the larger of the element and the tensor's mean size."""
    scale = torch.maximum(wanted.abs(), wanted.abs().double().mean().to(wanted.dtype)).double()
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    worst = ((got.double() - wanted.double()).abs() / scale.clamp_min(1e-30)).max() if got.numel() else 0.0
    assert worst <= tolerance, f"off by {float(worst):.2e}, allowed {tolerance:.0e}"


def twins(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return case.build(parameters(dtype)), case.build(parameters(dtype))
