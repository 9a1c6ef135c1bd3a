"""Lets torch_npu's own Python (its GradScaler, its fused optimizers) run on CPU tensors.

Only leaves are replaced: what asks the driver, what moves a tensor to a device, and what re-homes a tensor in another
one's memory. The arithmetic, the decisions and the layout of states are the wheel's code.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

OPTIMIZERS = ("base", "adam", "adamw", "lamb", "rmsprop_tf", "sgd")


def rehome(t: Tensor, memory: Tensor, offset: int) -> None:
    """torch_npu.npu_change_data_ptr: `t` lies in `memory` from now on."""
    t.data = memory[offset : offset + t.numel()].view(t.shape)


def combine(tensors: Sequence[Tensor]) -> Tensor | None:
    """torch_npu.utils.npu_combine_tensors, without its check that the tensors are on an NPU."""
    if not tensors:
        return None
    memory = torch.cat([t.detach().reshape(-1) for t in tensors])
    offset = 0
    for t in tensors:
        rehome(t, memory, offset)
        offset += t.numel()
    return memory


def pretend(patch: pytest.MonkeyPatch) -> Any:
    """CPU tensors pass for NPU tensors in torch_npu's Python; returns torch_npu."""
    harness.prepare()
    import torch_npu

    # A process's first compile loads torch_npu.npu once more, as torch.npu, and puts that in its place: not later.
    torch.compile(torch.neg, backend="eager")(torch.ones(1))
    for kind in OPTIMIZERS:
        name = "optim_base" if kind == "base" else kind
        patch.setattr(importlib.import_module(f"torch_npu.optim.npu_fused_{name}"), "npu_combine_tensors", combine)
    to = Tensor.to
    patch.setattr(Tensor, "to", lambda t, *a, **k: t if a[:1] == ("npu",) else to(t, *a, **k))
    for name in ("npu", "pin_memory"):
        patch.setattr(Tensor, name, lambda t: t, raising=False)
    patch.setattr(Tensor, "is_npu", property(lambda t: True), raising=False)
    patch.setattr(torch_npu, "get_npu_format", lambda t: 2)
    patch.setattr(torch_npu, "npu_format_cast", lambda t, kind: t)
    patch.setattr(torch_npu, "get_storage_size", Tensor.numel)
    patch.setattr(torch_npu, "npu_change_data_ptr", rehome)
    patch.setattr(torch_npu.npu.utils, "is_support_inf_nan", lambda: True)
    scaler = torch_npu.npu.amp.GradScaler.__init__.__globals__
    patch.setitem(scaler, "amp_definitely_not_available", lambda: False)
    return torch_npu
