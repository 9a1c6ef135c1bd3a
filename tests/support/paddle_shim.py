"""As much of `paddle` as the documents' examples use, in torch's terms."""

from __future__ import annotations

import types
from typing import Any

import torch

from optimizers import paddle as _ours


class _Tensor(torch.Tensor):
    """Paddle's backward() starts from ones, also where the tensor is not a scalar."""

    def backward(self, gradient: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        super().backward(torch.ones_like(self) if gradient is None else gradient, **kwargs)


class _Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).as_subclass(_Tensor)


def rand(shape: list[int], dtype: str = "float32") -> torch.Tensor:
    return torch.rand(shape, dtype=getattr(torch, dtype))


mean = reduce_mean = torch.mean
nn = types.SimpleNamespace(Linear=_Linear, Embedding=torch.nn.Embedding)
optimizer = types.SimpleNamespace(RMSProp=_ours.RMSProp, PiecewiseLR=_ours.PiecewiseLR)
