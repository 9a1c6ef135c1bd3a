"""Clipping by the norm of all gradients, a step, an average of parameters: two launches, the bytes of the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.ir.totals import total_slots
from npu_fuse_pass.lowerings.kernels.sweeps import schedule
from npu_fuse_pass.lowerings.npu.kernels.final_ir import facts
from tests.npu_kernels.compiler import final_ir
from tests.npu_kernels.executed import GraphBackend
from tests.npu_kernels.steps import parameters, set_gradients
from tests.npu_kernels.test_executed import assert_close, distance

SIZES = (9000, 1, 363, 20001)


def momentum(params: list[Any], grads: list[Any], states: list[list[Any]]) -> None:
    torch._foreach_mul_(states[0], 0.9)
    torch._foreach_add_(states[0], grads)
    torch._foreach_add_(params, states[0], alpha=-0.1)


def second_moment(params: list[Any], grads: list[Any], states: list[list[Any]]) -> None:
    torch._foreach_lerp_(states[0], grads, 0.1)
    torch._foreach_mul_(states[1], 0.99)
    torch._foreach_addcmul_(states[1], grads, grads, 0.01)
    roots = torch._foreach_sqrt(states[1])
    torch._foreach_add_(roots, 1e-3)
    torch._foreach_addcdiv_(params, states[0], roots, -0.01)


def normalized(params: list[Any], grads: list[Any], states: list[list[Any]]) -> None:
    """By the norm of what has been clipped: a total that depends on a total."""
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(states[0], 0.9)
    torch._foreach_add_(states[0], torch._foreach_div(grads, [norm + 1e-3] * len(grads)))
    torch._foreach_add_(params, states[0], alpha=-0.1)


UPDATES = {"momentum": momentum, "second moment": second_moment}


def train(dtype: torch.dtype, backend: Any, update: Any) -> list[torch.Tensor]:
    torch._dynamo.reset()
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(SIZES)]
    averages, *states = ([p.detach().clone() for p in params] for _ in range(3))
    for state in (t for several in states for t in several):
        state.abs_()

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        with torch.no_grad():
            update(params, [p.grad for p in params], states)
            torch._foreach_lerp_(averages, params, 0.1)

    call = tail if backend is None else torch.compile(tail, backend=backend, fullgraph=True)
    for k in range(3):
        set_gradients(params, k)
        for p in params:
            p.grad = p.grad.float().to(dtype)
        call()
    return [*params, *averages, *states[0]]


@pytest.mark.parametrize("name", UPDATES)
def test_two_launches(name: str) -> None:
    backend = GraphBackend(size=2048)
    ours, eager, exact = (train(d, b, UPDATES[name]) for d, b in (
        (torch.float32, backend), (torch.float32, None), (torch.float64, None),
    ))  # fmt: skip
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert distance(a, b) <= 1e-6
        assert distance(a, c) <= max(1.1 * distance(b, c), 8 * 2.0**-23)
    grouped, (found,) = backend.captured[-1], backend.groups[-1:]
    assert [(k.over, k.round) for k in found.kernels.launches] == [("chunks", 0), ("chunks", None)]
    slots = total_slots(grouped.groups, grouped.leaves)
    assert found.kernels.bytes_per_element == sum(schedule(found.group.formula, slots[0]).bytes)


def test_a_total_of_a_total_is_one_more_launch() -> None:
    backend = GraphBackend()
    ours, eager, exact = (train(d, b, normalized) for d, b in (
        (torch.float32, backend), (torch.float32, None), (torch.float64, None),
    ))  # fmt: skip
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert distance(a, b) <= 1e-6
        assert distance(a, c) <= max(1.1 * distance(b, c), 8 * 2.0**-23)
    (found,) = backend.groups[-1:]
    assert [(k.over, k.round) for k in found.kernels.launches] == [("chunks", 0), ("chunks", 1), ("chunks", None)]
    # gradients, gradients again; then they, parameters, averages and momentum, of which all are written
    assert found.kernels.bytes_per_element == 4 + 4 + 8 * 4
    for kernel in found.kernels.launches:
        read = facts(final_ir(kernel.text))
        assert read.bytes_per_element == kernel.bytes_per_element and read.double_buffered


def test_what_members_add_to_a_total_of_a_total() -> None:
    """In bfloat16 each norm of a norm is rounded, as the CPU's kernels do."""
    backend = GraphBackend(size=2048)
    ours, wanted = (train(torch.bfloat16, b, normalized) for b in (backend, npu_fused))
    assert [(k.over, k.round) for k in backend.groups[-1].kernels.launches] == [
        ("chunks", 0), ("members", 0), ("chunks", 1), ("members", 1), ("chunks", None),
    ]  # fmt: skip
    assert all(distance(a, b) <= 2.0**-7 / 16 for a, b in zip(ours, wanted, strict=True) if a.numel() > 100)


@pytest.mark.parametrize("update", [second_moment, normalized])
def test_bits_do_not_depend_on_the_number_of_cores(update: Any) -> None:
    results = [train(torch.float32, GraphBackend(blocks, 1024), update) for blocks in (1, 3, 40)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("of_first", [True, False], ids=["first", "last"])
def test_a_number_where_others_have_a_total(of_first: bool) -> None:
    """Of parameters that all add to a total, one reads a number in its place."""
    found, backend = [], GraphBackend(size=1024)
    for kind, chosen in ((torch.float32, backend), (torch.float32, None), (torch.float64, None)):
        torch._dynamo.reset()
        params = [p.detach().to(kind) for p in parameters((2049, 7, 363))]
        factor = torch.tensor(0.25, dtype=kind)

        def step(grads: list[Any]) -> None:
            total = torch.stack([(g * g).sum() for g in grads]).sum()
            for k, (p, g) in enumerate(zip(params, grads, strict=True)):  # noqa: B023
                p.sub_(g * (factor if k == (0 if of_first else 2) else total))  # noqa: B023

        call = step if chosen is None else torch.compile(step, backend=chosen, fullgraph=True)
        leaves = [torch.nn.Parameter(p.float()) for p in params]
        for k in range(3):
            set_gradients(leaves, k)
            call([p.grad.to(kind) / 64 for p in leaves if p.grad is not None])
        found.append(params)
    assert_close(*found)
    assert sorted(len(made.group.members) for made in backend.groups) == [1, 2]
