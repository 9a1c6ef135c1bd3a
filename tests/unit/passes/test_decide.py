"""Tests of numbers against 0 that are decided before a program is made: which ones, and what is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass import rule, zeros
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.ir import types
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.options import Target
from npu_fuse_pass.passes.specialise import decide
from tests.support.dumped import parameters
from tests.support.graphs import captured_step, inputs_of_step
from tests.unit.dump.test_dump_files import run_script

Rule = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("afresh")


def decided(optimizer: Any) -> types.Captured:
    """The captured step of an optimizer, decided with its numbers."""
    values = inputs_of_step(optimizer)
    return decide(captured_step(optimizer), lambda leaf: values[leaf.index])


def made_with(test: Callable[[Tensor], Tensor]) -> Rule:
    """A rule that tests its weight decay."""

    @rule(states={"average": zeros}, defaults={"lr": 0.1, "weight_decay": 0.0})
    def tested(
        param: Tensor, grad: Tensor, average: Tensor, *, lr: Tensor, weight_decay: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad = torch.where(test(weight_decay), grad, grad + weight_decay * param)
        average = torch.where(step == 0, average, average + grad)
        return param - lr * average, average

    return tested


def left_over(captured: types.Captured) -> int:
    return sum(e.op == "where" for e in postorder([e for u in captured.updates for _, e in u.writes]))


# What a rule asks of its weight decay, and whether that is decided: what only 0 is an answer to.
TESTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "== 0": (lambda x: x == 0, True),
    "0 ==": (lambda x: 0 == x, True),  # noqa: SIM300
    "not == 0": (lambda x: ~(x == 0), False),
    "!= 0": (lambda x: x != 0, True),
    "== 1": (lambda x: x == 1, False),
    "> 0": (lambda x: x > 0, False),
    "of another number": (lambda x: x * 2 == 0, False),
}


@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, float("nan")])
@pytest.mark.parametrize("name", TESTS)
def test_what_is_decided(name: str, value: float) -> None:
    """Step counters are numbers that the step writes: their tests stay."""
    test, expected = TESTS[name]
    captured = decided(made_with(test)(parameters(1), weight_decay=value))
    found = [(d.label, d.zero) for d in captured.decided]
    assert found == ([("weight_decay", value == 0)] if expected else [])
    assert left_over(captured) == (1 if expected else 2)


def test_the_branch_that_is_left() -> None:
    for value in (0.0, 0.5):
        captured = decided(optimizers.NpuFusedAdam(parameters(1), weight_decay=value))
        [update] = captured.updates
        read = {update.labels[e.value] for e in postorder([e for _, e in update.writes[1:]]) if e.op == "leaf"}  # type: ignore[index]
        assert ({"param", "weight_decay"} <= read) == (value != 0)


def test_a_branch_that_is_one_number_for_all_elements_stays() -> None:
    @rule(defaults={"scale": 0.0})
    def constant(param: Tensor, grad: Tensor, *, scale: Tensor) -> Tensor:
        return torch.where(scale == 0, torch.zeros_like(param), param - scale * grad)

    captured = decided(constant(parameters(1)))
    assert left_over(captured) == 1


def test_programs_that_are_kept_and_their_dumps(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """On a CPU nothing is decided; here it is, to see the dump's script compare the two graphs with such numbers."""
    for place in (("cpu",), ()):
        monkeypatch.setattr(Target, "specialises", property(lambda target, place=place: target.platform in place))
        npu_fuse_pass.clear_reports()
        torch.manual_seed(0)
        both = [[torch.nn.Parameter(p.detach().clone()) for p in like] for like in [parameters(3)] * 2]
        ours, eager = (optimizers.NpuFusedSGD(p, lr=0.1, momentum=0.9) for p in both)
        options = {"platform": "cpu", "strict": True, "dump": str(tmp_path / str(len(place)))}
        step = torch.compile(ours.step, backend=npu_fused, options=options)
        for value in (0.0, 0.5, 0.0, 0.25):
            for optimizer in (ours, eager):
                optimizer.param_groups[0]["weight_decay"] = value
                for k, p in enumerate(optimizer.param_groups[0]["params"]):
                    p.grad = torch.full_like(p, k + 1.0)
            step()
            eager.step()
            torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=1e-7)
        causes = [
            "compile",
            "weight_decay is no longer 0; the rule tests for that, and each case is a program that is kept",
        ]
        assert [r.cause for r in npu_fuse_pass.reports()] == causes[: 1 + len(place)]
    scripts = sorted(tmp_path.glob("1/*/*/03_fused_graph.py"))
    assert len(scripts) == 2
    for script in scripts:
        status, printed = run_script(script)
        assert status == 0, printed
    zeros = re.search(r"ZEROS = \['\w*weight_decay\w*'\]", scripts[0].read_text())
    assert zeros is not None
    wrong = tmp_path / "wrong.py"
    wrong.write_text(scripts[0].read_text().replace(zeros[0], "ZEROS = []"))
    assert run_script(wrong)[0] == 1


@rule(states={"average": zeros}, defaults={"beta": 0.5})
def interpolated(param: Tensor, grad: Tensor, average: Tensor, *, beta: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    average = torch.lerp(grad, average, beta)
    return torch.lerp(param, average, 1 / step), average


@rule(states={"average": zeros}, defaults={"beta": 0.5})
def chosen(param: Tensor, grad: Tensor, average: Tensor, *, beta: Tensor) -> tuple[Tensor, Tensor]:
    return param - torch.where(beta.abs() < 0.5, average - beta * grad, average + beta * grad), average + grad


@pytest.mark.parametrize(("betas", "left"), [((0.9,), 1), ((0.2,), 1), ((0.9, 0.2), 2)])
def test_the_spelling_of_an_interpolation(betas: tuple[float, ...], left: int) -> None:
    """It is that of the weights of now, without a program for others; what follows from counters changes too often."""
    groups = [{"params": parameters(1), "beta": beta} for beta in betas]
    captured = decided(interpolated(groups))
    assert captured.decided == () and left_over(captured) == left
    assert left_over(decided(chosen(groups))) == 1  # what a rule tests is another function


def test_an_interpolation_rounds_as_eager() -> None:
    """With the other spelling a thousandth of the gradient has the gradient's rounding."""
    for beta in (0.999, 0.001):
        [update] = decided(interpolated(parameters(1), beta=beta)).updates
        (average,) = (e for p, e in update.writes if update.labels[p] == "average")
        assert average.op == "fma"
        near = update.labels[average.args[2].value]  # type: ignore[index]
        assert near == ("average" if beta > 0.5 else "grad")


def test_the_weight_of_an_interpolation_may_be_computed() -> None:
    captured = decided(optimizers.NpuFusedRMSpropTF(parameters(1), centered=True, alpha=0.9))
    assert left_over(captured) == 0
