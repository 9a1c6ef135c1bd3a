"""What the tests of layouts share: tensors that are adjacent in memory, an optimizer compiled beside an eager one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from steps import assert_close
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused

SHAPES = ((4, 5), (3,), (), (2, 1, 6), (3,))
Parameters = list[torch.nn.Parameter]


def shapes(count: int) -> list[tuple[int, ...]]:
    return list(itertools.islice(itertools.cycle(SHAPES), count))


def adjacent(like: Sequence[tuple[int, ...]], seed: int, order: Sequence[int] = ()) -> list[Tensor]:
    """Random tensors of these shapes, one behind the other in one buffer, in this order if one is given."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator) for s in like]
    buffer, offset = torch.empty(sum(v.numel() for v in values)), 0
    found: dict[int, Tensor] = {}
    for i in order or range(len(values)):
        found[i] = buffer[offset : offset + values[i].numel()].view(values[i].shape).copy_(values[i])
        offset += values[i].numel()
    return [found[i] for i in range(len(values))]


def flat_parameters(count: int) -> Parameters:
    return [torch.nn.Parameter(t) for t in adjacent(shapes(count), 0)]


class Twins:
    """An optimizer of ours whose step is compiled for an NPU, and the same one, eager."""

    def __init__(
        self,
        make: Callable[[Parameters], Any],
        parameters: Callable[[], Parameters],
        strict: bool = True,
        **options: Any,
    ) -> None:
        self.both = parameters(), parameters()
        self.ours, self.eager = (make(p) for p in self.both)
        options = {"platform": "npu", "strict": strict, **options}
        npu_fuse_pass.clear_reports()
        self._step = torch.compile(self.ours.step, backend=npu_fused, options=options)
        self._recording = harness.Recording()

    @property
    def graphs(self) -> list[harness.GeGraph]:
        """Those that GE has been given."""
        return self._recording.graphs

    def change(self, function: Callable[[Any, Parameters], object]) -> None:
        """Do something to both optimizers and their parameters."""
        for optimizer, params in zip((self.ours, self.eager), self.both, strict=True):
            function(optimizer, params)

    def step(
        self,
        seed: int,
        order: Sequence[int] | None = None,
        missing: Sequence[int] = (),
        change: Callable[[Any, Parameters], object] = lambda *_: None,
    ) -> None:
        """One step; gradients are adjacent if an order is given, and changed before it. Then both must be the same."""
        for params in self.both:
            like = [tuple(p.shape) for p in params]
            for i, (p, g) in enumerate(zip(params, adjacent(like, seed, order or ()), strict=True)):
                grad = (g if order is not None else g.clone()).to(p.dtype)
                p.grad = None if i in missing or not p.requires_grad else grad
        self.change(change)
        with harness.record() as graphs:
            self._step()
        self._recording.graphs += graphs.graphs
        self.eager.step()
        self.compare()

    def compare(self) -> None:
        """All parameters and states of both."""
        for p, q in zip(*self.both, strict=True):
            assert_close(p, q, 1e-6)
            assert set(self.ours.state[p]) == set(self.eager.state[q])
            for name, value in self.eager.state[q].items():
                assert_close(self.ours.state[p][name], value, 1e-6)

    def nodes(self) -> int:
        """Compute operations of the newest graph."""
        return len(self.graphs[-1].compute_ops())

    @property
    def rows(self) -> list[Any]:
        """Rows of the newest report."""
        return npu_fuse_pass.reports()[-1].groups

    @property
    def row(self) -> Any:
        (row,) = self.rows
        return row
