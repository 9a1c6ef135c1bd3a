"""What the optimizers share with torch.optim: checkpoints, hooks, schedulers, copies; and bad input."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import npu_fuse_pass
import optimizers
from tests.support.cases import BY_NAME, CASES, NPU, ONE_EACH, Case, over
from tests.support.training import MODES, Step, assert_close, clones, gradients, parameters, set_gradients, train

modes = pytest.mark.parametrize("mode", MODES)
STOCK = [c for c in CASES if c.stock]


def both(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Any]:
    """The same parameters twice, with our class and with torch.optim's."""
    params = parameters(dtype=dtype)
    others = clones(params)
    return params, case.build(params), others, case.stock(others, **case.options)


@over(STOCK)
@modes
def test_checkpoint_of_torch_optim(case: Case, mode: str) -> None:
    params, opt, others, stock = both(case)
    train(others, stock.step, seeds=range(3))
    opt.load_state_dict(copy.deepcopy(stock.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)
    step = Step(opt, mode)
    train(params, step, seeds=range(3, 6))
    train(others, stock.step, seeds=range(3, 6))
    assert_close(params, others, 1e-13)
    step.check(len(params))


@over(STOCK)
@modes
def test_checkpoint_for_torch_optim(case: Case, mode: str) -> None:
    params, opt, others, stock = both(case)
    train(params, Step(opt, mode), seeds=range(3))
    saved = copy.deepcopy(opt.state_dict())
    stock.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    train(params, opt.step, seeds=range(3, 6))
    train(others, stock.step, seeds=range(3, 6))
    assert_close(params, others, 1e-13)
    mine, theirs = saved["state"][0] if case.states else {}, stock.state_dict()["state"].get(0, {})
    assert {k for k, v in theirs.items() if v is not None} <= mine.keys()


@over(ONE_EACH)
def test_state_dict_round_trip(case: Case) -> None:
    """Layout as torch.optim's, through a file."""
    params = parameters([(1000,), (3,)])
    opt = case.build(params)
    train(params, opt.step, seeds=range(2))
    saved = copy.deepcopy(opt.state_dict())
    assert set(saved) == {"state", "param_groups"}
    assert saved["param_groups"][0]["params"] == [0, 1]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    train(params, opt.step, seeds=[5])
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
    again = opt.state_dict()
    for i, entry in saved["state"].items():
        assert all(torch.equal(v, again["state"][i][k]) for k, v in entry.items())
        assert opt.state[params[i]].keys() == entry.keys()


@over(NPU)
def test_options_that_a_checkpoint_lacks(case: Case) -> None:
    params = parameters()
    opt = case.build(params)
    saved = opt.state_dict()
    want = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    for name in want.keys() - {"lr"}:
        del saved["param_groups"][0][name]
    opt.load_state_dict(saved)
    assert {k: opt.param_groups[0][k] for k in want} == want
    saved["param_groups"][0]["maximize"] = True
    with pytest.raises(ValueError, match="Invalid maximize value: True"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("make", "decouples"), [(optimizers.NpuFusedAdam, False), (optimizers.NpuFusedAdamW, True)])
def test_the_kind_of_weight_decay_in_a_group(make: Any, decouples: bool, decoupled: bool) -> None:
    """torch.optim.Adam and AdamW are one class with an option; ours are two."""
    saved = torch.optim.Adam(parameters(), weight_decay=0.5).state_dict()
    saved["param_groups"][0]["decoupled_weight_decay"] = decoupled  # on torch 2.7, too
    opt = make(parameters(), lr=0.5)
    group = {"params": parameters(), "decoupled_weight_decay": decoupled}
    if decoupled == decouples:
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["weight_decay"] == 0.5
        opt.add_param_group(group)
        return
    for change, given in ((opt.load_state_dict, saved), (opt.add_param_group, group)):
        with pytest.raises(ValueError, match=f"decoupled_weight_decay value: {decoupled} .allowed: {decouples}; Npu"):
            change(given)
    (own,) = opt.param_groups
    assert own["lr"] == 0.5 and "decoupled_weight_decay" not in own  # nothing was changed


@over(ONE_EACH)
@modes
def test_assigning_a_state(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    train(params, step, oracle, [0])
    for name in case.states:
        opt.state[params[0]][name] = torch.full((3, 4), 0.5)
        oracle.states[0][name] = torch.full((3, 4), 0.5, dtype=torch.float64)
        opt.state[params[1]][name].mul_(0.5)
        oracle.states[1][name] = oracle.states[1][name] * 0.5
    train(params, step, oracle, [1, 2])
    assert_close(params, oracle.values)
    step.check(len(params))


@over([c for c in ONE_EACH if c.name != "paddle_rmsprop"])
@modes
def test_hooks(case: Case, mode: str) -> None:
    """Instance and global hooks, before and after, once per step; a pre-hook may change gradients."""
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    calls: list[str] = []

    def scale(optimizer: Any, args: Any, kwargs: Any) -> None:
        assert optimizer is opt
        calls.append("pre")
        for p in params:
            p.grad = p.grad * 2

    handles = [
        opt.register_step_pre_hook(scale),
        opt.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    step = Step(opt, mode)
    for seed in range(2):
        grads = gradients(params, seed)
        set_gradients(params, grads)
        step()
        oracle.step([2 * g for g in grads])
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(["global post", "global pre", "post", "pre"] * 2)
    assert calls.index("pre") < calls.index("post")
    train(params, step, oracle, [7])
    assert len(calls) == 8
    assert_close(params, oracle.values)
    step.check(len(params))


@over([BY_NAME[n] for n in ("sgd_momentum", "sgd_nesterov", "adam", "adamw", "adam_amsgrad")])
@modes
@pytest.mark.parametrize("scheduler", [
    lambda o: StepLR(o, 2, 0.5),
    lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20, base_momentum=0.7, max_momentum=0.9),
], ids=["StepLR", "OneCycleLR"])  # fmt: skip
def test_schedulers(case: Case, mode: str, scheduler: Any) -> None:
    """Against torch.optim under the same scheduler; OneCycleLR cycles momentum or betas. One compile."""
    params, opt, others, stock = both(case)
    step = Step(opt, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = scheduler(opt), scheduler(stock)
        for seed in range(12):
            grads = gradients(params, seed)
            set_gradients(params, grads)
            set_gradients(others, grads)
            step()
            stock.step()
            for schedule in schedules:
                schedule.step()
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr() != [case.options["lr"]]
    assert_close(params, others, 1e-13)
    step.check(len(params))
    assert mode == "eager" or [report.cause for report in npu_fuse_pass.reports()] == ["compile"]


@over(ONE_EACH)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "dump"])
def test_copies_before_a_step(case: Case, copied: Any) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    opt.step()
    other = copied(opt)
    others = [p for group in other.param_groups for p in group["params"]]
    train(others, other.step, oracle)
    assert_close(others, oracle.values)
    for name in ("adam", "use_global_grad_norm", "name", "state_dtype"):
        assert getattr(other, name, None) == getattr(opt, name, None)
    assert opt.defaults.items() <= other.defaults.items()
    other.add_param_group({"params": parameters(seed=3)})


@over(ONE_EACH)
def test_complex_parameters_are_refused(case: Case) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="complex"):
        case.build([p]).step()


def test_closure_may_return_anything() -> None:
    params: list[Tensor] = list(parameters())
    opt = BY_NAME["adam"].build(params)
    assert opt.step(lambda: "loss") == "loss"
    assert opt.step() is None
