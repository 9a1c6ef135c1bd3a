"""Parameters of other people's tensor classes: what an eager step makes of them, fused or with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.reasons import Code
from tests.support.training import heard

pytestmark = pytest.mark.usefixtures("afresh")
tree_map = torch.utils._pytree.tree_map_only


class Quantized(Tensor):
    """int8 values and one scale; what is written is rounded to such."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Quantized:
        made: Quantized = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, x: Tensor) -> Quantized:
        scale = x.abs().amax() / 127
        return cls((x / scale).round().to(torch.int8), scale)

    def full(self) -> Tensor:
        return self.values.float() * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return "Quantized"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        found, named = tree_map(Quantized, lambda q: q.full(), (args, kwargs or {}))
        result = func(*found, **named)
        if not func._schema.is_mutable:
            return result
        leaves = torch.utils._pytree.tree_leaves
        for before, after in zip(leaves(args), leaves(found), strict=True):
            if isinstance(before, Quantized):
                made = Quantized.of(after)
                before.values.copy_(made.values)
                before.scale.copy_(made.scale)
        return args[0] if isinstance(result, Tensor) else None


class Named(Tensor):
    """Memory of its own, and nothing else that is unusual."""


class Counting(Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counting.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Weight(torch.nn.Parameter):
    """As libraries derive theirs."""


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "quantized": lambda x: torch.nn.Parameter(Quantized.of(x)),
    "a subclass with memory": lambda x: torch.nn.Parameter(x.as_subclass(Named)),
    "with a torch function": lambda x: torch.nn.Parameter(x.as_subclass(Counting)),
    "a kind of parameter": Weight,
}
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ours": lambda ps: optimizers.NpuFusedAdamW(ps, lr=0.1),
    "torch's": lambda ps: torch.optim.AdamW(ps, lr=0.1),
}


def value(p: Tensor) -> Tensor:
    return p.data.full() if isinstance(p.data, Quantized) else p.detach().as_subclass(Tensor)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_eager_one(kind: str, maker: str) -> None:
    def trained(compiled: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,), (4, 3))]
        params = [KINDS[kind](x) for x in start]
        opt = MAKERS[maker](params)
        if compiled:
            npu_fuse_pass.compile_optimizer_(opt)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        return [value(p) for p in params]

    with heard() as said:
        pairs = list(zip(trained(True), trained(False), strict=True))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    reports = list(npu_fuse_pass.reports())
    if kind != "quantized":
        assert reports and all(r.groups and not r.unfused and not r.fallback for r in reports)
    elif reports:
        assert {x.code for r in reports for x in r.reasons} == {Code.NO_MEMORY}
    else:  # Dynamo does not trace a class that cannot be taken apart
        assert said
