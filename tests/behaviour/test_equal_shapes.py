"""Parameters of one shape keep to their own states, gradients and numbers: against torch.optim, parameter by parameter.

Among other shapes a state that is exchanged, forgotten or in another's place is an error of sizes; here it is a wrong
number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from tests.support.training import Step, assert_close, clones, error, gradients, parameters, set_gradients

SHAPES = ((3, 4), (3, 4), (5,), (5,), (3, 4), (), ())
PAIRS: dict[str, tuple[Callable[..., Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (optimizers.NpuFusedAdam, torch.optim.Adam, dict(lr=0.02, amsgrad=True)),
    "SGD": (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9)),
}
pairs = pytest.mark.parametrize("name", PAIRS)
modes = pytest.mark.parametrize("mode", ["eager", "compiled"])


class Beside:
    """An optimizer of ours and torch's, on the same values, stepped with the same gradients."""

    def __init__(self, name: str, mode: str, groups: bool = False) -> None:
        make, cls, options = PAIRS[name]
        torch._dynamo.reset()
        npu_fuse_pass.clear_reports()
        self.params = parameters(SHAPES)
        self.others = clones(self.params)
        self.ours, self.torchs = (
            of([{"params": p[:3]}, {"params": p[3:], "lr": 0.01}] if groups else p, **options)
            for of, p in ((make, self.params), (cls, self.others))
        )
        self.step = Step(self.ours, mode)

    def run(self, seeds: Sequence[int], missing: Sequence[int] = ()) -> None:
        for seed in seeds:
            grads = [None if i in missing else g for i, g in enumerate(gradients(self.params, seed))]
            set_gradients(self.params, grads)
            set_gradients(self.others, grads)
            self.step()
            self.torchs.step()

    def compare(self) -> None:
        assert_close(self.params, self.others)
        for i, (p, q) in enumerate(zip(self.params, self.others, strict=True)):
            want = {k: v for k, v in self.torchs.state.get(q, {}).items() if isinstance(v, Tensor)}
            got = self.ours.state.get(p, {})
            assert got.keys() >= want.keys(), (i, got.keys())
            for k, value in want.items():
                assert error(got[k], value) <= 1e-4, (i, k, got[k], value)
        if self.step.compiled:
            npu_fuse_pass.reports()[-1].raise_if_unfused()


@pairs
@modes
def test_states_are_those_of_their_parameters(name: str, mode: str) -> None:
    beside = Beside(name, mode)
    beside.run(range(3))
    beside.compare()
    beside.run([3], missing=[1, 3])
    beside.run(range(4, 6))
    beside.compare()


@pairs
@modes
def test_a_first_step_without_some_gradients(name: str, mode: str) -> None:
    """Counters are each parameter's own."""
    beside = Beside(name, mode)
    beside.run([0], missing=[0, 2])
    assert not beside.ours.state.get(beside.params[0])
    beside.run(range(1, 4))
    beside.compare()


@pairs
@modes
def test_numbers_of_groups(name: str, mode: str) -> None:
    beside = Beside(name, mode, groups=True)
    for seed in range(4):
        for opt in (beside.ours, beside.torchs):
            opt.param_groups[0]["lr"] = 0.02 * (1 + seed)
        beside.run([seed])
    beside.compare()


@pairs
@modes
def test_a_checkpoint_of_torchs(name: str, mode: str) -> None:
    """Every parameter goes on from its own states and counter; the checkpoint stays as it was saved."""
    beside = Beside(name, mode)
    beside.run([0], missing=[4])
    beside.run(range(1, 3))
    for grads in (gradients(beside.others, 9), gradients(beside.others, 10)):
        set_gradients(beside.others, [g if i != 1 else None for i, g in enumerate(grads)])
        beside.torchs.step()
    with torch.no_grad():
        for p, q in zip(beside.params, beside.others, strict=True):
            p.copy_(q)
    saved = copy.deepcopy(beside.torchs.state_dict())
    before = copy.deepcopy(saved)
    beside.ours.load_state_dict(saved)
    beside.run([3])
    beside.compare()
    beside.run(range(4, 6))
    beside.compare()
    for i, entry in before["state"].items():
        assert all(v is None or torch.equal(saved["state"][i][k], v) for k, v in entry.items())


@pairs
@modes
def test_a_parameter_that_is_thawed(name: str, mode: str) -> None:
    beside = Beside(name, mode)
    for some in (beside.params, beside.others):
        some[1].requires_grad_(False)
    beside.run(range(2), missing=[1])
    for some in (beside.params, beside.others):
        some[1].requires_grad_(True)
    beside.run(range(2, 5))
    beside.compare()


@pairs
@modes
def test_found_inf(name: str, mode: str) -> None:
    """A step that is left out changes nothing and is not counted."""
    beside = Beside(name, mode)
    beside.step = Step(beside.ours, mode, fullgraph=False)  # nothing runs in the graph of a step that is left out
    beside.run(range(2))
    beside.ours.found_inf = torch.ones(())
    set_gradients(beside.params, gradients(beside.params, 7))
    beside.step()
    beside.ours.found_inf = torch.zeros(())
    beside.run(range(2, 4))
    beside.compare()


@modes
def test_states_begin_where_the_rule_says(mode: str) -> None:
    """Also for a parameter that begins anew."""

    @npu_fuse_pass.rule(states={"scale": npu_fuse_pass.ones}, defaults={"lr": 0.1})
    def scaled(param: Tensor, grad: Tensor, scale: Tensor, *, lr: Tensor) -> tuple[Tensor, Tensor]:
        return param - lr * scale * grad, scale * 0.5

    torch._dynamo.reset()
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = scaled(params)
    step = Step(opt, mode)
    for _ in range(2):
        set_gradients(params, [torch.ones(3)] * 2)
        step()
    assert all(torch.allclose(p, torch.full((3,), -0.15)) for p in params)
    opt.state[params[0]].clear()
    set_gradients(params, [torch.ones(3)] * 2)
    step()
    assert torch.allclose(params[0], torch.full((3,), -0.25)) and torch.allclose(params[1], torch.full((3,), -0.175))


def test_hooks_are_given_what_a_step_is_given() -> None:
    """A hook that runs before a step may exchange the closure; one after it sees what is in force then."""
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    opt = optimizers.NpuFusedSGD(params, lr=0.1)
    seen: list[Any] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: ((lambda: 7.0,), {}))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(args[0]()))
    assert opt.step(lambda: 3.0) == 7.0 and seen == [7.0]


@pytest.mark.parametrize("over", ["group", "optimizer"])
@modes
def test_totals_are_over_what_they_say(over: Any, mode: str) -> None:
    squares = npu_fuse_pass.total(lambda grad: (grad * grad).sum(), over=over)

    @npu_fuse_pass.rule(defaults={"lr": 0.1}, totals={"squares": squares})
    def by_norm(param: Tensor, grad: Tensor, *, lr: Tensor, squares: Tensor) -> Tensor:
        return param - lr * grad / squares.sqrt()

    torch._dynamo.reset()
    params = parameters(((3, 4), (3, 4), (5,)))
    grads = gradients(params, 0)
    set_gradients(params, grads)
    want = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        within = grads if over == "optimizer" else grads[:2] if i < 2 else grads[2:]
        norm = torch.stack([x.double().square().sum() for x in within]).sum().sqrt()
        want.append((p.detach().double() - 0.1 * g.double() / norm).float())
    opt = by_norm([{"params": params[:2]}, {"params": params[2:]}])
    Step(opt, mode)()
    assert_close(params, want)
