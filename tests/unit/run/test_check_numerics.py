"""`check_numerics`: silent where fused and original agree, and names the first difference where a kernel is wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers.paddle
from npu_fuse_pass.lowerings import segmented
from npu_fuse_pass.lowerings.cpu import kernel as cpu_kernel
from npu_fuse_pass.run.check_numerics import relative_error
from tests.support.training import clones, error, gradients, parameters, set_gradients

SHAPES = ((3, 4), (5,), (2, 3), (), (5,))
MATRICES = SHAPES[:3]  # a parameter without dimensions is a group of its own in torch's Adam
MAKE: dict[str, Callable[[Any], Any]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "NpuFusedAdam": lambda p: optimizers.NpuFusedAdam(p, lr=0.01, amsgrad=True),
    "NpuFusedLamb": lambda p: optimizers.NpuFusedLamb(p, lr=0.01),
    "NpuFusedRMSpropTF": lambda p: optimizers.NpuFusedRMSpropTF(p, momentum=0.9, centered=True),
    "paddle RMSProp": lambda p: optimizers.paddle.RMSProp(0.01, parameters=p),
}

pytestmark = pytest.mark.usefixtures("afresh")


def stepper(make: Callable[[Any], Any], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any, Any]:
    params = parameters(SHAPES, dtype)
    opt = make(params)
    return params, opt, npu_fuse_pass.compile_step(opt, check_numerics=True, **options)


def train(params: list[Any], step: Any, steps: int = 3) -> None:
    for seed in range(steps):
        grads: list[Any] = list(gradients(params, seed))
        if seed == 2:
            grads[1] = torch.full_like(grads[1], float("inf"))  # both give nan: no difference
        set_gradients(params, grads)
        step()


def states(opt: Any, params: list[Any]) -> list[torch.Tensor]:
    return [v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_a_right_step_is_silent_and_leaves_the_originals_values(name: str, dtype: torch.dtype) -> None:
    params, opt, step = stepper(MAKE[name], dtype)
    others = clones(params)
    eager = MAKE[name](others)
    train(params, step)
    train(others, eager.step)
    reports = npu_fuse_pass.reports()
    assert sum(r.checked_steps for r in reports) == 3 and all(r.groups and not r.reasons for r in reports)
    # bit for bit; what Dynamo captures of torch's own Adam computes the step size in another order
    limit = 1e-5 if name == "Adam" else 0.0
    if dtype != torch.bfloat16 or limit == 0.0:
        pairs = zip([*params, *states(opt, params)], [*others, *states(eager, others)], strict=True)
        assert all(torch.equal(a.isnan(), b.isnan()) and error(*finite(a, b)) <= limit for a, b in pairs)


def finite(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a.detach().nan_to_num(nan=0.0, posinf=1.0), b.detach().nan_to_num(nan=0.0, posinf=1.0)


class Masking(torch.optim.Optimizer):
    """Keeps which gradients were positive."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["positive"] = p.grad > 0
            p.sub_(torch.where(self.state[p]["positive"], 0.2, 0.1) * p.grad)


def test_truth_values_that_a_step_keeps() -> None:
    params, _, step = stepper(lambda params: Masking(params, {}), torch.float32)
    train(params, step)
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.checked_steps
    assert relative_error(torch.tensor([True, False]), torch.tensor([True, True]), None) == 1.0
    assert relative_error(torch.tensor([True, False]), torch.tensor([True, False]), None) == 0.0


COUNTED: dict[str, Callable[..., Any]] = {
    "Adam": lambda p, betas: torch.optim.Adam(p, lr=0.05, betas=betas, foreach=True),
    "AdamW loop": lambda p, betas: torch.optim.AdamW(p, lr=0.05, betas=betas, amsgrad=True, foreach=False),
    "NAdam": lambda p, betas: torch.optim.NAdam(p, lr=0.05, betas=betas),
    "RAdam": lambda p, betas: torch.optim.RAdam(p, lr=0.05, betas=betas),
}


@pytest.mark.parametrize("tool", ["torch.compile", "compile_step"])
@pytest.mark.parametrize(
    ("name", "betas"),  # of RAdam with 0.99999 torch captures what leaves its terms otherwise than uncompiled
    [
        (name, betas)
        for name in COUNTED
        for betas in ((0.9, 0.999), (0.99, 0.99999))
        if name != "RAdam" or betas[0] < 0.99
    ],
)
def test_counters_in_float32_are_no_difference(name: str, betas: tuple[float, float], tool: str) -> None:
    """A parameter of zeros becomes its update, which shows the whole error of a bias correction."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (3, 4), (), (5,))]
    if tool == "compile_step":
        params[3].data = params[3].data.bfloat16()  # no rule then: Dynamo captures the step
    opt = COUNTED[name](params, betas)
    if tool == "compile_step":
        step = npu_fuse_pass.compile_step(opt, check_numerics=True)
    else:
        step = torch.compile(opt.step, backend="npu_fused", options={"check_numerics": True})
    for seed in range(4):
        set_gradients(params, gradients(params, seed))
        step()
    reports = npu_fuse_pass.reports()
    assert sum(r.checked_steps for r in reports) == 4 and all(r.groups and not r.reasons for r in reports)


@pytest.mark.parametrize(
    ("dtype", "lr", "foreach", "least"),
    [(torch.float32, 0.0, False, 0.0), (torch.float32, 0.0, True, 0.0), (torch.float16, 1e-3, False, 800.0)],
    ids=str,
)
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_a_fault_of_what_torch_captures_is_none_of_ours(
    cls: Any, dtype: torch.dtype, lr: float, foreach: bool, least: float
) -> None:
    """Its denominator is divided by the step size: 0 / 0 at a rate of 0, and infinite in float16."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (3, 4), (5,))]
    others = clones(params)
    opt, eager = (cls(some, lr=lr, foreach=foreach) for some in (params, others))
    step = torch.compile(opt.step, backend="npu_fused", options={"check_numerics": True})
    for k in range(3):
        grads = [torch.full_like(p, least + 30.0 * k) for p in params]
        set_gradients(params, grads), set_gradients(others, grads)
        step(), eager.step()
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.reasons and report.checked_steps
    assert all(error(p, q) <= 2e-3 for p, q in zip(params, others, strict=True))


QUOTIENT = r"const float (v\d+) = (v\d+) / (v\d+);"  # in a generated source


def plant(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, count: int = 0) -> None:
    """Generated sources get a bug, in all places or in so many."""
    generate = cpu_kernel.generate

    def broken(*args: Any, **kwargs: Any) -> Any:
        source = generate(*args, **kwargs)
        return dataclasses.replace(source, text=re.sub(right, wrong, source.text, count=count))

    monkeypatch.setattr(cpu_kernel, "generate", broken)


def test_a_fault_below_the_error_of_counters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, QUOTIENT, r"const float \1 = 1.00003f * \2 / \3;", count=1)
    params = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(()))]
    step = torch.compile(torch.optim.Adam(params, lr=0.05).step, backend="npu_fused", options={"check_numerics": True})
    set_gradients(params, gradients(params, 0))
    with pytest.raises(npu_fuse_pass.NumericsError, match="the fused 'param'"):
        step()
    eager = torch.optim.Adam(others := [torch.nn.Parameter(torch.zeros_like(p)) for p in params], lr=0.05)
    set_gradients(others, gradients(params, 0))
    eager.step()
    assert all(error(p, q) <= 3e-5 for p, q in zip(params, others, strict=True))  # and the original's values are there


WRONG = {
    "a root that is not taken": (r"math::sqrt\(", "1.25f*("),
    "a product for a quotient": (QUOTIENT, r"const float \1 = \2 * \3;"),
}


@pytest.mark.parametrize("bug", WRONG)
@pytest.mark.parametrize("name", ["Adam", "NpuFusedAdam"])
def test_a_wrong_kernel_is_named(name: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *WRONG[bug])
    params = parameters(MATRICES)
    others = clones(params)
    step, eager = npu_fuse_pass.compile_step(MAKE[name](params), check_numerics=True), MAKE[name](others)
    for some in (params, others):
        set_gradients(some, gradients(params, 0))
    with pytest.raises(npu_fuse_pass.NumericsError) as caught:
        step()
    eager.step()
    (row,) = npu_fuse_pass.reports()[-1].groups
    assert caught.value.group == row.name and row.name in str(caught.value)
    assert caught.value.parameter == "param_groups[0]['params'][0] (3, 4)"
    assert caught.value.tensor in row.formula and repr(caught.value.tensor) in str(caught.value)
    assert caught.value.step == 1 and caught.value.error > 1e-3
    assert "3 updates differ in all" in str(caught.value)
    assert all(error(p, q) <= 1e-6 for p, q in zip(params, others, strict=True))


def test_training_can_go_on_with_the_originals_values(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *WRONG["a product for a quotient"])
    params, opt, step = stepper(MAKE["NpuFusedAdam"])
    others = clones(params)
    eager = MAKE["NpuFusedAdam"](others)
    for seed in range(3):
        for some in (params, others):
            set_gradients(some, gradients(params, seed))
        with pytest.raises(npu_fuse_pass.NumericsError) as caught:
            step()
        assert caught.value.step == seed + 1
        eager.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states(opt, params), states(eager, others), strict=True))


def test_a_parameter_has_the_name_that_the_optimizer_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *WRONG["a product for a quotient"])
    model = torch.nn.Linear(3, 2)
    opt = optimizers.NpuFusedAdam(model.named_parameters(), lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(npu_fuse_pass.NumericsError, match="of 'weight' \\(2, 3\\) in group update_"):
        npu_fuse_pass.compile_step(opt, check_numerics=True)()


@pytest.mark.parametrize("bug", [None, "a product for a quotient"])
def test_the_tail_of_a_step_is_checked(bug: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, step and average in one graph."""
    if bug:
        plant(monkeypatch, *WRONG[bug])
    params, others = parameters(SHAPES), parameters(SHAPES)
    runs = []
    for some in (params, others):
        averages = [p.detach().clone() for p in some]
        opt = optimizers.NpuFusedAdam(some, lr=0.01)

        def tail(some: Any = some, averages: Any = averages, opt: Any = opt) -> Any:
            norm = torch.nn.utils.clip_grad_norm_(some, 1.0)
            opt.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, some, 0.1)
            return norm

        runs.append((tail, averages, opt))
    step = torch.compile(runs[0][0], backend="npu_fused", fullgraph=True, options={"check_numerics": True})
    for seed in range(2):
        for some in (params, others):
            set_gradients(some, gradients(params, seed))
        want = runs[1][0]()
        if bug:
            with pytest.raises(npu_fuse_pass.NumericsError, match="group update_"):
                step()
        else:
            assert error(step(), want) <= 1e-6
    report = npu_fuse_pass.reports()[-1]
    assert report.checked_steps == 2 and report.groups and not report.reasons
    kept = [(params, others), (runs[0][1], runs[1][1]), (states(runs[0][2], params), states(runs[1][2], others))]
    assert all(error(a, b) <= 1e-6 for ours, theirs in kept for a, b in zip(ours, theirs, strict=True))


def test_explain_finds_a_wrong_kernel_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *WRONG["a product for a quotient"])
    params = parameters(SHAPES)
    before = clones(params)
    set_gradients(params, gradients(params, 0))
    with pytest.raises(npu_fuse_pass.NumericsError):
        npu_fuse_pass.explain(torch.optim.Adam(params), check_numerics=True)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_FUSE_CHECK_NUMERICS", "1")
    params = parameters(SHAPES)
    set_gradients(params, gradients(params, 0))
    torch.compile(MAKE["NpuFusedAdam"](params).step, backend="npu_fused")()
    report = npu_fuse_pass.reports()[-1]
    assert report.checked_steps == 1 and "1 steps were compared with the original" in str(report)


def test_errors_are_relative_to_what_was_added_up() -> None:
    one = torch.ones(2)
    inf, nan = torch.tensor([float("inf"), 1.0]), torch.tensor([float("nan"), 1.0])
    assert relative_error(one, one, None) == 0.0 == relative_error(nan, nan, one) == relative_error(inf, inf, one)
    assert relative_error(one * 1.5, one, None) == 0.5
    assert relative_error(one * 1.5, one, one * 100) == 0.005
    assert (
        relative_error(nan, one, None)
        == relative_error(one, nan, None)
        == relative_error(inf, one, one)
        == float("inf")
    )
    small = torch.tensor([1e-12, 2e-12])
    assert relative_error(small * 2, small, None) == pytest.approx(1.0)
    assert relative_error(torch.empty(0), torch.empty(0), None) == 0.0


def noisy(p: torch.Tensor, g: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """An update with draws between its kernels, and a tensor of integers that it counts up."""
    drawn = torch.empty_like(p).uniform_() * torch.rand_like(p)
    p.sub_(g * drawn.cumsum(0), alpha=0.1)
    seen.add_((p > 0).to(torch.int32) + 1)
    return seen * 2


def run_noisy(backend: str | None, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    p, g, seen = torch.linspace(-1, 2, 12).reshape(3, 4), torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.int32)
    step = noisy if backend is None else torch.compile(noisy, backend=backend, **options)
    with torch.no_grad():
        returned = [step(p, g, seen) for _ in range(3)]
    return [p, seen, *returned, torch.get_rng_state()]


def test_steps_that_draw_and_write_integers() -> None:
    """Both forms begin with the same generators and the same integers."""
    want = run_noisy(None)
    got = run_noisy("npu_fused", options={"check_numerics": True})
    assert all(map(torch.equal, got, want))
    (report,) = npu_fuse_pass.reports()
    assert report.groups and not report.fallback and report.checked_steps == 3


def test_a_wrong_integer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = segmented._Operation.__call__

    def wrong(operation: Any, values: list[Any]) -> None:
        run(operation, values)
        for _, result in operation.call.written:
            if values[result].dtype == torch.int32:
                values[result] = values[result] + 1

    monkeypatch.setattr(segmented._Operation, "__call__", wrong)
    told = r"12 elements of '\w*seen\w*' \(3, 4\), of torch.int32"
    with pytest.raises(npu_fuse_pass.NumericsError, match=told) as caught:
        run_noisy("npu_fused", options={"check_numerics": True})
    assert "seen" in caught.value.tensor and caught.value.step == 1


class Polar(torch.optim.Optimizer):
    """A complex update made of real moments, with a step counter in float32."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), v=torch.zeros(p.shape))
            state["step"] += 1
            state["v"].mul_(0.999).add_(p.grad.real.square() + p.grad.imag.square(), alpha=0.001)
            size = (state["v"] / (1 - 0.999 ** state["step"])).sqrt().add_(1e-8)
            p.add_(torch.complex(p.grad.real / size, p.grad.imag / size), alpha=-0.1)


@pytest.mark.parametrize("right", [True, False])
def test_complex_tensors_that_are_made_of_what_kernels_round(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = segmented._Operation.__call__

    def wrong(operation: Any, values: list[Any]) -> None:
        run(operation, values)
        for _, result in operation.call.written:
            if values[result].is_complex():
                values[result] = values[result] * (1 + 1e-4j)

    if not right:
        monkeypatch.setattr(segmented._Operation, "__call__", wrong)
    param = torch.nn.Parameter(torch.randn(300, 30, dtype=torch.complex64))
    step = npu_fuse_pass.compile_step(Polar([param]), check_numerics=True)

    def train() -> None:
        for _ in range(5):
            param.grad = torch.randn_like(param)
            step()

    if not right:
        with pytest.raises(npu_fuse_pass.NumericsError, match=r"of torch\.complex64, differ"):
            train()
        return
    train()
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.fallback and report.checked_steps == 4


def test_a_wrong_value_of_the_option_is_refused() -> None:
    with pytest.raises(npu_fuse_pass.OptionError, match="check_numerics=1; allowed are True and False"):
        npu_fuse_pass.explain(MAKE["Adam"](parameters(SHAPES)), check_numerics=1)
