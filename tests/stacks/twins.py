"""A training with a compiled step beside its eager twin: the same parameters, and the report says all was fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import npu_fuse_pass
import optimizers

from ..support import assert_close, assert_fused

RELATIVE = 1e-6
MAKERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "NpuFusedAdamW": lambda params: optimizers.NpuFusedAdamW(params, lr=1e-2),
}

Patch = Callable[[Any], Any]


def left_alone(opt: Any) -> Any:
    return opt


def step_compiled(opt: Any) -> Any:
    """`compile_step` in the place of `opt.step`."""
    opt.step = npu_fuse_pass.compile_step(opt)
    return opt


def assert_twins(
    run: Callable[[Patch], list[Tensor]],
    patch: Patch = npu_fuse_pass.compile_optimizer_,
    parameters: set[int] | None = None,
) -> None:
    """`run` trains from the same start each time, with what it is given as a user's call, and returns parameters.

    `parameters`: how many each of its optimizers has; otherwise all that are returned.
    """
    want = run(left_alone)
    assert all(bool(t.isfinite().all()) for t in want)
    npu_fuse_pass.clear_reports()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = run(patch)
    assert_close(got, want, RELATIVE)
    assert_all_fused({len(want)} if parameters is None else parameters)
    eager = [text for w in said if "npu_fuse" in (text := str(w.message)) and "fused=True" not in text]
    assert not eager, eager


def assert_all_fused(parameters: set[int]) -> None:
    """Whatever was compiled was fused, for optimizers with these numbers of parameters."""
    updates = [sum(group.updates for group in report.groups) for report in npu_fuse_pass.reports()]
    assert set(updates) == parameters, updates
    for report, count in zip(npu_fuse_pass.reports(), updates, strict=True):
        assert_fused(report, parameters=count)


def small_model() -> torch.nn.Module:
    """Two layers, the same at every call."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def samples(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=generator), torch.randn(3, generator=generator)) for _ in range(count)]


def batches(count: int = 4) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(samples(2 * count), batch_size=2)  # type: ignore[arg-type]


def trained(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]
