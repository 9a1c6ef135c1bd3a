"""0-dim states that follow from tensors: kernels read them, and write them last, once for each member."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.lowerings.npu.kernels.final_ir import facts
from npu_fuse_pass.lowerings.npu.program import Program
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.reasons import Code
from tests.npu_kernels.compiler import final_ir
from tests.npu_kernels.executed import Cores, GraphBackend
from tests.npu_kernels.steps import joined, parameters, set_gradients
from tests.npu_kernels.test_executed import SIZES, ULP, assert_close, distance
from tests.npu_kernels.test_races import Watched
from tests.support.graphs import traced

List = list[Any]


def layerwise(params: List, grads: List, s: dict[str, List]) -> None:
    """NovoGrad's second moment: one number for each parameter."""
    squares = torch._foreach_pow(torch._foreach_norm(grads), 2)
    torch._foreach_lerp_(s["v"], squares, 0.1)
    roots = torch._foreach_sqrt(s["v"])
    torch._foreach_add_(roots, 1e-3)
    torch._foreach_mul_(s["m"], 0.9)
    torch._foreach_add_(s["m"], torch._foreach_div(grads, roots))
    torch._foreach_add_(params, s["m"], alpha=-0.01)


def several(params: List, grads: List, s: dict[str, List]) -> None:
    """Three states, which read each other's old and new values; one only counts where the gradient is finite."""
    for p, g, m, v, peak, count in zip(params, grads, s["m"], s["v"], s["peak"], s["count"], strict=True):
        largest, square = g.abs().amax(), (g * g).sum()
        finite = torch.isfinite(square)
        after = torch.where(finite, count + 1, count)
        old = v.clone()
        v.copy_(torch.where(finite, 0.9 * v + 0.1 * square / (1 + peak), v))
        peak.copy_(torch.where(finite, torch.maximum(0.95 * peak, largest) + 0.001 * old, peak))
        count.copy_(after)
        new = 0.9 * m + g / (torch.sqrt(v) + 1e-3)
        m.copy_(torch.where(finite, new, m))
        p.copy_(torch.where(finite, p - 0.01 * new / (1 - 0.9**after) / (1 + peak), p))


def of_all(params: List, grads: List, s: dict[str, List]) -> None:
    """The states follow from a total over all gradients."""
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_lerp_(s["v"], [norm] * len(grads), 0.1)
    torch._foreach_addcdiv_(params, grads, [v + 1e-3 for v in s["v"]], value=-0.01)


def skipped(params: List, grads: List, s: dict[str, List]) -> None:
    """Adam whose counters advance unless a gradient is infinite, as torch's fused step on a device has it."""
    found, scale = s["found"][0], s["scale"][0]
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, scale)
    for p, g, m, sq, count in zip(params, grads, s["m"], s["sq"], s["count"], strict=True):
        count.copy_(torch.where(found != 0, count, count + 1))
        new_m, new_sq = 0.9 * m + 0.1 * g, 0.999 * sq + 0.001 * g * g
        size = torch.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        m.copy_(torch.where(found != 0, m, new_m))
        sq.copy_(torch.where(found != 0, sq, new_sq))
        p.copy_(torch.where(found != 0, p, p - 0.01 * size * new_m / (new_sq.sqrt() + 1e-3)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A step, its bytes for each element, its launches over chunks before that over members; if it skips some steps."""

    update: Callable[[List, List, dict[str, List]], None]
    bytes: int
    passes: int

    skips: bool = False

    def __str__(self) -> str:
        return self.update.__name__


# a pass that reads gradients, then one that reads and writes what is updated
CASES = [
    Case(layerwise, 4 + 20, 2),
    Case(several, 4 + 20, 2, True),
    Case(of_all, 4 + 12, 2),
    Case(skipped, 4 + 32, 2, True),
]


def train(
    case: Case,
    backend: Any,
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = SIZES,
    times: int = 4,
    infinite: int | None = None,
) -> list[Tensor]:
    """Parameters and states after some steps; an element of the first gradient is infinite at step `infinite`."""
    torch._dynamo.reset()
    params = [p.to(dtype) for p in (p.detach() for p in parameters(sizes))]
    leaves = [torch.nn.Parameter(p) for p in params]
    s: dict[str, List] = {name: [torch.zeros((), dtype=dtype) for _ in sizes] for name in ("v", "peak", "count")}
    s |= {name: [torch.zeros_like(p) for p in params] for name in ("m", "sq")}
    s |= {"found": [torch.zeros(())], "scale": [torch.tensor(0.5)]}

    def step(grads: List) -> None:
        case.update(params, grads, s)

    call = step if backend is None else torch.compile(step, backend=backend, fullgraph=True)
    for k in range(times):
        set_gradients(leaves, k)
        grads = [p.grad.float().to(dtype) for p in leaves]
        if k == infinite:
            grads[0][0] = torch.inf
        s["found"][0].zero_()
        call(grads)
    return [t.clone() for t in joined(params, *(s[name] for name in ("m", "sq", "v", "peak", "count", "found")))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_steps(case: Case) -> None:
    backend = GraphBackend()
    kinds = ((backend, torch.float32), (None, torch.float32), (None, torch.float64))
    ours, eager, exact = (train(case, b, d) for b, d in kinds)
    assert_close(ours, eager, exact)
    found = [made for made in backend.groups if made.kernels.slots]
    made = found[-1]
    assert [k.over for k in made.kernels.launches] == ["chunks"] * case.passes + ["members"]
    assert made.kernels.bytes_per_element == case.bytes
    for kernel in made.kernels.launches:
        read = facts(final_ir(kernel.text))
        assert read.double_buffered
        assert kernel.over == "members" or read.bytes_per_element == kernel.bytes_per_element
        assert (kernel.over == "members") == any(p.kind == "new" for p in kernel.pointers)  # nobody else writes states


@pytest.mark.parametrize("case", [c for c in CASES if c.skips], ids=str)
def test_a_step_that_is_skipped(case: Case) -> None:
    kinds = ((GraphBackend(size=1024), torch.float32), (None, torch.float32), (None, torch.float64))
    ours, eager, exact = (train(case, b, d, infinite=2) for b, d in kinds)
    assert_close(ours, eager, exact)
    count = len(SIZES)
    assert ours[-2].tolist() == ([3.0] * count if case.update is skipped else [3.0] + [4.0] * (count - 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_number_of_cores(case: Case) -> None:
    results = [train(case, GraphBackend(blocks, 1024), sizes=(9000, 1, 20001, 700)) for blocks in (1, 3, 40)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """States are stored in half precision, too; the CPU's kernels round what is read from them where torch does."""
    sizes = [n for n in SIZES if n > 100]
    ours, wanted = (train(case, b, dtype, sizes) for b in (GraphBackend(size=1024), npu_fused))
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        assert distance(a, b) <= ULP[dtype] / (16 if a.numel() > 100 else 1), i  # one of few may lie between two


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_race_in_a_core(case: Case) -> None:
    backend = GraphBackend()
    backend.cores = watched = Watched(lambda text: text, 1024)
    train(case, backend, sizes=(9000, 700, 1, 33), times=1)
    assert {kernel.over for kernel, _ in watched.seen} == {"chunks", "members"}
    for kernel, races in watched.seen:
        assert not races.found and not races.left, (kernel.name, races.found, races.left)


def test_a_parameter_without_dimensions() -> None:
    """Clipped by the norm of all gradients, its new value and its momentum follow from tensors."""
    found, backend = [], GraphBackend(size=1024)
    for kind, chosen in ((torch.float32, backend), (torch.float32, None), (torch.float64, None)):
        torch._dynamo.reset()
        params = [*(p.detach().to(kind) for p in parameters((9000, 7))), torch.tensor(1.5, dtype=kind)]
        momenta = list(map(torch.zeros_like, params))

        def step(grads: List) -> None:
            norm = torch.nn.utils.get_total_norm(grads)
            torch._foreach_mul_(momenta, 0.9)  # noqa: B023
            torch._foreach_add_(momenta, torch._foreach_div(grads, [norm + 1e-3] * len(grads)))  # noqa: B023
            torch._foreach_add_(params, momenta, alpha=-0.1)  # noqa: B023

        call = step if chosen is None else torch.compile(step, backend=chosen, fullgraph=True)
        leaves = [torch.nn.Parameter(p.float()) for p in params]
        for k in range(3):
            set_gradients(leaves, k)
            call([p.grad.to(kind) for p in leaves if p.grad is not None])
        found.append([*params, *momenta])
    assert_close(*found)
    alone = [made for made in backend.groups if not made.kernels.slots]
    assert alone and all([k.over for k in made.kernels.launches][-1] == "members" for made in alone)


def one_number(p: Any, g: Any, q: Any, h: Any, v: Any, w: Any) -> None:
    """Two parameters, each with a state that keeps its norm."""
    for param, grad, state in ((p, g, v), (q, h, w)):
        state.copy_(0.9 * state + (grad * grad).sum())
        param.sub_(grad / (state.sqrt() + 1))


def test_who_is_left_out_keeps_its_state() -> None:
    examples = [torch.rand(5000), torch.rand(5000), torch.rand(0), torch.rand(0), torch.tensor(1.0), torch.tensor(2.0)]
    grouped = group(capture(traced(one_number, *examples)))
    cores = Cores(chunk=1024)
    program = Program(grouped.leaves, grouped.groups, hardware=cores)
    values: list[Any] = [t.clone() for t in examples]
    program(values, complete=True)
    wanted = [t.clone() for t in examples]
    one_number(*wanted)
    for a, b in zip(values, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert float(wanted[5]) == pytest.approx(1.8)  # that of a parameter without elements, too
    before, values[1] = [t.clone() for t in values], None
    versions = values[4]._version, values[5]._version
    program(values, complete=True)
    assert torch.equal(values[0], before[0]) and torch.equal(values[4], before[4])
    assert float(values[5]) == pytest.approx(1.62)
    assert (values[4]._version, values[5]._version) == (versions[0], versions[1] + 1)  # torch knows of the write


def one_norm(p: Any, g: Any, q: Any, h: Any) -> None:
    """Two parameters, updated in two ways by the norm of both gradients."""
    norm = ((g * g).sum() + (h * h).sum()).sqrt() + 1
    p.sub_(g / norm)
    q.sub_(h / norm * 2)


def test_a_group_without_elements_shares_a_norm() -> None:
    """The other group has kernels for all that."""
    examples = [torch.rand(5000), torch.rand(5000), torch.rand(0), torch.rand(0)]
    grouped = group(capture(traced(one_norm, *examples)))
    program = Program(grouped.leaves, grouped.groups, hardware=Cores(chunk=1024))
    assert [lowered.note for lowered in program.groups if lowered.generated is None] == []
    values: list[Any] = [t.clone() for t in examples]
    program(values, complete=True)
    one_norm(*examples)
    for a, b in zip(values, examples, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_state_in_float64_runs_as_the_original() -> None:
    examples = [torch.rand(5), torch.rand(5), torch.rand(3), torch.rand(3), *(torch.tensor(1.0).double(),) * 2]
    examples[5] = examples[5].clone()
    grouped = group(capture(traced(one_number, *examples)))
    with pytest.raises(Unsupported, match=r"computed from a tensor.*no generated kernel.*stored in torch.float64") as e:
        Program(grouped.leaves, grouped.groups, hardware=Cores(chunk=1024))
    assert e.value.reason.code is Code.GE_STATE
