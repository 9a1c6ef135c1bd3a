"""The values at the call count: what a compiled function changes before `opt.step()` is what the step computes with.

Dynamo carries out changes of Python objects behind the graph; where that would be too late, the graph ends before the
step, which then has a graph of its own, fused.
"""

from __future__ import annotations

import collections
import copy
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.rules import pending
from optimizers import NpuFusedAdam
from tests.support.cases import BY_NAME
from tests.support.selection import covering
from tests.support.training import (
    FULL,
    assert_close,
    assert_fused,
    clones,
    error,
    gradients,
    last_report,
    parameters,
    set_gradients,
    step_with_a_shared_gradient,
    train,
)

SHAPES = [(3, 4), (5,), (3, 4)]
Change = Callable[[Any, list[Tensor], int], None]  # of an optimizer and its parameters, at call i
CHANGES: dict[str, Change] = {}


def assert_trained_alike(trained: Callable[[bool], list[Tensor]], tolerance: float | None = None) -> None:
    """What a training gives compiled and eagerly is the same, and something of it was fused."""
    assert_close(trained(True), trained(False), tolerance)
    assert any(r.groups for r in npu_fuse_pass.reports())


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


@change
def lr(opt: Any, params: list[Tensor], i: int) -> None:
    for group in opt.param_groups:
        group[rate(opt)] = 0.01 * (i + 1)


@change
def weight_decay(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups[0]["weight_decay"] = 0.1 * i


@change
def factors(opt: Any, params: list[Tensor], i: int) -> None:
    group = opt.param_groups[0]
    if "betas" in group:
        group["betas"] = (0.5 + 0.1 * i, 0.9)
    else:
        group["momentum"] = 0.5 + 0.1 * i


@change
def several_at_once(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups[0].update({rate(opt): 0.02 * (i + 1), "weight_decay": 0.2})


@change
def another_group(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups[0] = {**opt.param_groups[0], rate(opt): 0.02 * (i + 1)}


@change
def other_groups(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups = [{**group, "weight_decay": 0.3 * i} for group in opt.param_groups]


@change
def fewer_parameters(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups[0]["params"] = params[: 3 - i % 2]


@change
def tensor_lr(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups[0][rate(opt)] = torch.tensor(0.01) * (i + 1)


@change
def tensor_lr_in_place(opt: Any, params: list[Tensor], i: int) -> None:
    opt.param_groups[0]["lr"].mul_(0.5)


@change
def cleared_states(opt: Any, params: list[Tensor], i: int) -> None:
    opt.state.clear()


@change
def other_states(opt: Any, params: list[Tensor], i: int) -> None:
    opt.state = collections.defaultdict(dict, {p: opt.state[p] for p in params[i % 2 :] if p in opt.state})


@change
def cleared_entry(opt: Any, params: list[Tensor], i: int) -> None:
    opt.state[params[0]].clear()


@change
def replaced_states(opt: Any, params: list[Tensor], i: int) -> None:
    entry = opt.state[params[0]]
    for name in [n for n in entry if n != "step"]:
        entry[name] = torch.full((3, 4), 0.5)


@change
def states_in_place(opt: Any, params: list[Tensor], i: int) -> None:
    for value in opt.state[params[2]].values():
        if value is not None:
            value.mul_(0.5)


@change
def popped_entry(opt: Any, params: list[Tensor], i: int) -> None:
    opt.state.pop(params[1], None)


@change
def grad_assigned(opt: Any, params: list[Tensor], i: int) -> None:
    params[0].grad = torch.full((3, 4), 1.0 - i)


@change
def grad_dropped(opt: Any, params: list[Tensor], i: int) -> None:
    params[i % 3].grad = None


@change
def grad_deleted(opt: Any, params: list[Tensor], i: int) -> None:
    del params[i % 3].grad


@change
def grads_cloned(opt: Any, params: list[Tensor], i: int) -> None:
    for p in params:
        if p.grad is not None:
            p.grad = p.grad.clone()
            p.grad.add_(0.5)


@change
def grads_scaled(opt: Any, params: list[Tensor], i: int) -> None:
    for p in params:
        if p.grad is not None:
            p.grad = p.grad * 0.25


@change
def zeroed_gradients(opt: Any, params: list[Tensor], i: int) -> None:
    opt.zero_grad()
    params[1].grad = torch.ones(5)


@change
def data_assigned(opt: Any, params: list[Tensor], i: int) -> None:
    params[0].data = torch.full((3, 4), 0.5 * i)


@change
def parameters_in_place(opt: Any, params: list[Tensor], i: int) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        params[1].grad.mul_(2.0) if params[1].grad is not None else None


@change
def nothing_of_the_optimizer(opt: Any, params: list[Tensor], i: int) -> None:
    COUNTED.append(i)


COUNTED: list[int] = []
IN_ONE_GRAPH = ("parameters_in_place", "nothing_of_the_optimizer")  # of ours, if the step comes once
TOLD = ("lr", "weight_decay", "factors", "several_at_once", "another_group", "fewer_parameters", "tensor_lr")
TOLD = (
    *TOLD,
    "grad_assigned",
    "grad_dropped",
    "grad_deleted",
    "grads_cloned",
    "grads_scaled",
)  # the others end a graph themselves
OURS = ("adam", "sgd_momentum", "adam_amsgrad", "lion", "paddle_rmsprop", "lamb")
STOCK = ("stock_adam", "stock_sgd_momentum", "stock_adamw", "gathering")


class Gathering(torch.optim.Optimizer):
    """Gathers a group's states in a method that Dynamo runs while it traces; no graph ends before a step, as Muon's."""

    def __init__(self, params: Any, lr: Any = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "momentum": 0.9})

    def _init_group(self, group: Any, params: list[Tensor], grads: list[Tensor], bufs: list[Tensor]) -> bool:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                bufs.append(state["momentum_buffer"])
        return False

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            bufs: list[Tensor] = []
            self._init_group(group, params, grads, bufs)
            for p, grad, buf in zip(params, grads, bufs, strict=True):
                buf.lerp_(grad, 1 - group["momentum"])
                p.sub_(group["lr"] * (buf + group["weight_decay"] * p))


def rate(opt: Any) -> str:
    return "lr" if "lr" in opt.param_groups[0] else "learning_rate"


def build(kind: str, params: list[Tensor], name: str) -> Any:
    more = {"lr": torch.tensor(0.1)} if name == "tensor_lr_in_place" else {}
    if kind == "gathering":
        return Gathering(params, **more)
    case = BY_NAME[kind.removeprefix("stock_")]
    if kind.startswith("stock_"):
        assert case.stock is not None
        foreach = {"foreach": False} if more and "sgd" in kind else {}
        return case.stock(params, **{**case.options, **more, **foreach})
    return case.build(params, **more)


def before(opt: Any, params: list[Tensor], i: int, do: Change) -> None:
    do(opt, params, i)
    opt.step()


def after(opt: Any, params: list[Tensor], i: int, do: Change) -> None:
    opt.step()
    do(opt, params, i)


def around(opt: Any, params: list[Tensor], i: int, do: Change) -> None:
    do(opt, params, i)
    opt.step()
    do(opt, params, i + 1)
    opt.step()


def within_a_call(opt: Any, params: list[Tensor], i: int, do: Change) -> None:
    """The change and the step in functions of their own."""
    total = sum(p.detach().sum() for p in params)
    before(opt, params, i, do)
    params[0].data.add_(total * 0.01)


ORDERS = {f.__name__: f for f in (before, after, around, within_a_call)}


def possible(name: str, kind: str) -> bool:
    return not (name == "tensor_lr_in_place" and kind == "paddle_rmsprop")


def options_of(opt: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in opt.param_groups]


RUNS = [(name, kind, order) for name in CHANGES for kind in (*OURS, *STOCK) for order in ORDERS if possible(name, kind)]
PAIRS = covering([(name, kind in STOCK, order) for name, kind, order in RUNS], "values at the call")


@pytest.mark.parametrize(("name", "kind", "order"), RUNS if FULL else [RUNS[i] for i in PAIRS])
def test_what_was_changed_before_counts(name: str, kind: str, order: str) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    mine: list[Any] = parameters(SHAPES)
    others: list[Any] = clones(mine)
    opt, other = build(kind, mine, name), build(kind, others, name)
    function, do = ORDERS[order], CHANGES[name]

    def body(i: int) -> None:
        function(opt, mine, i, do)

    compiled = torch.compile(body, backend="npu_fused", dynamic=False)
    for call, i in enumerate((0, 1, 2, 2)):  # at the last call what was compiled is used again
        for params in (mine, others):
            set_gradients(params, gradients(params, call))
        function(other, others, i, do)
        compiled(i)
        assert_close(mine, others)
        for p, q in zip(mine, others, strict=True):
            for n, value in other.state.get(q, {}).items():
                if value is not None:
                    assert error(torch.as_tensor(opt.state[p][n]), torch.as_tensor(value)) <= 2e-4, n
        assert options_of(opt) == options_of(other)
    reports = [r for r in npu_fuse_pass.reports() if r.is_step]
    assert reports
    left = name == "data_assigned" or (name == "tensor_lr_in_place" and order == "after")  # and the report says why
    for report in reports:
        assert left or not (report.fallback or report.unfused), report
    if kind in OURS and order == "before":
        assert not any(map(said, reports)) or name not in IN_ONE_GRAPH
        assert any(map(said, reports)) or name not in TOLD


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("changes", [False, True], ids=["lr stays", "lr changes"])
@pytest.mark.parametrize("many", [2, 3])
@pytest.mark.parametrize("kind", ["adam", *STOCK])
def test_states_taken_out_by_a_compile_that_is_used_again(kind: str, many: int, changes: bool) -> None:
    """They come back behind the others, and a state is found by its place among the keys."""

    def trained(compiled: bool) -> list[Tensor]:
        params = parameters([(3,)] * many)
        opt = build(kind, params, "")
        first = params[0]

        def function(value: float) -> None:
            opt.param_groups[0][rate(opt)] = value
            opt.state.pop(first, None)
            opt.step()

        step = torch.compile(function, backend="npu_fused") if compiled else function
        for i, value in enumerate((0.1, 0.05, 0.02, 0.02) if changes else (0.1,) * 4):
            set_gradients(params, gradients(params, i))
            step(value)
        states = [v for p in params for v in opt.state[p].values() if v is not None]
        return [p.detach() for p in params] + [torch.as_tensor(v) for v in states]

    assert_trained_alike(trained, 1e-5)


class Counting(torch.optim.Optimizer):
    """Keeps nothing but a Python number for each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                p.add_(p.grad, alpha=-group["lr"] / state["step"])


@pytest.mark.usefixtures("afresh")
def test_states_of_python_numbers_in_another_order() -> None:
    """Taken out between calls: nothing else tells the states of two parameters apart."""

    def trained(compiled: bool) -> list[Tensor]:
        params = parameters([(3,)] * 3)
        opt = Counting(params)
        step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
        for i in range(8):
            if i in (3, 5, 6):
                opt.state.pop(params[0])
            set_gradients(params, gradients(params, i))
            step()
        return [p.detach() for p in params] + [torch.tensor(float(opt.state[p]["step"])) for p in params]

    assert_trained_alike(trained)


def test_every_optimizer_has_a_change() -> None:
    """At every commit: every change in every order, and on both roads; the optimizers of a road take turns."""
    assert {RUNS[i][1] for i in PAIRS} == {*OURS, *STOCK}
    assert {(RUNS[i][0], RUNS[i][2]) for i in PAIRS} == {(name, order) for name, _, order in RUNS}


def said(report: Any) -> bool:
    """That the step has a graph of its own, or that Python has to change something before it."""
    return report.apart is not None or "which Python has to do" in str(report.graph_break)


def test_the_reason_of_a_break_at_a_state_is_a_sentence() -> None:
    """Dynamo writes it in brackets, with text of its own around it."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3,)])
    opt = NpuFusedAdam(params)
    set_gradients(params, gradients(params, 0))

    @torch.compile(backend="npu_fused")
    def reads() -> Tensor:
        opt.step()
        average: Tensor = opt.state[params[0]]["exp_avg"]
        return average * 2

    reads()
    why = "opt.state is read or changed here, which Python has to do: states are kept outside of graphs ("
    assert str(npu_fuse_pass.reports()[0].graph_break).startswith(why)


@pytest.mark.parametrize("make", [torch.optim.Adam, Counting, NpuFusedAdam])
def test_attributes_of_an_optimizer(make: Any) -> None:
    """Whose assignment Dynamo drops where the class is torch's, under other backends."""
    torch._dynamo.reset()
    opt = make(parameters([(3,)]))

    def assign(value: float) -> Tensor:
        opt.param_groups = [{**group, "lr": value} for group in opt.param_groups]
        opt.defaults = {**opt.defaults, "lr": value}
        opt.note = value
        seen = opt.param_groups[0]["lr"] + opt.defaults["lr"] + opt.note
        return torch.ones(2) * seen

    compiled = torch.compile(assign, backend="npu_fused")
    for value in (0.5, 0.25, 0.125):
        assert compiled(value).tolist() == [3 * value] * 2
        assert opt.param_groups[0]["lr"] == opt.defaults["lr"] == opt.note == value


class CountingInItsClass(torch.optim.Optimizer):
    """Counts all steps of its kind, and reads the count through itself."""

    count = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        type(self).count += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=1 / self.count)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    "entry", [lambda opt: torch.compile(opt.step, backend="npu_fused"), npu_fuse_pass.compile_step]
)
def test_attributes_of_its_class(entry: Any) -> None:
    """Dynamo reads the value of before the step through the optimizer."""
    runs = []
    for compiled in (True, False):
        CountingInItsClass.count = 0
        params = parameters([(3,)])
        opt = CountingInItsClass(params, {})
        step = entry(opt) if compiled else opt.step
        for i in range(4):
            set_gradients(params, gradients(params, i))
            step()
            assert opt.count == i + 1
        runs.append(params)
    assert_close(*runs)
    assert any(r.groups for r in npu_fuse_pass.reports())


class Remembering(torch.optim.Optimizer):
    """Steps along the mean of its last gradients."""

    def __init__(self, params: Any, many: int) -> None:
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            self.state[p]["last"] = collections.deque(maxlen=many)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["last"].append(p.grad.clone())
                p.sub_(torch.stack(list(self.state[p]["last"])).mean(0))


@pytest.mark.usefixtures("afresh")
def test_a_deque_that_is_full() -> None:
    """Dynamo takes it for one without a limit. The second optimizer uses what was compiled for the first."""
    for many in (2, 3):
        runs = []
        for compiled in (True, False):
            params = parameters([(3,)])
            opt = Remembering(params, many)
            step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
            train(params, step, seeds=range(5))
            assert len(opt.state[params[0]]["last"]) == many
            runs.append([params[0].detach(), *opt.state[params[0]]["last"]])
        assert_close(*runs)
    assert any(r.groups for r in npu_fuse_pass.reports())


class Exchanging(torch.optim.Optimizer):
    """Every step leaves the average in the parameter, and what was there in its place."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            p.sub_(p.grad)
            state["average"] = state["average"].lerp(p, 0.25) if state else torch.zeros_like(p)
            state["turned"] = p.mT
            p.data, state["average"] = state["average"], p.data


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    "entry", [lambda opt: torch.compile(opt.step, backend="npu_fused"), npu_fuse_pass.compile_step]
)
def test_data_that_is_exchanged(entry: Any) -> None:
    """Dynamo takes the parameter's data from it again when it has been assigned."""
    runs = []
    for compiled in (True, False):
        params = parameters([(2, 3), (2, 2)])
        opt = Exchanging(params, {})
        step = entry(opt) if compiled else opt.step
        train(params, step)
        runs.append([t.detach() for p in params for t in (p, *opt.state[p].values())])
    assert_close(*runs)
    assert npu_fuse_pass.reports()


class Noting(NpuFusedAdam):
    """Keeps attributes whose names are parts of that of a method of torch's optimizers, `_init_group`."""

    def step(self, closure: Any = None) -> Any:
        self.n = getattr(self, "n", 0) + 1
        if not hasattr(self, "group"):
            self.group = 0
        loss = super().step(closure)
        self.group += self.n
        return loss


OF_THIS_MODULE = 1.0


def of_this_module() -> float:
    return OF_THIS_MODULE


class Scaled(NpuFusedAdam):
    """Takes a number of its module's for lr, by a function of that."""

    def hyperparameters(self, group: Any) -> Any:
        return {**super().hyperparameters(group), "lr": group["lr"] * of_this_module()}


def by_a_statement() -> None:
    global OF_THIS_MODULE
    OF_THIS_MODULE = OF_THIS_MODULE * 0.5


def by_its_dictionary() -> None:
    globals()["OF_THIS_MODULE"] *= 0.5


ELSEWHERE = """
def function(change, opt):
    def changed():
        change()
        opt.step()
    return changed
"""


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("change", [by_a_statement, by_its_dictionary])
def test_a_global_of_another_module_than_the_functions(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("elsewhere")
    exec(ELSEWHERE, module.__dict__)
    monkeypatch.setitem(sys.modules, "elsewhere", module)

    def trained(compiled: bool) -> list[Tensor]:
        monkeypatch.setitem(globals(), "OF_THIS_MODULE", 1.0)
        params = parameters([(3,)])
        call = module.function(change, Scaled(params, lr=0.1))
        call = torch.compile(call, backend="npu_fused") if compiled else call
        train(params, call)
        return params

    assert_trained_alike(trained)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("how", ["plain", "compile_step", "compile_optimizer_"])
def test_attributes_that_a_subclass_keeps(how: str) -> None:
    params, others = parameters([(3,)]), parameters([(3,)])
    opt, other = Noting(params), Noting(others)
    step: Any = torch.compile(opt.step, backend="npu_fused") if how == "plain" else npu_fuse_pass.compile_step(opt)
    if how == "compile_optimizer_":
        step = npu_fuse_pass.compile_optimizer_(opt).step
    train(params, step, seeds=range(3))
    train(others, other.step, seeds=range(3))
    assert (opt.n, opt.group) == (other.n, other.group) == (3, 6)
    assert_close(params, others)
    assert any(r.groups for r in npu_fuse_pass.reports())


def test_an_empty_group_keeps_its_options() -> None:
    torch._dynamo.reset()
    params = parameters([(3,)])
    opt = torch.optim.Adam([{"params": []}, {"params": params}])
    set_gradients(params, gradients(params, 0))
    torch.compile(opt.step, backend="npu_fused")()
    assert [group["capturable"] for group in opt.param_groups] == [False, False]
    assert_fused(last_report(), parameters=1)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, Counting, NpuFusedAdam])
def test_an_optimizer_that_a_function_makes(make: Any) -> None:
    """Dynamo compiles its `__init__`, too, before there are any groups."""

    def make_and_step(p: Tensor) -> Any:
        opt = make([p])
        opt.step()
        copied = copy.deepcopy(opt)
        (twin,) = copied.param_groups[0]["params"]
        twin.grad = p.grad
        copied.step()
        return twin

    (p,), (q,) = parameters([(3,)]), parameters([(3,)])
    compiled = torch.compile(make_and_step, backend="npu_fused")
    for seed in range(3):
        for x in (p, q):
            set_gradients([x], gradients([x], seed))
        assert_close([compiled(p), p], [make_and_step(q), q])


FIRST_COMPILE = """
import torch, optimizers
params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
opt = optimizers.NpuFusedAdam(params)
kept = dict(opt.param_groups[0])
def function(value):
    opt.param_groups[0]["lr"] = value
    opt.step()
step = torch.compile(function, backend="npu_fused")
for p in params:
    p.grad = torch.ones(3)
step(0.5)
print(opt.param_groups[0] == {**kept, "lr": 0.5})
"""


def test_the_first_compile_of_a_process() -> None:
    """When the backend is not imported yet, which is what Dynamo calls first when it has traced."""
    run = subprocess.run([sys.executable, "-c", FIRST_COMPILE], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


Function = Callable[[], Any]


def beside_eager(make: Callable[[Any, Tensor], Function], calls: int = 3) -> Any:
    """A function of an optimizer and its parameter, compiled and eager: equal values; gives the last report."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    (p,), (q,) = parameters([(4,)]), parameters([(4,)])
    opts = [NpuFusedAdam([x], lr=0.1) for x in (p, q)]
    for opt, x in zip(opts, (p, q), strict=True):
        x.grad = torch.ones(4)
        opt.step()
    compiled, eager = torch.compile(make(opts[0], p), backend="npu_fused"), make(opts[1], q)
    for _ in range(calls):
        got, want = compiled(), eager()
        assert_close([p], [q])
        assert (got is None and want is None) or error(got, want) <= 1e-6
    return last_report()


def test_two_steps_in_one_function() -> None:
    def make(opt: Any, p: Tensor) -> Function:
        def twice() -> None:
            opt.step()
            opt.step()

        return twice

    report = beside_eager(make)
    assert_fused(report, parameters=1)
    assert "the optimizer steps before it in the same function" in report.apart


def test_a_step_that_is_skipped_on_an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counters are in host memory, which the graph of an NPU cannot write: the step asks before its own graph."""
    monkeypatch.setattr(pending, "_NPU", "cpu")

    def make(opt: Any, p: Tensor) -> Function:
        opt.found_inf = torch.zeros(())

        def stepped() -> None:
            torch._amp_foreach_non_finite_check_and_unscale_([p.grad], opt.found_inf, torch.tensor(2.0))
            opt.step()

        return stepped

    report = beside_eager(make, calls=3)
    assert_fused(report, parameters=1)
    assert "step counters are in host memory" in report.apart


@pytest.mark.parametrize("name", ["step", "exp_avg"])
def test_a_state_held_before_and_read_after_the_step(name: str) -> None:
    """Nobody sees that it is one before the graph runs: the original runs, in its order, and the report says why."""

    def make(opt: Any, p: Tensor) -> Function:
        held = opt.state[p][name]

        def stepped() -> Tensor:
            opt.step()
            return held * 2

        return stepped

    with pytest.warns(UserWarning, match="npu_fused"):
        report = beside_eager(make)
    wanted = "a number that the optimizer reads or counts itself" if name == "step" else "share memory"
    assert wanted in report.fallback
    if name == "step":
        assert any("use it outside of the compiled function" in remedy for remedy in report.remedies)


@pytest.mark.parametrize("laid_out", [torch.contiguous_format, torch.preserve_format], ids=["otherwise", "alike"])
@pytest.mark.parametrize("again", ["read", "changed"])
def test_a_state_put_in_before_and_used_after_the_step(laid_out: torch.memory_format, again: str) -> None:
    """The step takes it over in the order of its parameter's elements, which is not to break Dynamo's guards."""

    def trained(compiled: bool) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).t())]
        opt = optimizers.NpuFusedRMSpropTF(params, lr=0.05)
        read: list[Tensor] = []

        def function() -> None:
            with torch.no_grad():
                value = torch.full_like(params[0], 0.5, memory_format=laid_out)
                opt.state[params[0]]["square_avg"] = value
            opt.step()
            if again == "changed":
                opt.state[params[0]]["square_avg"].mul_(0.5)
            else:
                read.append(opt.state[params[0]]["square_avg"].sum())

        step = torch.compile(function, backend="npu_fused") if compiled else function
        train(params, step, seeds=range(2))
        return [params[0].detach(), opt.state[params[0]]["square_avg"], *read]

    for got, want in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(got, want)
    assert any(r.groups for r in npu_fuse_pass.reports())


@pytest.mark.parametrize("name", ["lr", "exp_avg"])
def test_a_tensor_of_the_optimizer_written_before_the_step(name: str) -> None:
    def make(opt: Any, p: Tensor) -> Function:
        held = torch.tensor(0.1)
        if name == "lr":
            opt.param_groups[0]["lr"] = held
        else:
            held = opt.state[p][name]

        def stepped() -> None:
            held.mul_(0.5)
            opt.step()

        return stepped

    report = beside_eager(make)
    assert_fused(report, parameters=1)
    assert "a state or a tensor hyperparameter of the optimizer is used before it" in report.apart


def test_a_tensor_lr_written_after_the_step() -> None:
    def make(opt: Any, p: Tensor) -> Function:
        opt.param_groups[0]["lr"] = held = torch.tensor(0.1)

        def stepped() -> None:
            opt.step()
            held.mul_(0.5)

        return stepped

    with pytest.warns(UserWarning, match="npu_fused"):
        assert "a number that the optimizer reads" in beside_eager(make).fallback


SETTINGS = {"lr": 0.1}
SCALE = 1.0


def looked_up() -> float:
    return SETTINGS["lr"] * SCALE


class Elsewhere(NpuFusedAdam):
    """Reads its learning rate where nothing leads to from its instances."""

    FACTORS: ClassVar[list[float]] = [1.0]

    def hyperparameters(self, group: dict[str, Any]) -> Any:
        return {**group, "lr": looked_up() * self.FACTORS[0]}


def in_a_dict(value: float) -> None:
    SETTINGS["lr"] = value


def in_a_global(value: float) -> None:
    global SCALE
    SCALE = value


def in_a_class(value: float) -> None:
    Elsewhere.FACTORS[0] = value


@pytest.mark.parametrize(("change", "name"), [(in_a_dict, "SETTINGS"), (in_a_global, "SCALE"), (in_a_class, "FACTORS")])
def test_a_class_that_reads_its_numbers_elsewhere(
    change: Callable[[float], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "lr", 0.1)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 1.0)
    monkeypatch.setattr(Elsewhere, "FACTORS", [1.0])
    npu_fuse_pass.clear_reports()
    (p,) = parameters([(4,)])
    opt, start = Elsewhere([p], eps=0.0), p.detach().clone()

    def stepped(value: float) -> None:
        change(value)
        opt.step()

    compiled, moved = torch.compile(stepped, backend="npu_fused"), 0.0
    for value in (0.5, 0.25):
        p.grad = torch.ones(4)
        compiled(value)
        moved += value * (1.0 if name == "SETTINGS" else 0.1)
    assert_close([p], [start - moved])
    assert f"{name}" in str(last_report().apart)


@pytest.mark.usefixtures("afresh")
def test_what_hooks_change_and_return() -> None:
    """The function reads behind the step what a hook has changed, and gets the loss of the closure that one gives."""
    found = []
    for compiled in (True, False):
        (p,) = params = parameters([(3,)])
        opt = NpuFusedAdam(params, lr=0.1)
        opt.register_step_pre_hook(lambda opt, args, kwargs, p=p: ((lambda: p.sum(),), {}))

        def count(opt: Any, args: Any, kwargs: Any) -> None:
            opt.param_groups[0]["count"] = opt.param_groups[0].get("count", 0) + 1
            opt.zero_grad()

        opt.register_step_post_hook(count)

        def function(p: Any = p, opt: Any = opt) -> tuple[Any, ...]:
            p.grad.mul_(0.5)
            loss = opt.step()
            return loss, p.grad is None, opt.param_groups[0]["count"]

        step = torch.compile(function, backend="npu_fused") if compiled else function
        seen = []
        for i in range(3):
            set_gradients(params, gradients(params, i))
            loss, *rest = step()
            seen.append([round(float(loss), 4), *rest])
        found.append((seen, p.detach()))
    assert found[0][0] == found[1][0]
    assert_close([found[0][1]], [found[1][1]])
    reports = npu_fuse_pass.reports()
    assert all(r.groups and r.fallback is None for r in reports) and any(said(r) for r in reports)


def test_a_hook_that_drops_gradients() -> None:
    """As part of a function, too: nothing is stepped, and nothing crashes."""

    def make(opt: Any, p: Tensor) -> Function:
        def drop(*_: Any) -> None:
            p.grad = None

        def stepped() -> None:
            opt.step()

        opt.register_step_pre_hook(drop)
        return stepped

    beside_eager(make)


def test_what_fullgraph_gets() -> None:
    """An error that says what was changed and what to do; nothing is changed. What is in order stays one graph."""
    (p,) = parameters([(4,)])
    p.grad, opt = torch.ones(4), NpuFusedAdam([p])
    before = p.detach().clone()

    def changed() -> None:
        opt.param_groups[0]["lr"] = 0.5
        opt.step()

    with pytest.raises(Exception, match=r"(?s)opt.param_groups\[0\] was changed before it .* outside of the compiled"):
        torch.compile(changed, backend="npu_fused", fullgraph=True)()
    assert torch.equal(p, before)
    assert opt.param_groups[0]["lr"] == 1e-3

    def in_order() -> None:
        p.grad.mul_(0.5)  # type: ignore[union-attr]
        COUNTED.append(1)
        opt.step()
        opt.param_groups[0]["lr"] = 0.5

    torch._dynamo.reset()
    torch.compile(in_order, backend="npu_fused", fullgraph=True)()
    assert_close([p], [before - 1e-3])
    assert opt.param_groups[0]["lr"] == 0.5


def test_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch may keep its notes on changes elsewhere: then every step has a graph of its own."""

    def missing(*_: Any) -> Any:
        raise AttributeError("no notes")

    monkeypatch.setattr(pending, "_changed", missing)

    def make(opt: Any, p: Tensor) -> Function:
        def stepped() -> None:
            opt.step()

        return stepped

    report = beside_eager(make)
    assert_fused(report, parameters=1)
    assert "this torch does not say what the function has changed before it (no notes)" in report.apart


def in_the_list(opt: Any, new: Tensor) -> None:
    opt.param_groups[0]["params"][0] = new


def in_another_list(opt: Any, new: Tensor) -> None:
    opt.param_groups[0]["params"] = [new, *opt.param_groups[0]["params"][1:]]


def in_another_group(opt: Any, new: Tensor) -> None:
    opt.param_groups[0] = {**opt.param_groups[0], "params": [new, *opt.param_groups[0]["params"][1:]]}


def in_other_groups(opt: Any, new: Tensor) -> None:
    opt.param_groups = [{**opt.param_groups[0], "params": [new, *opt.param_groups[0]["params"][1:]]}]


def nowhere(opt: Any, new: Tensor) -> None:
    """Only the function uses another tensor."""


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("used_first", [False, True])
@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("put", [in_the_list, in_another_list, in_another_group, in_other_groups, nowhere])
def test_a_parameter_in_the_place_of_another(
    put: Callable[[Any, Tensor], None], follows: bool, used_first: bool
) -> None:
    """What the function does itself goes to the tensor that it names then, whether or not that is a parameter."""

    def trained(compiled: bool) -> list[Tensor]:
        params = parameters([(3,), (4,)], seed=0)
        opt = NpuFusedAdam(params)
        own = {"param": params[0]}

        @torch.no_grad()
        def function() -> None:
            if used_first:
                own["param"].add_(0.25)
            opt.step()
            own["param"].mul_(0.5)

        step = torch.compile(function, backend="npu_fused") if compiled else function
        new = torch.nn.Parameter(torch.full((3,), 2.0))
        every = [*params, new]
        for i in range(5):
            if i == 2:
                put(opt, new)
            if i == (2 if follows else 4):
                own["param"] = new
            set_gradients(every, gradients(every, i))
            step()
        return [p.detach() for p in every]

    assert_close(trained(True), trained(False))
    for report in npu_fuse_pass.reports():  # Dynamo guards that one tensor stays one, but not that two stay two
        assert report.fallback is None or (not follows and "share memory" in str(report.fallback))
        assert sum(group.updates for group in report.groups) >= 2


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("changes", ["the gradient", "the name", "both"])
@pytest.mark.parametrize("scaled_first", [False, True])
def test_a_gradient_in_the_place_of_another(changes: str, scaled_first: bool) -> None:
    """A function that keeps its gradients by a name of its own scales what that is, and the step reads `.grad`."""

    def trained(compiled: bool) -> list[Tensor]:
        params = parameters([(3,), (4,)], seed=0)
        opt = NpuFusedAdam(params)
        set_gradients(params, gradients(params, 0))
        own = {"grad": params[0].grad}

        @torch.no_grad()
        def function() -> None:
            if scaled_first:
                own["grad"].mul_(0.5)
            opt.step()
            if not scaled_first:
                own["grad"].mul_(0.5)

        step = torch.compile(function, backend="npu_fused") if compiled else function
        seen = []
        for i in range(4):
            if i == 2:
                new = torch.full((3,), 2.0)
                if changes != "the name":
                    params[0].grad = new
                if changes != "the gradient":
                    own["grad"] = new
            step()
            seen += [clones([p.detach() for p in params]), clones([own["grad"], params[0].grad])]
        return [t for tensors in seen for t in tensors]

    assert_close(trained(True), trained(False))
    for report in npu_fuse_pass.reports():
        assert report.fallback is None
        assert sum(group.updates for group in report.groups) >= 2


def test_a_step_without_gradients_in_a_function_calls_its_hooks() -> None:
    params, twins = parameters([(3,), (3,)], seed=0), parameters([(3,), (3,)], seed=0)
    opt, twin = NpuFusedAdam(params), torch.optim.Adam(twins)

    def function() -> None:
        with torch.no_grad():
            params[0].add_(0.5)
        opt.step()

    step = torch.compile(function, backend="npu_fused")
    for ps, o in ((params, opt), (twins, twin)):
        o.register_step_post_hook(lambda *_, p=ps[0]: (p.detach().mul_(0.5), None)[1])
    for i in range(3):
        for ps in (params, twins):
            set_gradients(ps, gradients(ps, i) if i == 1 else [None, None])
        step()
        with torch.no_grad():
            twins[0].add_(0.5)
        twin.step()
    assert_close(params, twins)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shared", [(0, 1), (2,)], ids=["at first", "later"])
def test_a_gradient_of_two_parameters_may_be_two_at_the_next_call(shared: tuple[int, ...], average: bool) -> None:
    """Dynamo takes the two for one tensor and does not guard it: the graph ends before the step."""

    def trained(compiled: bool) -> list[Tensor]:
        params = parameters([(3, 4), (5,), (3, 4)])
        opt = optimizers.NpuFusedSGD(params, lr=0.1)

        def function() -> None:
            opt.step()
            if average:
                torch._foreach_mul_([p.data for p in params], 0.9)

        step = torch.compile(function, backend="npu_fused") if compiled else function
        step_with_a_shared_gradient(params, step, shared)
        return [p.detach() for p in params]

    assert_trained_alike(trained, 1e-6)
