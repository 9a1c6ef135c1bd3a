"""What is no step is left alone without a word: forward passes of closures and train functions, with labels and all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npu_fuse_pass
import optimizers
from tests.support.training import assert_close, assert_fused

X, Y, TOKENS = torch.linspace(-1, 1, 32).reshape(8, 4), torch.arange(8) % 3, torch.arange(8).reshape(2, 4) % 5

# model, and its loss: labels, tokens, averages that a layer writes itself, a mask, an operation with its own memory
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "labels": (lambda: nn.Linear(4, 3), lambda m: F.cross_entropy(m(X), Y)),
    "tokens": (lambda: nn.Embedding(5, 3), lambda m: F.cross_entropy(m(TOKENS).flatten(0, 1), Y)),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), lambda m: F.cross_entropy(m(X), Y)),
    "mask": (lambda: nn.Linear(4, 3), lambda m: m(X).masked_fill(Y[:, None] == 1, 0.0).square().mean()),
    "relu in place": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), lambda m: m(X).square().mean()),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "NpuFusedAdamW": lambda p: optimizers.NpuFusedAdamW(p, lr=0.1),
}

pytestmark = pytest.mark.usefixtures("afresh")


def _run(model: str, optimizer: str, form: str, **options: Any) -> list[Tensor]:
    """Four steps, in a closure or in a function that holds forward pass, backward pass and step; form "" is eager."""
    torch.manual_seed(0)
    make, loss_of = MODELS[model]
    module = make()
    opt = OPTIMIZERS[optimizer](module.parameters())

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    def train() -> Tensor:
        loss = closure()
        opt.step()
        return loss

    step: Callable[[], Any] = train
    if form == "closure":
        compiled = torch.compile(opt.step, backend="npu_fused", options=options)

        def step() -> Any:
            return compiled(closure)
    elif form == "function":
        step = torch.compile(train, backend="npu_fused", options=options)
    losses = [step().detach() for _ in range(4)]
    return [*losses, *(p.detach() for p in module.parameters())]


@pytest.mark.parametrize("form", ["closure", "function"])
@pytest.mark.parametrize(
    ("model", "optimizer"), [*((m, "AdamW") for m in MODELS), ("labels", "SGD"), ("labels", "NpuFusedAdamW")]
)
def test_a_forward_pass_is_left_alone(model: str, optimizer: str, form: str) -> None:
    want = _run(model, optimizer, "")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="npu_fused")
        got = _run(model, optimizer, form, strict=True)
    assert_close(got, want)
    reports = npu_fuse_pass.reports()
    assert reports and all(r.groups and not r.reasons for r in reports), [str(r) for r in reports]
    assert_fused(reports[-1], parameters=len(got) - 4)


def test_evaluation_is_left_alone() -> None:
    """Without gradients nothing is recorded; what is not written is no update."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    tokens = TOKENS.clone()

    @torch.no_grad()
    def accuracy() -> Tensor:
        return (model(tokens).argmax(-1).flatten() == Y).sum()

    want = accuracy()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="npu_fused")
        assert torch.equal(torch.compile(accuracy, backend="npu_fused", options={"strict": True})(), want)
    assert not npu_fuse_pass.reports()


def test_a_step_beside_a_forward_pass_is_said() -> None:
    """Here a graph is both: it is not fused, and that is no secret."""
    model = nn.Linear(4, 3)
    model(X).sum().backward()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def both() -> Tensor:
        loss = F.cross_entropy(model(X), Y)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
        return loss

    want = [p.detach() - 0.1 * p.grad for p in model.parameters() if p.grad is not None]
    with pytest.warns(UserWarning, match="forward pass: autograd records operations") as caught:
        torch.compile(both, backend="npu_fused", fullgraph=True)()
    assert all(w.filename == __file__ for w in caught if "npu_fused" in str(w.message))
    assert_close(list(model.parameters()), want)
    assert npu_fuse_pass.reports()[-1].fallback
    assert opt.param_groups


def test_integers_that_are_updated_beside_a_parameter() -> None:
    """A dtype that no kernel takes, in what is a step: that operation stays, the update is fused."""
    p, n = torch.ones(3), torch.ones(3, dtype=torch.int64)

    def step() -> None:
        n.add_(1)
        p.mul_(n)

    torch.compile(step, backend="npu_fused")()
    assert torch.equal(p, torch.full((3,), 2.0)) and torch.equal(n, torch.full((3,), 2))
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.fallback is None


def test_an_empty_list_of_reports_says_why() -> None:
    with pytest.raises(IndexError, match=r"there is no report: .*fused=True.*explain\(opt\)"):
        npu_fuse_pass.reports()[-1]
    assert npu_fuse_pass.reports() == [] and npu_fuse_pass.reports()[:1] == []


TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.vmap(lambda row: row * f(row))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1] * x,
    "vmap in place": lambda f, x: torch.vmap(lambda row: row.clone().mul_(f(row)))(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.filterwarnings("error:npu_fused")
def test_function_transforms_beside_a_step(name: str) -> None:
    """torch.func enters its transforms by calls in the graph, which must not happen while that is compiled."""
    found = []
    for compiled in (False, True):
        p = nn.Parameter(X.clone())
        opt = optimizers.NpuFusedAdamW([p], lr=0.1)

        def train(p: nn.Parameter, opt: torch.optim.Optimizer) -> None:
            p.grad = TRANSFORMED[name](lambda x: x.square().sum(), p.detach())
            opt.step()

        step = torch.compile(train, backend="npu_fused") if compiled else train
        for _ in range(3):
            step(p, opt)
        found.append(p.detach())
    assert_close([found[1]], [found[0]], 1e-6)
