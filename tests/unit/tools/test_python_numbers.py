"""Optimizers that count their steps in Python and take math's functions of them: no compile for each value."""

from __future__ import annotations

import math
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import npu_fuse_pass
from npu_fuse_pass.rules import tracing
from optimizers import NpuFusedSGD
from tests.support.training import FULL, assert_close, assert_fused, clones, gradients, parameters, set_gradients, train

Number = Callable[[float, int], float]

NUMBERS: dict[str, Number] = {
    "math.pow": lambda beta, step: 1 - math.pow(beta, step),
    "power": lambda beta, step: 1 - beta**step,
    "math.pow of a negative base": lambda beta, step: math.pow(-beta, step),
    "negative powers": lambda beta, step: (-0.5) ** step + (4.5 - step) ** 2,
    "math.sqrt": lambda beta, step: math.sqrt(1 - beta**step),
    "math.log": lambda beta, step: math.log(step + 1),
    "math.log with a base": lambda beta, step: math.log(step + 1, 10),
    "math.exp": lambda beta, step: math.exp(-step / 10),
    "integers": lambda beta, step: (round(step / 2) + int(-0.4 * step) + (step << 2) + (step >> 1)) / 100,
}
SOME = ("math.pow", "negative powers", "math.log with a base", "integers")


class Counting(torch.optim.Optimizer):
    """Momentum with a factor that is computed from a count in a group or in each state."""

    def __init__(self, params: Any, number: Number, in_group: bool) -> None:
        super().__init__(params, {"lr": 0.1, "beta": 0.9})
        self.number, self.in_group = number, in_group

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self.in_group:
                group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["average"] = torch.zeros_like(p)
                state["step"] += 1
                step = group["step"] if self.in_group else state["step"]
                state["average"].mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p.add_(state["average"], alpha=-group["lr"] * self.number(group["beta"], step))


@pytest.mark.parametrize("in_group", [True, False], ids=["group", "state"])
@pytest.mark.parametrize("name", NUMBERS if FULL else SOME)
def test_counts(name: str, in_group: bool) -> None:
    """Ten steps and six learning rates: the first step is eager, and all others are one graph."""
    torch._dynamo.reset()
    counters.clear()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Counting(ps, NUMBERS[name], in_group) for ps in (params, others))
    step = npu_fuse_pass.compile_step(opt)
    for seed in range(10):
        for some in (opt, eager):
            some.param_groups[0]["lr"] = 0.1 if seed < 5 else 0.01 * seed
        for ps in (params, others):
            set_gradients(ps, gradients(ps, seed))
        step()
        eager.step()
    assert_close(params, others)
    reports = npu_fuse_pass.reports()
    assert counters["stats"]["unique_graphs"] == len(reports) == 1
    assert opt.param_groups[0].keys() == eager.param_groups[0].keys()
    assert all(report.groups and report.fallback is None and not report.reasons for report in reports)


OUT_OF_RANGE: dict[str, Number] = {
    "math.sqrt": lambda beta, step: math.sqrt(5 - step),
    "math.sqrt of an option": lambda beta, step: math.sqrt(beta - 0.4),
    "math.log": lambda beta, step: math.log(6 - step),
    "math.acos": lambda beta, step: math.acos(step / 5),
    "math.exp": lambda beta, step: 1e-300 * math.exp(step * 120),
    "math.pow": lambda beta, step: math.pow(5 - step, 0.5),
    "quotient": lambda beta, step: 1 / (step - 6),
    "quotient of an option": lambda beta, step: 1 / (beta - 0.4),
}


@pytest.mark.parametrize("plain", [False, True], ids=["compile_step", "torch.compile"])
@pytest.mark.parametrize("name", OUT_OF_RANGE if FULL else ["math.log", "quotient", "quotient of an option"])
def test_what_python_raises_is_raised_before_anything_is_changed(name: str, plain: bool) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Counting(ps, OUT_OF_RANGE[name], in_group=True) for ps in (params, others))
    step = torch.compile(opt.step, backend="npu_fused") if plain else npu_fuse_pass.compile_step(opt)
    for seed in range(10):
        for ps in (params, others):
            set_gradients(ps, gradients(ps, seed))
        for some in (opt, eager):
            some.param_groups[0]["beta"] = 0.9 - 0.1 * seed if seed < 5 else 0.4 - 0.1 * (seed - 5)
        before = clones(params), clones([opt.state[p]["average"] for p in params if opt.state[p]])
        try:
            eager.step()
        except (ValueError, ArithmeticError) as error:
            with pytest.raises(type(error)):
                step()
            break
        step()
        assert_close(params, others)
    else:
        raise AssertionError("nothing was raised")
    after = list(params), [opt.state[p]["average"] for p in params]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.reasons


def test_a_number_of_a_tensor_is_infinite_where_torchs_is() -> None:
    """Nor does it matter that Python would raise, where torch computes."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()

    def run(count: Tensor, p: Tensor) -> None:
        count.add_(1)
        p.add_(1 / (count - 3))

    compiled, count, p = torch.compile(run, backend="npu_fused"), torch.zeros(()), torch.zeros(4)
    for _ in range(3):
        compiled(count, p)
    assert torch.equal(p, torch.full((4,), math.inf))
    assert npu_fuse_pass.reports()[-1].groups


def test_powers_that_are_complex_leave_the_step_as_the_original() -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Counting(ps, lambda beta, step: abs((4.5 - step) ** 0.5), in_group=True) for ps in (params, others))
    step = npu_fuse_pass.compile_step(opt)
    trained(opt, step, range(4))
    with pytest.warns(UserWarning, match="is complex"):
        trained(opt, step, range(4, 8))
    trained(eager, eager.step, range(8))
    assert_close(params, others)
    assert npu_fuse_pass.reports()[-1].groups


class Telling(torch.optim.Optimizer):
    """Keeps texts of numbers that change."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            p.sub_(p.grad, alpha=group["lr"] / state["step"])
            size = p.abs().max().item() if group["reads"] else 1.0
            state["texts"] = (f"{group['lr']:.3f}", f"step {state['step']:03d}", f"{state['step']!r:>4}", f"{size:.2f}")


@pytest.mark.parametrize("plain", [False, True], ids=["compile_step", "torch.compile"])
def test_numbers_in_formatted_strings(plain: bool) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Telling(ps, {"lr": 0.1, "reads": not plain}) for ps in (params, others))
    step = torch.compile(opt.step, backend="npu_fused") if plain else npu_fuse_pass.compile_step(opt)
    for seed in range(4):
        opt.param_groups[0]["lr"] = eager.param_groups[0]["lr"] = 0.1 / (1 + seed)
        trained(opt, step, [seed])
        trained(eager, eager.step, [seed])
        assert [opt.state[p]["texts"] for p in params] == [eager.state[p]["texts"] for p in others]
    assert_close(params, others)
    assert npu_fuse_pass.reports()[-1].groups


class Large(torch.optim.Optimizer):
    """Draws its factor from an integer that grows, as hashes do."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["drawn"] = state.get("drawn", 1) * 3000017 + 1
            p.sub_(p.grad, alpha=0.1 / (1 + state["drawn"] % 7))


@pytest.mark.parametrize("plain", [False, True], ids=["compile_step", "torch.compile"])
def test_integers_that_float64_does_not_hold(plain: bool) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Large(ps, {}) for ps in (params, others))
    step = torch.compile(opt.step, backend="npu_fused") if plain else npu_fuse_pass.compile_step(opt)
    trained(opt, step, range(2))
    with pytest.warns(UserWarning, match="an integer beyond"):
        trained(opt, step, range(2, 6))
    trained(eager, eager.step, range(6))
    assert_close(params, others)
    assert opt.state[params[0]]["drawn"] == eager.state[others[0]]["drawn"] > 2**64
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and any(r.code.name == "NUMBER" for r in report.fallbacks)


TRUTHS: tuple[Number, ...] = (
    lambda beta, step: (step > 2) + (step > 4),
    lambda beta, step: float(step > 2) + (step == 4),
    lambda beta, step: 0.5 * ((step > 2) * (step < 6)) + (True + (step > 3)),
)


@pytest.mark.parametrize("number", TRUTHS, ids=["truths", "floats", "products"])
def test_truth_values_are_counted(number: Number) -> None:
    """Sums of bool tensors are bool."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Counting(ps, number, in_group=True) for ps in (params, others))
    trained(opt, npu_fuse_pass.compile_step(opt), range(8))
    trained(eager, eager.step, range(8))
    assert_close(params, others)
    assert all(report.groups and not report.reasons for report in npu_fuse_pass.reports())


KEPT: dict[str, Number] = {
    "bits": lambda beta, step: (step & 5) ^ 2,
    "decimal places": lambda beta, step: round(beta**step, 2),
    "of one that is kept": lambda beta, step: 1 / (1 + (round(beta * step, 1) + 1) // 1) + ((step | 1) & 7),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_only_python_computes_of_numbers_is_called_between_kernels(name: str) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = (Counting(ps, KEPT[name], in_group=True) for ps in (params, others))
    trained(opt, npu_fuse_pass.compile_step(opt), range(8))
    trained(eager, eager.step, range(8))
    assert_close(params, others)
    (report,) = npu_fuse_pass.reports()
    assert report.fallback is None and sum(g.updates for g in report.groups if g.writes == "leaves") >= 2
    assert report.unfused and all("compute this number with" in str(reason.remedy) for reason in report.unfused)
    assert opt.param_groups[0]["step"] == 8 and type(opt.param_groups[0]["step"]) is int
    assert report.fused_graph is not None and "float64" in report.fused_graph.print_readable(print_output=False)


class Adapting(torch.optim.Optimizer):
    """Sign descent that finds its size, as D-Adaptation does. Python reads sums and ends the graph with a branch.

    The first step computes `weighted` and leaves it at 0; `size` and `scale` are variables on both sides of the branch.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "weighted": 0.0, "size": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        size, scale = group["size"], group["size"] * group["lr"]
        dots = total = 0.0
        for p in group["params"]:
            sums = self.state[p].setdefault("sums", torch.zeros_like(p))
            update = p.grad.sign()
            dots += scale * (update * sums).sum().item()
            p.sub_(update, alpha=scale)
            total += sums.mul_(0.9).add_(update, alpha=0.1 * scale).abs().sum().item()
        weighted = 0.9 * group["weighted"] + 0.1 * dots
        if total == 0:
            return
        group["size"] = max(size, weighted / (0.1 * total) + 0.001 * scale)
        group["weighted"] = weighted
        for p in group["params"]:
            p.mul_(1 - scale * 1e-3)


def test_numbers_that_the_first_step_leaves_as_they_are_and_variables_after_a_break() -> None:
    torch._dynamo.reset()
    counters.clear()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    others = clones(params)
    opt, eager = Adapting(params), Adapting(others)
    step = npu_fuse_pass.compile_step(opt)
    for seed in range(6):
        for some in (opt, eager):
            some.param_groups[0]["lr"] = 1.0 / (1 + seed // 3)
        for ps in (params, others):
            set_gradients(ps, gradients(ps, seed))
        step()
        eager.step()
    assert_close(params, others)
    ours, theirs = (o.param_groups[0] for o in (opt, eager))
    assert all(ours[key] == pytest.approx(theirs[key], rel=1e-5) for key in ("weighted", "size")) and ours["weighted"]
    made = [report for report in npu_fuse_pass.reports() if report.groups]
    assert len(made) == 2 and all(report.cause == "compile" and not report.reasons for report in made)


def adam_like(p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    step = state["count"].add_(1).item()
    state["average"].lerp_(g, 1 - (0.9**step - 0.9) / (0.9**step - 1))
    p.sub_(state["average"], alpha=0.1 / (1 + step / (step + 1)))


def clipped(p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    state["average"].add_(g)
    p.sub_(g, alpha=0.1 / max(1.0, state["average"].norm().item()))


def summed(p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    state["sum"] = state.get("sum", 0.0) + float((g * g).sum())
    p.sub_(g, alpha=0.1 / math.sqrt(state["sum"]))


def branching(p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
    if state["average"].add_(g).sum().item() > 0:
        g = -g
    p.sub_(g, alpha=0.1)


class Reading(torch.optim.Optimizer):
    """Reads numbers of tensors in Python."""

    def __init__(self, params: Any, update: Callable[[Tensor, Tensor, dict[str, Any]], None], dtype: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.update, self.dtype = update, dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["count"], state["average"] = torch.tensor(0, dtype=self.dtype), torch.zeros_like(p)
            self.update(p, p.grad, state)


class ByName(torch.optim.Optimizer):
    """Fills lists that it gives to `_init_group` by keyword."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def _init_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in group["params"]:
            params.append(p)
            self.state[p].setdefault("average", torch.zeros_like(p))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = []
            self._init_group(group, params=params)
            for p in params:
                p.sub_(self.state[p]["average"].add_(p.grad), alpha=group["lr"])


def trained(opt: Any, step: Any, seeds: Any) -> list[Any]:
    params = opt.param_groups[0]["params"]
    train(params, step, seeds=seeds)
    return [*params, *(value for p in params for value in opt.state[p].values())]


@pytest.mark.parametrize(
    ("update", "dtype"),
    [(adam_like, torch.int32), (adam_like, torch.float32), (clipped, torch.int64), (summed, torch.int64)],
    ids=["int32", "float32", "norm", "float"],
)
def test_numbers_that_are_read_from_tensors_are_part_of_the_graph(update: Any, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    opt, eager = (Reading(ps, update, dtype) for ps in (params, clones(params)))
    got, want = trained(opt, npu_fuse_pass.compile_step(opt), range(5)), trained(eager, eager.step, range(5))
    assert_equal_kinds_and_close(got, want)
    assert_fused_and_whole(npu_fuse_pass.reports())


def assert_equal_kinds_and_close(got: list[Any], want: list[Any]) -> None:
    assert [(type(x), getattr(x, "dtype", None)) for x in got] == [(type(x), getattr(x, "dtype", None)) for x in want]
    assert_close([torch.as_tensor(x).float() for x in got], [torch.as_tensor(x).float() for x in want])


def assert_fused_and_whole(reports: list[Any]) -> None:
    assert reports and all(r.groups and r.fallback is None and not r.reasons for r in reports)
    assert all(sum(g.updates for g in r.groups if g.writes == "leaves") >= 2 for r in reports)


def test_a_branch_on_a_number_that_is_read_stays_pythons() -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = parameters([(3, 4), (5,)])
    opt, eager = (Reading(ps, branching, torch.int64) for ps in (params, clones(params)))
    step = npu_fuse_pass.compile_optimizer_(opt).step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="npu_fused")
        got = trained(opt, step, range(6))
    assert_equal_kinds_and_close(got, trained(eager, eager.step, range(6)))


def test_lists_that_dynamo_would_leave_empty() -> None:
    params = parameters([(3, 4), (5,)])
    opt, eager = (ByName(ps) for ps in (params, clones(params)))
    step = npu_fuse_pass.compile_step(opt)
    trained(opt, step, range(1))
    with pytest.raises(npu_fuse_pass.NotCapturedError, match=r"_init_group by keyword.*by position"):
        trained(opt, step, range(1, 2))
    assert_close(trained(opt, opt.step, ()), trained(eager, eager.step, range(2)))
    assert "_init_group by keyword" in str(npu_fuse_pass.explain(opt).fallback)


class Looking(torch.optim.Optimizer):
    """Reads a number of a tensor, and looks at Dynamo's configuration where Python runs its step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.seen: list[bool] = []
        self.look = torch.compiler.disable(lambda: self.seen.append(torch._dynamo.config.capture_scalar_outputs))

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * p.grad.norm().item())
        self.look()


def test_reading_is_on_while_ours_are_compiled_alone() -> None:
    """What somebody else compiles while our step runs breaks where it reads a number, as it would outside."""
    params = parameters([(3, 4), (5,)])
    opt, eager = (Looking(ps) for ps in (params, clones(params)))
    assert_close(trained(opt, npu_fuse_pass.compile_step(opt), range(3)), trained(eager, eager.step, range(3)))
    assert all(r.groups and not r.reasons for r in npu_fuse_pass.reports())
    assert opt.seen == [False] * 3


class Nested(torch.optim.Optimizer):
    """Compiles a part of its step itself, as torchao's and heavyball's do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch._dynamo.utils.disable_cache_limit():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def test_a_step_that_lifts_torchs_limit_of_compiles() -> None:
    before, config = torch._dynamo.utils.disable_cache_limit, torch._dynamo.config
    params = parameters([(3, 4), (5,)])
    opt, eager = (Nested(ps) for ps in (params, clones(params)))
    step = npu_fuse_pass.compile_step(opt)
    assert_close(trained(opt, step, range(2)), trained(eager, eager.step, range(2)))
    assert_fused(npu_fuse_pass.reports()[-1], parameters=2)
    assert torch._dynamo.utils.disable_cache_limit is before
    limit = config.recompile_limit
    with before():
        assert config.recompile_limit > limit


def test_nobody_elses_compiles_are_touched() -> None:
    """torch has the added names while a step of ours is compiled, by whichever thread, and not afterwards."""
    changed_dynamo = tracing._tracing.meanwhile
    names = ("_sym_pow", "_sym_log", "_sym_exp")
    had = [hasattr(torch, name) for name in names]

    def graph_of(function: Callable[[torch.Tensor, int], torch.Tensor]) -> int:
        graphs = []

        def keep(gm: Any, inputs: Any) -> Any:
            graphs.append(gm)
            return gm.forward

        torch._dynamo.reset()
        compiled = torch.compile(function, backend=keep)
        for step in range(3, 6):
            compiled(torch.ones(2), step)
        assert not any(
            node.target.__name__ in names for gm in graphs for node in gm.graph.nodes if callable(node.target)
        )
        return len(graphs)

    inside = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with changed_dynamo():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with changed_dynamo():
        thread.start()
        inside.wait(10)
    assert all(hasattr(torch, name) for name in names)
    leave.set()
    thread.join()
    assert [hasattr(torch, name) for name in names] == had
    graph_of(lambda x, step: x * math.pow(0.9, step))
    with pytest.raises(ZeroDivisionError), changed_dynamo():
        _ = 1 / 0
    assert [hasattr(torch, name) for name in names] == had


def test_numbers_that_came_with_a_step() -> None:
    """Options of a group that was not there itself are of another optimizer of the class."""
    code = (lambda: None).__code__
    groups = "L['self'].param_groups"
    for number, name, came in (
        (0, f"{groups}[0]['eps']", False),
        (1, f"{groups}[0]['eps']", False),
        (1, f"{groups}[0]['count']", True),
        (1, f"{groups}[1]['eps']", False),
        (2, f"{groups}[1]['count']", True),
        (2, "L['self'].state[L['p']]['count']", True),
    ):
        assert tracing._came_with_a_step(code, name, 1.0, number) == came, (number, name)


class WithNoise(torch.optim.Optimizer):
    """Adds noise that NumPy draws."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
                p.add_(torch.from_numpy(np.random.randn(*p.shape)))


class SGDWithNoise(NpuFusedSGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad.add_(torch.from_numpy(np.random.randn(*p.shape)))
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [WithNoise, SGDWithNoise])
@pytest.mark.parametrize("plain", [True, False])
def test_numpys_draws_are_numpys(optimizer: Any, plain: bool) -> None:
    """Dynamo puts torch's generator in the place of NumPy's."""

    def trained(compiled: bool) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(3)
        np.random.seed(3)
        p = torch.nn.Parameter(torch.zeros(3))
        opt = optimizer([p], {"lr": 0.1} if optimizer is WithNoise else 0.1)
        step: Any = opt.step
        if compiled:
            step = torch.compile(step, backend="npu_fused") if plain else npu_fuse_pass.compile_optimizer_(opt).step
        for _ in range(3):
            p.grad = torch.ones(3)
            step()
        return torch.cat([p.detach(), torch.tensor([np.random.rand()]), torch.rand(1)])

    torch.testing.assert_close(trained(True), trained(False))


class Drawing(torch.optim.Optimizer):
    """Scales some steps by what a generator of its own draws, as PSGD decides when to renew a preconditioner."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.random = random.Random(3)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        renews = self.random.random() < 0.5
        scale = self.random.uniform(0.5, 1.5) if renews else 1.0
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(torch.sub(p, p.grad, alpha=group["lr"] * scale))


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("plain", [True, False])
def test_draws_of_a_generator_of_pythons(plain: bool) -> None:
    """Dynamo draws while it traces: every step would get the numbers of the first."""
    runs = []
    for compiled in (True, False):
        torch._dynamo.reset()
        p = torch.nn.Parameter(torch.zeros(3))
        opt = Drawing([p])
        step: Any = opt.step
        if compiled:
            step = torch.compile(step, backend="npu_fused") if plain else npu_fuse_pass.compile_step(opt)
        for _ in range(6):
            p.grad = torch.ones(3)
            step()
        runs.append([p.detach(), torch.tensor(opt.random.random())])
    assert_close(*runs)
    assert any(r.groups for r in npu_fuse_pass.reports())


class Counted(torch.optim.Optimizer):
    """Counts in a float64 tensor, whose number a function of `math` takes."""

    def __init__(self, params: Any, function: Callable[[float], float]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.function = function

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float64)
                state["step"] += 1
                p.add_(p.grad, alpha=-group["lr"] * self.function(state["step"].item() * 0.3))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["log1p", "log10", "expm1", "fabs", "erf", "gamma", "tanh", "floor", "degrees"])
def test_functions_of_a_number_that_a_tensor_gave(name: str, plain: bool) -> None:
    """Torch has a symbolic form of few; of the others it keeps the value of the compile, and does not guard that."""

    def trained(compiled: bool) -> Tensor:
        torch._dynamo.reset()
        p = torch.nn.Parameter(torch.zeros(3))
        opt = Counted([p], getattr(math, name))
        step: Any = opt.step
        if compiled:
            step = torch.compile(step, backend="npu_fused") if plain else npu_fuse_pass.compile_optimizer_(opt).step
        for _ in range(4):
            p.grad = torch.ones(3)
            step()
        return p.detach()

    torch.testing.assert_close(trained(True), trained(False))
