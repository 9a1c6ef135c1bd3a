"""Numbers that become 0: one more program, a graph that was compiled for the number 0, and the numbers of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from layouts import Parameters, Twins, flat_parameters

import npu_fuse_pass
import optimizers
from npu_fuse_pass import errors
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.passes import specialise
from npu_fuse_pass.run import variants
from optimizers.paddle import RMSProp

ORDER = tuple(range(5))
# How an optimizer is made, and how its graph with weight decay 0 and with another one is: nodes, bytes per element.
Cost = tuple[int, int]
CASES: dict[str, tuple[Callable[[Parameters], Any], Cost, Cost]] = {
    "Adam": (lambda p: optimizers.NpuFusedAdam(p, lr=0.02), (3, 28), (5, 48)),
    "SGD momentum": (lambda p: optimizers.NpuFusedSGD(p, lr=0.02, momentum=0.9), (3, 20), (5, 40)),
    "RMSpropTF": (lambda p: optimizers.NpuFusedRMSpropTF(p, lr=0.02), (10, 92), (12, 112)),
    "Paddle RMSProp": (lambda p: RMSProp(0.02, parameters=p, weight_decay=0.0), (12, 108), (14, 128)),
    "LAMB": (lambda p: optimizers.NpuFusedLamb(p, lr=0.02, adam=True), (13, 116), (15, 136)),
}


pytestmark = pytest.mark.usefixtures("afresh")


def decay(value: float, group: int = 0) -> Callable[[Any, Parameters], None]:
    def change(optimizer: Any, params: Parameters) -> None:
        optimizer.param_groups[group]["weight_decay"] = value

    return change


def other_numbers(optimizer: Any, params: Parameters) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        if "betas" in group:
            group["betas"] = (0.5, 0.75)


@pytest.mark.parametrize("name", CASES)
def test_weight_decay_that_comes_and_goes(name: str) -> None:
    """Two programs, each converted once; numbers that are not 0 share one."""
    make, without, with_decay = CASES[name]
    twins = Twins(make, lambda: flat_parameters(5))
    costs = []
    for k, value in enumerate((0.0, 0.01, 0.0, 0.02, 0.0, -0.0)):
        twins.change(decay(value))
        twins.step(k, order=ORDER)
        costs.append((twins.nodes(), twins.row.bytes_per_element))
        if value:
            twins.change(other_numbers)
    print(name, costs[:2])
    assert [g.runs for g in twins.graphs] == [4, 2]
    assert costs[:2] == [without, with_decay]
    first, second = npu_fuse_pass.reports()
    [tested] = {text.split()[0] for text in first.decided + second.decided}
    assert (first.decided, second.decided) == ([f"{tested} == 0"], [f"{tested} != 0"])
    assert (first.cause, tested in ("weight_decay", "coefficient")) == ("compile", True)
    assert second.cause.startswith(f"{tested} is no longer 0; ") and second.cause_remedy is None
    assert f"compiled for {tested} != 0" in str(second)
    assert "where(" not in first.groups[0].formula or name == "SGD momentum"


def test_groups_with_and_without_decay() -> None:
    """As for biases: each group has the program that its number needs, in one graph."""
    make = lambda p: optimizers.NpuFusedAdam([{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:]}], lr=0.02)  # noqa: E731
    twins = Twins(make, lambda: flat_parameters(5))
    twins.step(0, order=ORDER)
    twins.step(1, order=ORDER)
    assert [(row.updates, row.layout, row.bytes_per_element) for row in twins.rows] == [
        (2, "flat", 48),
        (3, "flat", 28),
    ]
    twins.change(decay(0.0))
    twins.step(2, order=ORDER)
    assert [(row.updates, row.bytes_per_element) for row in twins.rows] == [(5, 28)]
    assert [g.runs for g in twins.graphs] == [2, 1]


def test_inside_a_larger_graph() -> None:
    """Where the step is a part of what torch.compile sees."""
    both = [torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2)]
    made = [optimizers.NpuFusedAdam([p], lr=0.02) for p in both]

    def step(optimizer: Any, p: torch.Tensor) -> None:
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()

    npu_fuse_pass.clear_reports()
    compiled = torch.compile(step, backend=npu_fused, options={"platform": "npu", "strict": True})
    for k, value in enumerate((0.0, 0.01, 0.0, 0.02)):
        for run, optimizer, p in zip((compiled, step), made, both, strict=True):
            p.grad = torch.randn(6, generator=torch.Generator().manual_seed(k))
            optimizer.param_groups[0]["weight_decay"] = value
            run(optimizer, p)
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7)
    assert [r.decided for r in npu_fuse_pass.reports()] == [["weight_decay == 0"], ["weight_decay != 0"]]


def test_numbers_that_keep_becoming_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few programs one is made that serves all numbers."""
    monkeypatch.setattr(variants, "_MOST", 2)
    make = lambda p: optimizers.NpuFusedAdam([{"params": [q]} for q in p], lr=0.02)  # noqa: E731
    twins = Twins(make, lambda: flat_parameters(5))
    for k in range(5):
        twins.change(decay(0.1, group=k))
        twins.step(k, order=ORDER)
    assert len(npu_fuse_pass.reports()) == 3
    assert [bool(r.decided) for r in npu_fuse_pass.reports()] == [True, True, False]


def test_zero_decay_never_touches_the_parameter() -> None:
    """An infinite parameter has finite moments: there is no 0 * inf in them."""
    params = flat_parameters(5)
    params[1].data.fill_(float("inf"))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optimizers.NpuFusedAdam(params, lr=0.02)
    with harness.record() as graphs:
        torch.compile(optimizer.step, backend=npu_fused, options={"platform": "npu", "strict": True})()
    assert [g.runs for g in graphs] == [1]
    assert all(optimizer.state[p]["exp_avg"].isfinite().all() for p in params)


def test_checked_step_by_step() -> None:
    """`check_numerics` compares every program with the original."""
    twins = Twins(CASES["Adam"][0], lambda: flat_parameters(5), check_numerics=True)
    for k, value in enumerate((0.0, 0.01, 0.0)):
        twins.change(decay(value))
        twins.step(k, order=ORDER)
    assert [r.checked_steps for r in npu_fuse_pass.reports()] == [2, 1]


@npu_fuse_pass.rule(states={"average": npu_fuse_pass.zeros}, defaults={"lr": 0.1, "beta": 0.999})
def interpolated(param: Any, grad: Any, average: Any, *, lr: Any, beta: Any) -> Any:
    average = torch.lerp(grad, average, beta)
    return param - lr * average, average


def test_an_average_that_gives_the_gradient_a_thousandth() -> None:
    """It is rounded as an average, not as the gradient that it begins with; one graph serves other weights."""
    params = [[torch.nn.Parameter(torch.zeros(1000)) for _ in range(2)] for _ in range(2)]
    ours, eager = map(interpolated, params)
    with harness.record() as graphs:
        step = npu_fuse_pass.compile_step(ours, platform="npu", kernels="elementwise", strict=True)
        for k, beta in enumerate((0.999, 0.999, 0.99, 0.2)):
            for optimizer, given in zip((ours, eager), params, strict=True):
                optimizer.param_groups[0]["beta"] = beta
                generator = torch.Generator().manual_seed(k)
                for p in given:
                    p.grad = torch.randn(p.shape, generator=generator)
            step()
            eager.step()
            for p, q in zip(*params, strict=True):
                got, wanted = ours.state[p]["average"], eager.state[q]["average"]
                assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    assert len([g for g in graphs.graphs if g.runs]) == 1


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "the program for another number runs": (variants.Variant, "differing", lambda *_: []),
    "the other branch is taken": (specialise, "_branches", lambda *given: _swapped(*given)),
}
_right = specialise._branches


def _swapped(order: Any, zero: dict[int, bool], low: dict[int, bool]) -> Any:
    return _right(order, {position: not found for position, found in zero.items()}, low)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[name])
    with pytest.raises((AssertionError, errors.FuseError)):
        test_weight_decay_that_comes_and_goes("Adam")
