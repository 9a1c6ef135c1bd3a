"""Where Dynamo itself fails on a step of which nothing has run, the original runs; errors are then the original's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse_pass
from tests.support.training import assert_fused, clones, gradients, parameters, set_gradients, warned

SHAPES = ((3,), (4, 5))


class OfAnotherKind(torch.optim.Optimizer):
    """Neither torch's nor ours."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["made"] = True
            p.sub_(p.grad.to(p.dtype), alpha=self.param_groups[0]["lr"])


class InTwoParts(torch.optim.Adam):
    """The graph ends before Adam's own step."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)
        torch._dynamo.graph_break()
        torch.optim.Adam.step(self)


def compile_step(opt: Any, **options: Any) -> Any:
    opt.step = npu_fuse_pass.compile_step(opt, **options)
    return opt


def with_double_gradients(params: list[Any]) -> None:
    for p in params:
        if not hasattr(p, "grad_dtype"):
            pytest.skip("this torch has no Tensor.grad_dtype")
        p.grad_dtype = None
        p.grad = p.grad.double()


def step_counted_by_a_number(opt: Any) -> None:
    for p in opt.param_groups[0]["params"]:
        opt.state[p]["step"] = 5


def begin_amsgrad(opt: Any) -> None:
    opt.param_groups[0]["amsgrad"] = True


def note(opt: Any) -> None:
    opt.state["note"] = 1


def doubled(opt: Any) -> None:
    with_double_gradients(opt.param_groups[0]["params"])


Case = tuple[Callable[[Any], Any], Callable[[Any], None], str | None]
CASES: dict[str, Case] = {
    "SGD, other gradients": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), doubled, None),
    "Adagrad, other gradients": (lambda p: torch.optim.Adagrad(p, lr=0.1), doubled, None),
    "RMSprop, other gradients": (lambda p: torch.optim.RMSprop(p, lr=0.1), doubled, None),
    "another class, other gradients": (OfAnotherKind, doubled, None),
    "ASGD, a number": (lambda p: torch.optim.ASGD(p, lr=0.1), step_counted_by_a_number, None),
    "Adam, a state that is no dict": (lambda p: torch.optim.Adam(p, lr=0.1), note, None),
    "Adam, amsgrad begun late": (lambda p: torch.optim.Adam(p, lr=0.1), begin_amsgrad, "KeyError: 'max_exp_avg_sq'"),
}


def steps(opt: Any, change: Callable[[Any], None]) -> list[str | None]:
    """Two steps as they should be, and two after a change; what they raised."""
    params = opt.param_groups[0]["params"]
    raised: list[str | None] = []
    for k in range(4):
        set_gradients(params, gradients(params, k))
        if k >= 2:
            change(opt)
        try:
            opt.step()
            raised.append(None)
        except Exception as e:
            raised.append(f"{type(e).__name__}: {e}")
    return raised


@pytest.mark.parametrize("entry", [compile_step, npu_fuse_pass.compile_optimizer_])
@pytest.mark.parametrize("name", CASES)
def test_the_original_runs(name: str, entry: Any) -> None:
    make, change, error = CASES[name]
    params = parameters(SHAPES)
    others = clones(params)
    expected = steps(make(others), change)
    npu_fuse_pass.clear_reports()
    raised: list[str | None] = []
    said = warned(lambda: raised.extend(steps(entry(make(params)), change)))
    assert_fused(npu_fuse_pass.reports()[0], parameters=2)  # the steps before
    assert raised == expected == [None, None, error, error]
    torch.testing.assert_close(params, others)
    assert len(said) == 1 and "run eagerly from now on, because torch failed to compile one: Internal" in said[0], said


@pytest.mark.parametrize("entry", [compile_step, npu_fuse_pass.compile_optimizer_])
def test_not_where_a_part_of_the_step_has_run(entry: Any) -> None:
    params = parameters(SHAPES)
    opt = entry(InTwoParts(params))
    set_gradients(params, gradients(params, 0))
    opt.step()
    begin_amsgrad(opt)
    before = clones(params)
    with pytest.raises(Exception, match="max_exp_avg_sq"):
        opt.step()
    assert npu_fuse_pass.reports()[-1].groups
    assert all(torch.equal(p, q * 0.5) for p, q in zip(params, before, strict=True))  # not twice


def test_strict_raises() -> None:
    params = parameters(SHAPES)
    opt = npu_fuse_pass.compile_optimizer_(torch.optim.SGD(params, lr=0.1), strict=True)
    set_gradients(params, gradients(params, 0))
    with_double_gradients(params)
    before = clones(params)
    with pytest.raises(Exception, match="grad_dtype"):
        opt.step()
    assert all(map(torch.equal, params, before))
