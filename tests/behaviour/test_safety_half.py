"""Half precision: stock optimizers round after every operation, and so do their fused forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import npu_fuse_pass
from tests.support.graphs import check
from tests.support.papers_norms import Lion
from tests.support.training import assert_fused, compiled, gradients, last_report, parameters, set_gradients

pytestmark = pytest.mark.usefixtures("afresh")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_after_every_operation(dtype: torch.dtype) -> None:
    """Sums and products of few bits, ties among them, to the last bit; what is written is rounded before it is read."""

    def several(p: Any, g: Any, m: Any) -> None:
        x = p * g
        y = x + g
        m.copy_(y * y - x)
        p.sub_(m)

    def mixed(p: Any, g: Any, m: Any) -> None:
        m.mul_(0.5).add_(g)
        p.sub_(m)
        m.copy_(p)

    torch.manual_seed(0)
    for kind in (dtype, torch.float32):
        tensors = [torch.randn(4000).to(d) for d in (dtype, dtype, kind)]
        check(several, *tensors)
        check(mixed, *tensors)


HALF: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)),
    (torch.optim.Adam, dict(lr=0.02, eps=1e-4)),
    (torch.optim.AdamW, dict(lr=0.02, weight_decay=0.1, eps=1e-4, amsgrad=True)),
    (torch.optim.RMSprop, dict(lr=0.02, eps=1e-4, momentum=0.9, centered=True)),
    (torch.optim.Adagrad, dict(lr=0.1, lr_decay=0.1)),
    (torch.optim.Adadelta, dict(lr=1.0, eps=1e-4)),
    (torch.optim.Adamax, dict(lr=0.02, eps=1e-4)),
    (torch.optim.NAdam, dict(lr=0.02, eps=1e-4)),
    (torch.optim.RAdam, dict(lr=0.02, eps=1e-4)),
    (torch.optim.Rprop, dict(lr=0.02)),
    (torch.optim.ASGD, dict(lr=0.02)),
    (Lion, dict(lr=0.02)),
]


def states_beside(opt: Any, other: Any, oracle: Any, params: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, the original's, the oracle's) of every parameter and state that has dimensions."""
    triples = list(zip(*params, strict=True))
    found = [*triples]
    for p, q, e in triples:
        names = [n for n, v in other.state[q].items() if isinstance(v, Tensor)]
        found += [(opt.state[p][n], other.state[q][n], oracle.state[e][n]) for n in names]
    return found


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cls", "options"), HALF, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_half_precision_is_as_exact_as_the_original(cls: Any, options: Any, dtype: Any, foreach: bool) -> None:
    """Beside a float64 oracle: mean error at most 1.1 times that of backend="eager", which rounds every operation."""
    params = [parameters([(40, 50), (500,)], dtype) for _ in range(2)]
    params.append([Parameter(p.detach().double()) for p in params[0]])
    opt, other, oracle = (cls(p, foreach=foreach, **options) for p in params)
    step, original = compiled(opt, fullgraph=False), torch.compile(other.step, backend="eager")
    for t in range(5):
        for own in params:
            set_gradients(own, [g.to(own[0].dtype) for g in gradients(params[0], t)])
        for call in (step, original, oracle.step):
            call()
        for ours, theirs, exact in states_beside(opt, other, oracle, params):
            if ours.ndim:
                mine, given = ((x.detach().double() - exact.detach()).abs() for x in (ours, theirs))
                unit = torch.finfo(ours.dtype).eps * exact.detach().abs()
                assert mine.mean() <= 1.1 * given.mean() + 0.01 * unit.mean(), (t, float(mine.mean() / given.mean()))
                assert mine.max() <= 1.5 * given.max() + unit.max(), (t, float(mine.max() / given.max()))
            with torch.no_grad():
                theirs.copy_(ours)
                exact.copy_(ours)
    for report in npu_fuse_pass.reports():
        assert report.fallback is None and not report.unfused, report


def test_numbers_of_lists_round_as_atens_do() -> None:
    """An in-place product with a Scalar takes the number in half precision, `x.mul_(number)` in float32."""
    forms: list[Any] = [
        lambda x: torch._foreach_mul_([x], 0.9),
        lambda x: torch._foreach_mul_([x], [0.9]),
        lambda x: x.copy_(torch._foreach_mul([x], 0.9)[0]),
        lambda x: x.mul_(0.9),
        lambda x: torch._foreach_div_([x], 0.9),
        lambda x: torch._foreach_mul_([x], torch.tensor(0.9)),
    ]

    def body(xs: list[torch.Tensor]) -> None:
        for x, form in zip(xs, [*forms, *forms], strict=True):
            form(x)

    start = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    made = [[start.to(d) for d in (torch.float16, torch.bfloat16) for _ in forms] for _ in range(2)]
    npu_fuse_pass.clear_reports()
    body(made[0])
    torch.compile(body, backend="npu_fused")(made[1])
    assert [i for i, (a, b) in enumerate(zip(*made, strict=True)) if not torch.equal(a, b)] == []
    assert_fused(last_report(), parameters=len(made[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "change",
    [lambda s: s.add_(0.0101), lambda s: s.sub_(0.0101), lambda s: s.mul_(1.003), lambda s: s.copy_(0.777 - s)],
    ids=["add", "sub", "mul", "rsub"],
)
def test_numbers_beside_states_without_dimensions(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """ATen rounds the number of a sum to the state's dtype first, the factor of a product not."""

    def step(p: Tensor, s: Tensor) -> None:
        change(s)
        p.sub_(0.1 * s.float())

    fused = torch.compile(step, backend="npu_fused")
    for start in torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist():
        found = []
        for call in (fused, step):
            p, s = torch.ones(5), torch.tensor(start, dtype=dtype)
            call(p, s)
            found.append(s)
        assert torch.equal(*found)
    assert_fused(last_report(), parameters=1)


@pytest.mark.parametrize("dtypes", [[torch.float16] * 60, [torch.bfloat16] * 60, [torch.bfloat16, torch.float32]])
def test_norms_in_one_vector(dtypes: list[torch.dtype]) -> None:
    """Their vector has the dtype that all fit in, and a sum or norm of it is rounded once, at the end."""

    def clip(p: Any, *gradients: Any) -> None:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
        p.mul_(norms.norm() + norms.sum())

    torch.manual_seed(0)
    check(clip, torch.ones(35), *(torch.randn(35).to(d) for d in dtypes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means(dtype: torch.dtype) -> None:
    """ATen rounds them once, from a sum in float32, which float16 may not hold."""

    def means(p: Tensor, s: Tensor, g: Tensor) -> None:
        s.copy_(g.mean())
        p.sub_(s + g.mean(1, keepdim=True).float() * p + g.float().mean(dtype=dtype).float())

    torch.manual_seed(0)
    fused = torch.compile(means, backend="npu_fused")
    for g in (torch.randn(50, 70), torch.full((50, 70), 6e4), torch.rand(50, 70)):
        both = [[torch.ones(50, 70), torch.zeros(()), g.to(dtype)] for _ in range(2)]
        fused(*both[0])
        means(*both[1])
        torch.testing.assert_close(*both, rtol=1e-6, atol=0)
        assert last_report().fallback is None and not last_report().unfused
