"""A rule's hyperparameters: errors name them, their value and what is allowed, before anything is changed."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass import RuleError, rule, zeros
from optimizers import NpuFusedAdam, lion
from tests.support.training import assert_fused, gradients, last_report, parameters, set_gradients, train
from tests.support.unchanged import Unchanged


@rule(
    states={"average": zeros},
    defaults={"lr": 0.1, "betas": (0.9, 0.99), "flag": False, "mode": "mean", "clip": None},
    ranges={"lr": (0.0, None), "betas": (0.0, 1.0), "clip": (0.0, 10.0)},
)
def smoothed(
    param: Tensor, grad: Tensor, average: Tensor, *, lr: Tensor, betas: tuple[Tensor, Tensor], flag: bool, mode: str
) -> tuple[Tensor, Tensor]:
    average = betas[0] * average + (1 - betas[0]) * grad
    return param - lr * (average if flag else average * betas[1]), average


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": "0.1"}, "lr='0.1'; allowed is a number, as its default 0.1 is"),
    ({"lr": True}, "lr=True; allowed is a number"),
    ({"lr": (0.1, 0.2)}, "lr=(0.1, 0.2); allowed is a number"),
    ({"lr": torch.ones(3)}, "lr=tensor([1., 1., 1.])"),
    ({"lr": -0.1}, "lr=-0.1; allowed are numbers >= 0"),
    ({"lr": float("nan")}, "lr=nan; allowed are numbers >= 0"),
    ({"betas": 0.9}, "betas=0.9; allowed is a tuple of numbers, as its default (0.9, 0.99) is"),
    ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0); allowed are numbers >= 0 and < 1"),
    ({"betas": (0.9, "1")}, "betas=(0.9, '1')"),
    ({"betas": (0.9,)}, "betas=(0.9,)"),
    ({"flag": 1}, "flag=1; allowed is True or False"),
    ({"mode": 3}, "mode=3; allowed is a string"),
    ({"clip": 10}, "clip=10; allowed are numbers >= 0 and < 10"),
]
wrong = pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")


@wrong
def test_a_new_optimizer(given: dict[str, Any], message: str) -> None:
    for make in (lambda p: smoothed(p, **given), lambda p: smoothed([{"params": p, **given}])):
        with pytest.raises(RuleError) as error:
            make(parameters())
        assert message in str(error.value)
        assert isinstance(error.value, ValueError)


@wrong
def test_a_new_group_and_a_checkpoint(given: dict[str, Any], message: str) -> None:
    """How many numbers a tuple needs is seen when the rule is tried."""
    if given == {"betas": (0.9,)}:
        return
    params, others = parameters(), parameters(seed=1)
    opt = smoothed(params)
    train(params, opt.step)
    unchanged = Unchanged(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(given)
    changes: list[Callable[[], None]] = [
        lambda: opt.add_param_group({"params": others, **given}),
        lambda: opt.load_state_dict(saved),
    ]
    for change in changes:
        with pytest.raises(RuleError) as error:
            change()
        assert message in str(error.value)
        unchanged()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("value", ["0.1", True, (0.1, 0.2)], ids=str)
def test_a_number_that_becomes_something_else_between_steps(mode: str, value: Any) -> None:
    params = parameters()
    opt = smoothed(params)
    npu_fuse_pass.clear_reports()
    step = torch.compile(opt.step, backend="npu_fused") if mode == "compiled" else opt.step
    train(params, step)
    opt.param_groups[0]["lr"] = value
    set_gradients(params, gradients(params, 7))
    unchanged = Unchanged(opt)
    with pytest.raises(RuleError) as error:
        step()
    assert f"lr={value!r}; allowed is a number" in str(error.value)
    unchanged()
    opt.param_groups[0]["lr"] = 0.1
    train(params, step)
    if mode == "compiled":
        assert_fused(last_report(), parameters=len(params))


def test_right_ones() -> None:
    """Ints for floats, lists for tuples, None, tensors of one element, and what no rule reads."""
    for given in (
        {"lr": 1},
        {"lr": torch.tensor(0.1)},
        {"betas": [0, 0.5]},
        {"mode": None},
        {"clip": 0},
        {"lr": float("inf")},
    ):
        smoothed(parameters(), **given)
    params = parameters()
    opt = smoothed([{"params": params, "initial_lr": 0.1, "name": "body"}])
    train(params, opt.step)
    assert opt.param_groups[0]["name"] == "body"


def plain(param: Tensor, grad: Tensor, *, lr: Tensor) -> Tensor:
    return param - lr * grad


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"rate": (0, 1)}, "a range for 'rate'; its hyperparameters are ['lr']"),
        ({"lr": 0}, "range lr=0; allowed is (least or None, bound or None)"),
        ({"lr": (0, "1")}, "range lr=(0, '1')"),
        ({"lr": (1, None)}, "lr=0.1; allowed are numbers >= 1"),
    ],
    ids=str,
)
def test_wrong_declarations(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError) as error:
        rule(defaults={"lr": 0.1}, ranges=ranges)(plain)
    assert message in str(error.value) and "plain" in str(error.value)


def test_ranges_are_kept_by_pickles_of_rules_that_are_values() -> None:
    made = rule(defaults={"lr": 0.1}, ranges={"lr": (0, None)})(plain)
    again = pickle.loads(pickle.dumps(made))
    assert again.ranges == {"lr": (0, None)}
    with pytest.raises(RuleError, match="lr=-1"):
        again(parameters(), lr=-1)


@pytest.mark.parametrize(("name", "value"), [("betas", (0.9,)), ("betas", None), ("lr", None), ("eps", None)], ids=str)
def test_what_the_rule_fails_with_is_refused_before_another_group_is_updated(name: str, value: Any) -> None:
    params = parameters()
    opt = NpuFusedAdam([{"params": [p]} for p in params], lr=0.1)
    opt.param_groups[-1][name] = value
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuleError, match=re.escape("rule 'adam' fails with") + ".*" + re.escape(f"{name}={value!r}")):
        opt.step()
    assert all(map(torch.equal, before, params)) and not any(opt.state.get(p) for p in params)


@pytest.mark.parametrize("wrong", [10**400, torch.empty((), device="meta")], ids=["too large", "without a value"])
def test_numbers_that_no_float_holds_are_named(wrong: Any) -> None:
    params = parameters()
    with pytest.raises(ValueError, match="Invalid eps"):
        NpuFusedAdam(params, eps=wrong)
    with pytest.raises(ValueError, match="weight_decay="):
        lion(params, weight_decay=wrong)
    opt = lion(params)
    set_gradients(params, gradients(params, 0))
    opt.param_groups[0]["lr"] = wrong
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="lr="):
        opt.step()
    assert all(map(torch.equal, before, params))
