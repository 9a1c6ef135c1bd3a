"""The compiler's last IR, executed, computes what eager torch computes, and no further from float64 than eager does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass import rule, total
from npu_fuse_pass.backend import npu_fused
from optimizers import NpuFusedLamb
from tests.npu_kernels import steps
from tests.npu_kernels.executed import Cores, GraphBackend, RuleStep
from tests.npu_kernels.steps import ALL, OURS, STOCK, Step, parameters, set_gradients

SIZES = (1, 7, 4864, 4865, 363, 10001, *[1, 7] * 12)
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def distance(a: Tensor, b: Tensor) -> float:
    """Of two tensors, relative to the norm of the second."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm()) if b.norm() else float((a - b).norm())


def runner(opt: Any, size: int | None, blocks: int) -> tuple[Callable[[], Any], Cores]:
    """The optimizer's step by generated kernels, and what launches them."""
    if hasattr(opt, "_prelude"):
        made = RuleStep(opt, blocks, size)
        return made.step, made.cores
    torch._dynamo.reset()
    backend = GraphBackend(blocks, size)
    return torch.compile(opt.step, backend=backend), backend.cores


def run(
    step: Step,
    sizes: Sequence[int] = SIZES,
    dtype: torch.dtype = torch.float32,
    size: int | None = 4096,
    blocks: int = 40,
    times: int = 5,
    missing: Sequence[Sequence[int]] = ((),),
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Cores]:
    """Some steps by kernels, eager, and eager in float64: parameters and states of each."""
    opts = []
    for kind in (dtype, dtype, torch.float64):
        params = [torch.nn.Parameter(p.detach().to(kind)) for p in parameters(sizes, dtype)]
        opts.append((params, step.build(params)))
    call: Callable[[], Any] | None = None
    cores = Cores()
    for k in range(times):
        for params, _ in opts:
            set_gradients(params, k, missing[k % len(missing)])
            for p in params:
                if p.grad is not None and p.dtype == torch.float64:
                    p.grad = p.grad.to(dtype).double()
        if call is None:
            call, cores = runner(opts[0][1], size, blocks)
        call()
        for _, opt in opts[1:]:
            opt.step()
    if hasattr(opts[0][1], "_prelude"):
        opts[0][1]._prelude.expose_states()
    ours, eager, exact = (steps.tensors(opt) for _, opt in opts)
    assert len(ours) == len(eager) == len(exact)
    assert cores.launched
    return ours, eager, exact, cores


def assert_close(ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        # in half precision a result may round to the other neighbour where it lies between two
        near = 1e-6 if a.dtype == torch.float32 else ULP[a.dtype] / 16
        assert distance(a, b) <= near, (i, distance(a, b))
        limit = max(1.1 * distance(b, c), 2 * ULP[a.dtype])
        assert distance(a, c) <= limit, (i, distance(a, c), limit)


@pytest.mark.parametrize("step", ALL, ids=str)
def test_five_steps(step: Step) -> None:
    ours, eager, exact, _ = run(step)
    assert_close(ours, eager, exact)


def test_no_kernel_is_as_near_as_eager_for_every_single_element() -> None:
    """Adam's first moment in float64 at every step, stored in float32: nothing that stores float32 is more exact.

    It is further from float64 throughout than the bound allows for a tensor, where eager's own rounding happens to
    cancel: small tensors are compared together (`steps.joined`).
    """
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(5, 10_000, generator=generator)
    eager, stored, exact = grads[0] * 0, grads[0] * 0, grads[0].double() * 0
    for grad in grads:
        eager.lerp_(grad, 1 - 0.9)
        stored = stored.double().lerp(grad.double(), 1 - 0.9).float()
        exact.lerp_(grad.double(), 1 - 0.9)
    allowed = torch.maximum(1.1 * (eager - exact).abs(), 2 * ULP[torch.float32] * exact.abs())
    beyond = int(((stored - exact).abs() > allowed).sum())
    assert 10 <= beyond <= 1000, beyond


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("step", OURS, ids=str)
def test_half_precision(step: Step, dtype: torch.dtype) -> None:
    """A rule computes in float32 and rounds once; float64 of half-precision inputs says nothing after several steps."""
    ours, eager, _, _ = run(step, dtype=dtype, size=2048, times=3)
    for a, b in zip(ours, eager, strict=True):
        assert distance(a, b) <= ULP[dtype] / 16


HALF = ("SGD nesterov decay loop", "AdamW loop", "AdamW foreach", "Adam amsgrad decay foreach", "RMSprop loop")


@pytest.mark.parametrize("step", [s for s in STOCK if s.name in HALF], ids=str)
def test_the_casts_of_a_stock_step(step: Step) -> None:
    """A captured step rounds to bfloat16 where the graph says so, as the CPU's kernels do."""
    found = []
    for backend in (npu_fused, GraphBackend(size=2048)):
        torch._dynamo.reset()
        params = parameters(SIZES, torch.bfloat16)
        opt = step.build(params)
        compiled = torch.compile(opt.step, backend=backend)
        for k in range(2):
            set_gradients(params, k)
            compiled()
        found.append(steps.tensors(opt))
    apart = torch.cat([(a != b).detach() for a, b in zip(*found, strict=True)])
    assert apart.double().mean() < 1e-3  # an fma's last bit, where that decides which neighbour is nearer
    assert all(distance(a, b) <= ULP[torch.bfloat16] / 16 for a, b in zip(*found, strict=True) if a.numel() > 100)


CHOSEN = [s for s in OURS if s.name in ("adamw", "lamb", "lamb_global", "lion")]


@pytest.mark.parametrize("step", CHOSEN, ids=str)
def test_gradients_are_missing_now_and_then(step: Step) -> None:
    ours, eager, exact, _ = run(step, missing=((), (0, 3), (1, 2), (5,), ()))
    assert_close(ours, eager, exact)


@pytest.mark.parametrize("step", CHOSEN, ids=str)
def test_bits_do_not_depend_on_the_number_of_cores(step: Step) -> None:
    results = [run(step, sizes=(9000, 1, 20001, 700), size=1024, blocks=blocks, times=2)[0] for blocks in (1, 3, 40)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("step", "launches"), [("adamw", 1), ("lamb", 2), ("lamb_global", 3)])
def test_any_number_of_tensors_is_as_many_launches(step: str, launches: int) -> None:
    chosen = next(s for s in OURS if s.name == step)
    for count in (1, 200):
        sizes = [1 + 37 * k % 501 for k in range(count)]
        ours, eager, exact, cores = run(chosen, sizes, times=2)
        assert len(cores.launched) == 2 * launches
        assert_close(ours, eager, exact)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["adamw", "lamb", "lamb_global"])
def test_a_thousand_tensors(step: str) -> None:
    ours, eager, exact, _ = run(
        next(s for s in OURS if s.name == step), [1 + 37 * k % 2048 for k in range(1000)], times=2
    )
    assert_close(ours, eager, exact)


def test_a_total_over_groups_and_dtypes() -> None:
    """Members of two groups in two dtypes add to one total, or each parameter group to its own."""
    found = []
    for compiled in (True, False):
        wide, half = parameters((9000, 1, 5363)), parameters((4865, 7), torch.bfloat16, seed=1)
        other = parameters((5000, 3), seed=2)
        groups: list[dict[str, Any]] = [{"params": [*wide, *half]}, {"params": other, "lr": 0.01}]
        opt = NpuFusedLamb(groups, lr=0.02, use_global_grad_norm=True)
        set_gradients([*wide, *other], 0)
        set_gradients(half, 1)
        if compiled:
            made = RuleStep(opt, blocks=7, size=1024)
            made.step()
            assert len(made.cores.launched) == 3 * len(made.groups) >= 6
        else:
            opt.step()
        opt._prelude.expose_states()
        found.append(steps.tensors(opt))
    for a, b in zip(*found, strict=True):
        assert distance(a, b) <= (1e-6 if a.dtype == torch.float32 else ULP[a.dtype] / 16)


@pytest.mark.parametrize("read", [False, True], ids=["no total", "the first one"])
def test_a_total_that_nobody_reads(read: bool) -> None:
    """Chunks add to it where nothing else lies."""
    sums = {"squares": total(lambda grad: (grad * grad).sum()), "others": total(lambda grad: grad.abs().sum())}

    def scaled(param: Tensor, grad: Tensor, *, lr: Tensor, squares: Tensor, others: Tensor) -> Tensor:
        return param - lr * grad / (1 + squares if read else 1)

    made = rule(defaults={"lr": 0.1}, totals=sums)(scaled)
    params, twins = parameters((2049, 7, 363)), parameters((2049, 7, 363))
    opt, twin = made(params), made(twins)
    for k in range(3):
        set_gradients(params, k)
        set_gradients(twins, k)
        if not k:
            step = RuleStep(opt, size=1024)
            (cluster, _), *others = step._program._clusters
            assert cluster._terms.shape == (2, 5) and not others
        step.step()
        twin.step()
    assert all(distance(a, b) <= 1e-6 for a, b in zip(params, twins, strict=True))
    assert len(step.cores.launched) == (6 if read else 3)  # without one, the pass that adds up writes as well


def test_what_a_parameter_without_elements_adds_to_a_total() -> None:
    """Not all that is added is 0 where there is nothing to sum."""

    def scaled(param: Tensor, grad: Tensor, *, lr: Tensor, count: Tensor) -> Tensor:
        return param - lr * grad * count

    made = rule(defaults={"lr": 0.1}, totals={"count": total(lambda grad: (grad * grad).sum() + 1)})(scaled)
    params, twins = parameters((2049, 0, 7)), parameters((2049, 0, 7))
    opt, twin = made(params), made(twins)
    for k in range(3):
        set_gradients(params, k, (1,) if k == 1 else ())
        set_gradients(twins, k, (1,) if k == 1 else ())
        if not k:
            step = RuleStep(opt, size=1024)
        step.step()
        twin.step()
    assert all(distance(a, b) <= 1e-6 for a, b in zip(params, twins, strict=True))
    assert len(step.cores.launched) == 9  # sums, what members add, the update


def test_masks_in_memory() -> None:
    """Tensors of bool are read and written, one byte for each element."""
    found, backend = [], GraphBackend(size=1024)
    for chosen in (backend, None):
        torch._dynamo.reset()
        params = [p.detach() for p in parameters((2049, 7, 363))]
        masks = [p > 0.5 for p in params]

        def step(grads: list[Tensor]) -> None:
            for p, mask, g in zip(params, masks, grads, strict=True):  # noqa: B023
                p.copy_(torch.where(mask, p + g, p - g))
                mask.logical_xor_(g > p)

        call = step if chosen is None else torch.compile(step, backend=chosen, fullgraph=True)
        for k in range(3):
            call([p.detach() for p in parameters((2049, 7, 363), seed=1 + k)])
        found.append([*params, *masks])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(backend.cores.launched) == 3
