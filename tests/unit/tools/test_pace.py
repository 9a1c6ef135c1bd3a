"""Whether a captured step is slower than the eager one is measured once, said, and decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass.tools import pace
from tests.support.training import assert_close, assert_fused, clones, last_report, parameters, train, warned

SHAPES = ((3, 4), (7,))
TIMED = pace.FIRST + pace.COMPILED  # steps ahead of the eager ones
ALL = TIMED + pace.EAGER
pytestmark = pytest.mark.usefixtures("afresh")


class Momentum(torch.optim.Optimizer):
    """A class that is not torch's; `eager` counts the steps that Dynamo does not compile."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.eager: list[int] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not torch.compiler.is_compiling():
            self.eager.append(1)
        loss = None if closure is None else closure()
        for p in self.param_groups[0]["params"]:
            buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
            buffer.mul_(0.9).add_(p.grad)
            p.sub_(buffer, alpha=self.param_groups[0]["lr"])
        return loss


def _clock(compiled: float, eager: float, slow: int = 0) -> Callable[[], float]:
    """Steps take so many seconds each, whatever they do; the first, which makes states, does not count.

    `slow`: how many of the last compiled ones take a second.
    """

    def readings() -> Iterator[float]:
        yield from (0.0, 0.0)
        yield from itertools.chain.from_iterable((0.0, compiled) for _ in range(TIMED - slow))
        yield from itertools.chain.from_iterable((0.0, 1.0) for _ in range(slow))
        yield from itertools.chain.from_iterable((0.0, eager) for _ in range(pace.EAGER))

    return readings().__next__


def _train(opt: Any, step: Any, steps: int, *args: Any) -> list[str]:
    """Make steps; returns what is warned of."""
    return warned(lambda: train(opt.param_groups[0]["params"], lambda: step(*args), seeds=range(steps)))


@pytest.mark.parametrize(
    ("compiled", "eager", "slower"),
    [(0.0042, 0.0021, True), (0.0004, 0.0001, False), (0.1049, 0.1, False), (0.002, 0.0042, False)],
    ids=["slower", "by less than a millisecond", "by less than a fifth", "faster"],
)
@pytest.mark.parametrize("entry", ["compile_step", "compile_optimizer_"])
def test_a_slower_step_is_said_once_and_goes_on(
    entry: str, compiled: float, eager: float, slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "clock", _clock(compiled, eager))
    params = parameters(SHAPES)
    opt, other = Momentum(params), Momentum(clones(params))
    step = getattr(npu_fuse_pass, entry)(opt)
    said = _train(opt, opt.step if step is None or step is opt else step, ALL + 4)
    _train(other, other.step, ALL + 4)
    assert_close(params, other.param_groups[0]["params"], 1e-6)
    assert_fused(last_report(), parameters=len(params))
    assert len(opt.eager) == 1 + pace.EAGER  # the first makes states
    took = "a step takes 4.2 ms compiled and 2.1 ms eagerly"
    assert len(said) == slower and all("Momentum is faster uncompiled" in text and took in text for text in said), said
    assert last_report().slower == (took if slower else None)
    assert (f"slower than uncompiled: {took}" in str(last_report())) == slower


def test_a_few_steps_that_compile_or_wait_make_no_slower_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that are added, gradients that come and go: a compile is a matter of one step."""
    monkeypatch.setattr(pace, "clock", _clock(0.0004, 0.0001, slow=pace.COMPILED - 1))
    opt = Momentum(parameters(SHAPES))
    assert not _train(opt, npu_fuse_pass.compile_step(opt), ALL + 1)
    assert last_report().slower is None


@pytest.mark.parametrize("options", [{}, {"check_numerics": True}], ids=["a closure", "check_numerics"])
def test_what_is_not_timed_is_always_compiled(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A closure runs a model, and `check_numerics` runs both."""
    monkeypatch.setattr(pace, "clock", _clock(1.0, 0.1))
    params = parameters(SHAPES)
    opt = Momentum(params)
    given = () if options else (lambda: torch.ones(()),)
    assert not _train(opt, npu_fuse_pass.compile_step(opt, **options), ALL + 2, *given)
    assert last_report().slower is None
    assert last_report().checked_steps >= ALL if options else len(opt.eager) == 1


def test_rules_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither optimizers of this package nor torch's classes that run as rules."""
    monkeypatch.setattr(pace, "clock", _clock(1.0, 0.1))
    opt = torch.optim.Adam(parameters(SHAPES))
    assert not _train(opt, npu_fuse_pass.compile_step(opt), ALL + 2)
    assert last_report().replaces == "torch.optim.Adam" and last_report().slower is None
