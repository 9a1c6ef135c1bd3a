"""torch.optim's own classes as update rules: `compile_step` of them needs no Dynamo, and steps on their own states."""

from __future__ import annotations

import copy
import gc
import importlib.util
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.algorithms.nadam import nadam
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.stock.entries import put_in_order
from tests.behaviour.test_optim_db import assert_equal
from tests.support.optim_cases import CASES, Case, run
from tests.support.torch_rules import STOCK, assert_same_states
from tests.support.training import (
    FULL,
    assert_close,
    assert_fused,
    clones,
    gradients,
    heard,
    last_report,
    parameters,
    set_gradients,
    tier,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*switched it off.*")

CLASSES = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")
ALL = [case for case in CASES if case.name in CLASSES and case.form != "unwrapped"]
DB = ALL if FULL else tier([case for case in ALL if case.form == "method" and case.implementation != "fused"])
SHAPES = ((3, 4), (5,), (2, 3, 2), (), (5,))
NAMES = list(STOCK) if FULL else ["Adam", "SGD", "Rprop", "ASGD"]


@pytest.fixture(autouse=True)
def _alone() -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()


def rule_report(parameters: int) -> Any:
    """The last report: one group, run as a rule."""
    report = last_report()
    assert report.replaces is not None and report.no_rule is None, report
    assert_fused(report, parameters=parameters)
    return report


class Twins:
    """An optimizer whose step is compiled, and the same one eagerly, in the same hands."""

    def __init__(self, name: str, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        npu_fuse_pass.clear_reports()
        self.params = parameters(shapes, dtype)
        self.others = clones(self.params)
        self.opt, self.eager = (STOCK[name](ps, **options) for ps in (self.params, self.others))
        self.step = npu_fuse_pass.compile_step(self.opt)
        self.seed = 0

    def train(self, steps: int = 2, without: Any = ()) -> None:
        for _ in range(steps):
            grads = [None if i in without else g for i, g in enumerate(gradients(self.params, self.seed))]
            for ps in (self.params, self.others):
                set_gradients(ps, grads)
            self.seed += 1
            self.step()
            self.eager.step()

    def both(self, change: Callable[[Any, list[Any]], Any]) -> None:
        change(self.opt, self.params)
        change(self.eager, self.others)

    def check(self, limit: float = 1e-5) -> None:
        assert_close(self.params, self.others, limit)
        assert_same_states(self.opt, self.eager, limit)


# torch's database -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DB, ids=str)
def test_case(case: Case) -> None:
    """Every input of torch's database, as one group; what asks for another step is captured by Dynamo, and says so."""
    with heard() as said:
        got = run(case, "npu_fused", compiled=npu_fuse_pass.compile_step)
    reports = [r for r in npu_fuse_pass.reports() if r.groups]
    assert_equal(case, got, run(case, None))
    assert all("fused=True" in text for text in said)
    if case.kwargs.get("capturable"):
        assert {(r.no_rule.code, r.replaces) for r in reports} == {(Code.NO_RULE, None)}
        assert all("capturable" in r.no_rule.text for r in reports)
        return
    (report,) = reports
    assert report.replaces == f"torch.optim.{case.name}" and report.no_rule is None
    assert_fused(report, parameters=4)
    assert [group.updates for group in report.groups] == [4]


# What a training loop does between steps ------------------------------------------------------------------------------


def eager_step(t: Twins) -> None:
    """An uncompiled step of the same object, in between."""
    for opt, ps in ((t.opt, t.params), (t.eager, t.others)):
        set_gradients(ps, gradients(ps, 77))
        opt.step()


def reload(t: Twins) -> None:
    t.both(lambda opt, ps: opt.load_state_dict(copy.deepcopy(opt.state_dict())))


def new_group(t: Twins) -> None:
    more = parameters(((2, 2),), seed=5)
    for opt, ps, new in ((t.opt, t.params, more), (t.eager, t.others, clones(more))):
        ps += new
        opt.add_param_group(dict(params=new, lr=0.5))


def other_numbers(t: Twins) -> None:
    t.both(lambda opt, ps: opt.param_groups[0].update(lr=0.003, weight_decay=0.2))


def turned_around(t: Twins) -> None:
    t.both(lambda opt, ps: opt.param_groups[0].update(maximize=True))


def decay_in_the_other_way(t: Twins) -> None:
    def turn(opt: Any, ps: list[Any]) -> None:
        for group in opt.param_groups:
            group["weight_decay"] = 0.2
            if "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = not group["decoupled_weight_decay"]

    t.both(turn)


def states_exchanged(t: Twins) -> None:
    def exchange(opt: Any, ps: list[Any]) -> None:
        for entry in opt.state.values():
            for name, value in list(entry.items()):
                if isinstance(value, Tensor) and name != "step":
                    entry[name] = value * 0.5

    t.both(exchange)


def states_moved(t: Twins) -> None:
    """The objects stay, their memory does not."""

    def move(opt: Any, ps: list[Any]) -> None:
        for entry in opt.state.values():
            for value in entry.values():
                if isinstance(value, Tensor):
                    value.data = value.detach().clone()

    t.both(move)


def states_cleared(t: Twins) -> None:
    t.both(lambda opt, ps: opt.state.clear())


def one_begins_anew(t: Twins) -> None:
    t.both(lambda opt, ps: opt.state.pop(ps[0], None))


def parameter_replaced(t: Twins) -> None:
    t.both(lambda opt, ps: setattr(ps[0], "data", ps[0].detach() + 1))


def a_key_of_its_own(t: Twins) -> None:
    t.both(lambda opt, ps: opt.state[ps[0]].update(note="mine"))


CHANGES = [eager_step, reload, new_group, other_numbers, turned_around, states_exchanged, states_moved]
CHANGES += [decay_in_the_other_way, states_cleared, one_begins_anew, parameter_replaced, a_key_of_its_own]


@pytest.mark.parametrize(
    ("name", "change"),
    tier([(name, change) for name in STOCK for change in CHANGES]),
    ids=lambda x: x if isinstance(x, str) else str(x.__name__),
)
def test_what_happens_between_steps_counts(name: str, change: Callable[[Twins], None]) -> None:
    twins = Twins(name)
    twins.train(3)
    change(twins)
    twins.train(3)
    twins.check()
    rule_report(len(twins.params))
    anew = change in (new_group, turned_around) or (
        change is decay_in_the_other_way and "decoupled_weight_decay" in twins.opt.param_groups[0]
    )
    assert sum(bool(r.groups) for r in npu_fuse_pass.reports()) == 1 + anew


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_come_and_go(name: str) -> None:
    """States are made at the first gradient; without one a parameter, its counter and its states stay."""
    twins = Twins(name)
    for without in ((0, 2), (0,), (), (1, 3), (0, 1, 2, 3), ()):
        twins.train(1, without)
        twins.check()
    rule_report(len(twins.params))


@pytest.mark.parametrize("name", NAMES)
def test_states_are_the_optimizers_own(name: str) -> None:
    """The same tensors from step to step: who holds one sees what steps make of it."""
    twins = Twins(name)
    twins.train(1)
    held = [(entry, dict(entry)) for entry in twins.opt.state.values()]
    twins.train(3)
    assert all(entry[key] is value for entry, values in held for key, value in values.items())
    assert type(twins.opt.state) is type(twins.eager.state)
    twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_float64_and_several_groups_are_one_group_for_each_dtype(name: str) -> None:
    params = [*parameters(SHAPES), *parameters(SHAPES, torch.float64)]
    others = clones(params)
    opt, eager = (STOCK[name]([dict(params=ps[::2]), dict(params=ps[1::2], lr=0.004)]) for ps in (params, others))
    step = npu_fuse_pass.compile_step(opt)
    train(params, step)
    train(others, eager.step)
    for kind in (slice(0, 5), slice(5, 10)):
        assert_close(params[kind], others[kind], 1e-5 if kind.start == 0 else 1e-12)
    assert sorted(g.updates for g in rule_report(10).groups) == [5, 5]


def test_hooks_closures_schedulers_and_profiles() -> None:
    twins = Twins("Adam")
    called: list[tuple[str, int, Any]] = []
    for label, opt in (("compiled", twins.opt), ("eager", twins.eager)):
        opt.register_step_pre_hook(lambda o, args, kwargs, label=label: called.append((label, 0, len(args))))
        opt.register_step_post_hook(lambda o, args, kwargs, label=label: called.append((label, 1, len(args))))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (twins.opt, twins.eager)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            twins.train(1)
            for schedule in schedules:
                schedule.step()
    assert called == [(label, when, 1) for _ in range(3) for label in ("compiled", "eager") for when in (0, 1)]
    assert twins.opt.param_groups[0]["lr"] == twins.eager.param_groups[0]["lr"] == 0.0025

    def closure_of(params: list[Any]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            for p in params:
                p.grad = None
            loss = torch.stack([(p * p).sum() for p in params]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return closure

    assert_close([twins.step(closure_of(twins.params))], [twins.eager.step(closure_of(twins.others))])
    assert_close([twins.step(closure=closure_of(twins.params))], [twins.eager.step(closure=closure_of(twins.others))])
    assert twins.step(None) is twins.eager.step(None) is None  # as wrappers hand on a closure that they were not given
    assert twins.step(closure=None) is twins.eager.step(closure=None) is None
    for step in (twins.step, twins.eager.step):
        with pytest.raises(TypeError, match="other"):
            step(other=None)  # type: ignore[call-arg]
    twins.check()
    rule_report(5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        twins.step()
    names = [e.name for e in profile.events()]
    assert "Optimizer.step#Adam.step" in names and sum(n.startswith("update_") for n in names) == 1


def test_a_hook_that_changes_gradients_and_groups() -> None:
    twins = Twins("SGD")

    def hook(opt: Any, args: Any, kwargs: Any) -> None:
        opt.param_groups[0]["lr"] *= 0.5
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = p.grad * 2

    twins.both(lambda opt, ps: opt.register_step_pre_hook(hook))
    twins.train(4)
    twins.check()
    rule_report(5)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_copy_steps_by_itself(name: str) -> None:
    twins = Twins(name)
    twins.train(2)
    before = [p.detach().clone() for p in twins.params]
    copied = copy.deepcopy(twins.opt)
    step = npu_fuse_pass.compile_step(copied)
    for group in copied.param_groups:
        set_gradients(group["params"], gradients(group["params"], 9))
    step()
    assert all(torch.equal(p, old) for p, old in zip(twins.params, before, strict=True))
    twins.train(2)
    twins.check()


def test_a_loaded_checkpoint_of_another_optimizer() -> None:
    twins = Twins("Adam")
    twins.train(3)
    saved = twins.eager.state_dict()
    new = Twins("Adam")
    for opt in (new.opt, new.eager):
        opt.load_state_dict(copy.deepcopy(saved))
    new.train(3)
    new.check()
    rule_report(5)


# The other roads ------------------------------------------------------------------------------------------------------


class Own(torch.optim.SGD):
    """A subclass, whose step may be another one."""


def replaced_step(p: Any) -> Any:
    opt = torch.optim.SGD(p, lr=0.1)
    before = opt.step
    opt.step = lambda *args: before(*args)  # type: ignore[method-assign]
    return opt


OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "subclass": (lambda p: Own(p, lr=0.1), "Own may step otherwise than SGD"),
    "no rule": (lambda p: torch.optim.Muon(p, lr=0.1), "no rule is Muon's"),
    "step replaced": (replaced_step, "has taken the place"),
    "Nesterov foreach": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
        "writes to the gradients",
    ),
    "capturable": (lambda p: torch.optim.Adam(p, lr=0.1, capturable=True), "capturable=True"),
    "bfloat16": (lambda p: torch.optim.SGD([q.detach().bfloat16().requires_grad_() for q in p], lr=0.1), "bfloat16"),
    "complex": (lambda p: torch.optim.Adam([torch.randn(3, dtype=torch.complex64, requires_grad=True)]), "complex64"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:npu_fused")
def test_what_takes_another_road_says_why(name: str) -> None:
    make, says = OTHERS[name]
    opt = make(parameters(((3, 4), (2, 2))))
    step = npu_fuse_pass.compile_step(opt)
    for _ in range(3):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        step()
    report = last_report()
    assert report.replaces is None and report.no_rule.code is Code.NO_RULE and says in report.no_rule.text
    assert says in str(report) and says in report.to_json()["no_rule"]["text"]


WRITING: dict[str, dict[str, Any]] = {
    "SGD": dict(lr=0.1, momentum=0.9),
    "SGD Nesterov": dict(lr=0.1, momentum=0.9, nesterov=True),
    "SGD Nesterov decay": dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD Nesterov maximize": dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "Rprop": {},
    "Rprop maximize": dict(maximize=True),
    "Adam decay": dict(weight_decay=0.1),
}


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("name", WRITING)
def test_gradients_are_what_torchs_step_leaves(name: str, foreach: bool) -> None:
    """Some forms of torch's steps write to the gradients."""
    cls = getattr(torch.optim, name.split()[0])
    params = parameters(((3, 4), (5,)))
    others = clones(params)
    opt, eager = (cls(ps, foreach=foreach, **WRITING[name]) for ps in (params, others))
    step = npu_fuse_pass.compile_step(opt)
    for seed in range(3):
        for ps in (params, others):
            set_gradients(ps, gradients(ps, seed))
        step()
        eager.step()
        assert_close([p.grad for p in params], [p.grad for p in others])
    assert_close(params, others)
    assert_fused(last_report(), parameters=2)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_npus_without_torch_npu() -> None:
    params = parameters(((3, 4),))
    before = clones(params)
    step = npu_fuse_pass.compile_step(torch.optim.SGD(params, lr=0.1), platform="npu")
    set_gradients(params, gradients(params, 0))
    for _ in range(2):
        with pytest.raises(npu_fuse_pass.PlatformError, match="torch_npu"):
            step()
    assert_close(params, before, 0)


def test_sparse_gradients_step_as_torch_does() -> None:
    """SGD takes them: the first such step is torch's own, later ones another road's."""
    twins = Twins("SGD plain", ((3, 4), (5, 2)), weight_decay=0)
    twins.train(2)
    for ps in (twins.params, twins.others):
        ps[0].grad = torch.ones(3, 4).to_sparse()
    twins.step()
    twins.eager.step()
    twins.check()


def test_memory_that_is_shared_is_stepped_by_torch() -> None:
    """As in torch's own step, one after the other; states that a step would have begun are torch's."""
    buffer = torch.randn(12)

    def make(b: Tensor) -> list[Any]:
        return [torch.nn.Parameter(b[:8].view(2, 4)), torch.nn.Parameter(b[4:])]

    params, others = make(buffer), make(buffer.clone())
    opt, eager = (STOCK["SGD"](ps) for ps in (params, others))
    step = npu_fuse_pass.compile_step(opt)
    with heard() as said:
        train(params, step, seeds=range(3))
        train(others, eager.step, seeds=range(3))
    assert sum("share memory" in text for text in said) == 1
    assert_close(params, others, 1e-6)
    assert_same_states(opt, eager, 1e-6)


def test_counters_that_several_parameters_share() -> None:
    """torch counts such one once for each of them."""
    twins = Twins("Adam")
    twins.train(1)

    def share(opt: Any, ps: list[Any]) -> None:
        for p in ps[1:]:
            opt.state[p]["step"] = opt.state[ps[0]]["step"]

    twins.both(share)
    twins.train(1)
    twins.check()


KEPT_NUMBERS = {"NAdam": ("mu_product",), "ASGD": ("eta", "mu")}


@pytest.mark.parametrize("name", KEPT_NUMBERS)
def test_numbers_of_a_parameter_are_torchs_bits(name: str) -> None:
    """Also where a step of torch's own comes in between, and the learning rate changes."""
    twins = Twins(name, foreach=False)
    for change in (eager_step, other_numbers):
        twins.train(3)
        change(twins)
    twins.train(3)
    for p, q in zip(twins.params, twins.others, strict=True):
        for key in (*KEPT_NUMBERS[name], "step"):
            mine, torchs = twins.opt.state[p][key], twins.eager.state[q][key]
            assert torch.equal(mine, torchs) and mine.dtype == torchs.dtype, (key, mine, torchs)
    rule_report(5)


def test_a_variance_of_roundings_alone() -> None:
    """Centered RMSprop divides by what roundings leave of a constant gradient's variance, or is not a number."""
    twins = Twins("RMSprop", ((1000,),), alpha=0.8, eps=1e-8, momentum=0, lr=1e-4)
    for _ in range(150):
        twins.seed = 0
        twins.train(1)
    assert torch.isnan(twins.others[0]).any()
    torch.testing.assert_close(twins.params, twins.others, rtol=1e-5, atol=1e-5, equal_nan=True)
    rule_report(1)


@pytest.mark.parametrize("name", KEPT_NUMBERS if FULL else ["NAdam"])
@pytest.mark.filterwarnings("ignore:npu_fused")
def test_numbers_that_a_rule_does_not_keep(name: str) -> None:
    """A checkpoint of float64 parameters gives them in float64; torch multiplies there in float64, too."""
    twins = Twins(name, dtype=torch.float64)
    twins.train(2)
    rule_report(5)
    reload(twins)
    twins.train(2)
    twins.check(1e-7)  # captured, eta is not rounded to float32 on its way, as torch's is
    assert KEPT_NUMBERS[name][0] in last_report().no_rule.text


def test_a_rule_with_numbers_of_a_parameter_is_no_optimizer_of_ours() -> None:
    with pytest.raises(npu_fuse_pass.RuleError, match="'mu_product' is one number"):
        nadam(parameters(((3,),)))


def test_strict_raises_before_anything_changes() -> None:
    params = parameters(((3,), (4,)))
    params[1].data = params[0].data
    opt = STOCK["SGD"](params)
    set_gradients(params, [torch.ones(3), torch.ones(3)])
    before = params[0].detach().clone()
    with pytest.raises(npu_fuse_pass.UnfusedError, match="share memory"):
        npu_fuse_pass.compile_step(opt, strict=True)()
    assert torch.equal(params[0], before) and not any(opt.state.values())


def test_an_optimizer_and_its_step_are_collected() -> None:
    twins = Twins("Adam")
    twins.train(3)
    watched = [weakref.ref(x) for x in (twins.opt, twins.params[0], twins.opt.state[twins.params[0]]["exp_avg"])]
    del twins
    gc.collect()
    assert [w() for w in watched] == [None] * 3


def test_small_states_are_put_in_order() -> None:
    """Name by name; the tensors are others, but for large ones, with the values that they had."""
    entries: list[dict[str, Any]] = [
        {"step": torch.tensor(2.0), "a": torch.rand(3, 4), "b": torch.rand(200, 100), "c": None},
        {"a": torch.rand(2), "b": None},
    ]
    before = [{name: (id(v), v if v is None else v.clone()) for name, v in entry.items()} for entry in entries]
    put_in_order(entries)
    for entry, old in zip(entries, before, strict=True):
        assert list(entry) == list(old)
        for name, (known, value) in old.items():
            assert (id(entry[name]) == known) == (value is None or value.numel() > 100)
            assert value is None or torch.equal(entry[name], value)


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def of_memory(entry: dict[str, Any], memory: Any, tensor: Tensor) -> Any:
    entry["a"] = tensor
    return memory


def of_array(entry: dict[str, Any]) -> Any:
    return of_memory(entry, array := entry["a"].numpy().copy(), torch.from_numpy(array))


def of_buffer(entry: dict[str, Any]) -> Any:
    return of_memory(entry, buffer := bytearray(12), torch.frombuffer(buffer, dtype=torch.float32))


HELD: dict[str, Callable[[dict[str, Any]], object]] = {
    "the tensor": lambda entry: entry["a"],
    "the tensor, weakly": lambda entry: weakref.ref(entry["a"]),
    "a view": lambda entry: entry["a"][1:],
    "its memory": lambda entry: entry["a"].untyped_storage(),
    "an array": lambda entry: entry["a"].numpy(),
    "an array that it was made of": of_array,
    "a buffer that it was made of": of_buffer,
    "a graph": lambda entry: (torch.ones(3, requires_grad=True) * entry["a"]).sum(),
    "another process": lambda entry: bool(entry["a"].share_memory_().numel()),
    "an attribute": lambda entry: setattr(entry["a"], "note", "mine"),
    "inference": lambda entry: entry.update(a=inferred()),
    "autograd": lambda entry: bool(entry["a"].requires_grad_().numel()),
}


@pytest.mark.parametrize("holds", HELD)
def test_states_that_something_else_holds_stay(holds: str) -> None:
    entry: dict[str, Any] = {"a": torch.rand(3), "b": torch.rand(3)}
    held = HELD[holds](entry)
    a, b = id(entry["a"]), id(entry["b"])
    put_in_order([entry])
    assert id(entry["a"]) == a and id(entry["b"]) != b, held


@pytest.mark.parametrize("name", ["Adagrad", "Adam"])
def test_states_are_put_in_order_once(name: str) -> None:
    """At the first step those of the constructor, too, and those of a checkpoint; then they are the same objects."""
    twins = Twins(name)
    twins.train(1, (0,))
    for _ in range(2):
        first = {p: dict(entry) for p, entry in twins.opt.state.items()}
        twins.train(2)
        for p, entry in first.items():
            assert all(twins.opt.state[p][key] is value for key, value in entry.items())
        del first, entry
        twins.check()
        reload(twins)
        known = {id(v) for entry in twins.opt.state.values() for v in entry.values()}
        twins.train(1)
        assert not known & {id(v) for entry in twins.opt.state.values() for v in entry.values()}
    rule_report(len(twins.params))


@pytest.mark.parametrize("name", ["Adagrad", "Adam"])
def test_a_first_step_in_inference_mode_leaves_states_that_later_steps_can_write(name: str) -> None:
    """Those that it has not made: of the constructor, or of a checkpoint."""
    twins = Twins(name)
    if name == "Adam":
        twins.train(1)
        reload(twins)
    with torch.inference_mode():
        twins.train(1)
    twins.train(2)
    twins.check()
    rule_report(len(twins.params))
