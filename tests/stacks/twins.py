"""A training with a compiled step beside its eager twin: the same parameters, and the report says all was fused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from tests.support.tolerances import AS_NEAR
from tests.support.training import assert_close, assert_fused, error

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
    assert_close(fused(run, patch, parameters), want, RELATIVE)


def assert_as_near(run: Callable[[Patch, torch.dtype], list[Tensor]], parameters: set[int] | None = None) -> None:
    """For models that enlarge roundings: every step is an eager one's, and the training as near to float64's.

    `run` trains as for `assert_twins`, with parameters of the dtype.
    """
    want, eager = run(left_alone, torch.float64), run(left_alone, torch.float32)
    got = fused(lambda patch: run(patch, torch.float32), step_by_step, parameters)
    ours, theirs = distance(got, want), distance(eager, want)
    assert ours <= AS_NEAR * theirs, f"{ours:.3g} from float64, the eager training {theirs:.3g}"


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Of all numbers together."""
    return float(torch.cat([(a.double() - b.double()).flatten() for a, b in zip(got, want, strict=True)]).norm())


def step_by_step(opt: Any) -> Any:
    """Compiled; each step is compared with an eager one from the same parameters, states, gradients and numbers."""
    twin = type(opt)([{**g, "params": [torch.zeros_like(p) for p in g["params"]]} for g in opt.param_groups])
    pairs = [
        (p, q)
        for g, h in zip(opt.param_groups, twin.param_groups, strict=True)
        for p, q in zip(g["params"], h["params"], strict=True)
    ]

    held: list[Tensor] = []

    def before(*_: Any) -> None:
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        for p, q in pairs:
            q.data.copy_(p)
            q.grad = None if p.grad is None else p.grad.clone()
        held[:] = [q.detach().clone() for _, q in pairs]
        twin.step()

    def after(*_: Any) -> None:
        for i, ((p, q), old) in enumerate(zip(pairs, held, strict=True)):
            assert error(p, q, old) <= RELATIVE, f"parameter {i}: error {error(p, q, old):.3g} > {RELATIVE}\n{p}\n{q}"

    npu_fuse_pass.compile_optimizer_(opt).register_step_pre_hook(before)
    opt.register_step_post_hook(after)
    return opt


def fused(run: Callable[[Patch], list[Tensor]], patch: Patch, parameters: set[int] | None) -> list[Tensor]:
    """What `run` returns with this patch; an AssertionError if not all was fused without a word."""
    npu_fuse_pass.clear_reports()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = run(patch)
    assert_all_fused({len(got)} if parameters is None else parameters)
    eager = [text for w in said if "npu_fuse" in (text := str(w.message)) and "fused=True" not in text]
    assert not eager, eager
    return got


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
