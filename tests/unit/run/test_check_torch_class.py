"""`check_numerics` beside torch's own class: faults that both programs of an optimizer of ours have in common."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as optimizer_module

import npu_fuse_pass
import optimizers
from npu_fuse_pass.rules import batch, core_op
from npu_fuse_pass.run import graph_step, rule_step
from tests.support.training import assert_close, clones, gradients, parameters, set_gradients
from tests.unit.run.test_check_numerics import QUOTIENT, plant

SHAPES = ((3, 4), (3, 4), (5,), ())
PAIRS: dict[str, tuple[Callable[..., Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (optimizers.NpuFusedAdam, torch.optim.Adam, dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
    "AdamW": (optimizers.NpuFusedAdamW, torch.optim.AdamW, dict(lr=0.01)),
    "SGD": (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=0.01, momentum=0.9, dampening=0.3)),
    "SGD plain": (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=0.01)),
    "SGD nesterov": (optimizers.NpuFusedSGD, torch.optim.SGD, dict(lr=0.01, momentum=0.9, nesterov=True)),
}

pytestmark = pytest.mark.usefixtures("afresh")


def train(params: Any, step: Callable[[], Any], steps: int = 4) -> None:
    for seed in range(steps):
        set_gradients(params, [None if seed == 1 and i == 2 else g for i, g in enumerate(gradients(params, seed))])
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_right_steps_are_compared_with_torchs_class_too(name: str, dtype: torch.dtype) -> None:
    make, cls, options = PAIRS[name]
    params = parameters(SHAPES, dtype)
    others = clones(params)
    train(params, npu_fuse_pass.compile_step(make(params, **options), check_numerics=True))
    train(others, make(others, **options).step)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.reasons
    assert report.checked_against == ["the original", f"torch.optim.{cls.__name__}"]
    limit = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert report.check_tolerance[str(dtype).removeprefix("torch.")] == limit
    line = next(line for line in str(report).splitlines() if "check_numerics" in line)
    assert re.search(rf"the original and with torch.optim.{cls.__name__} \(allowed .*{limit:.2g}", line), line


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_stock_step_is_compared_with_its_uncompiled_one(name: str) -> None:
    _, cls, options = PAIRS[name]
    params = parameters(SHAPES)
    train(params, npu_fuse_pass.compile_step(cls(params, **options), check_numerics=True))
    (report,) = npu_fuse_pass.reports()
    assert report.groups and not report.reasons and report.checked_steps == 4
    assert report.replaces == f"torch.optim.{cls.__name__}" and report.no_rule is None
    assert report.checked_against == ["the original", f"torch.optim.{cls.__name__}"]


@pytest.mark.parametrize("road", [npu_fuse_pass.compile_step, npu_fuse_pass.compile_optimizer_])
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_what_hooks_do_is_no_difference(when: str, stock: bool, road: Callable[..., Any]) -> None:
    """The update between the hooks is compared: hooks for all optimizers see no step of torch's class."""
    make, cls, options = PAIRS["SGD"]
    seen: list[torch.optim.Optimizer] = []

    @torch.no_grad()
    def hook(opt: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(opt)
        for group in opt.param_groups:
            group["lr"] *= 0.9
            for p in group["params"]:
                p.mul_(0.5)
                if p.grad is not None:
                    p.grad.clamp_(-0.1, 0.1)

    def trained(checked: bool) -> tuple[list[Tensor], torch.optim.Optimizer]:
        params = parameters(SHAPES)
        opt = (cls if stock else make)(params, **options)
        getattr(opt, f"register_step_{when}_hook")(hook)
        stepped = road(opt, check_numerics=True) if checked else opt
        train(params, getattr(stepped, "step", stepped))
        return params, opt

    every = getattr(optimizer_module, f"register_optimizer_step_{when}_hook")(hook)
    try:
        params, opt = trained(checked=True)
        others, other = trained(checked=False)
    finally:
        every.remove()
    assert_close(params, others, 1e-6)
    assert seen == [opt] * 8 + [other] * 8
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.reasons
    assert report.checked_against == ["the original", f"torch.optim.{cls.__name__}"]


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_infinite_gradients_are_no_difference(stock: bool) -> None:
    """Of two infinities torch's lerp makes a NaN, rules add them (docs/limits.md)."""
    _, cls, options = PAIRS["AdamW"]
    params = parameters(SHAPES)
    opt = (cls if stock else optimizers.NpuFusedAdamW)(params, **options)
    step = npu_fuse_pass.compile_step(opt, check_numerics=True)
    for seed in range(3):
        set_gradients(params, gradients(params, seed))
        params[0].grad[0] = float("inf")  # type: ignore[index]
        step()
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.checked_steps == 3
    assert not params[0][0].isfinite().any() and params[0][1:].isfinite().all()


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_parameters_that_share_memory_are_no_difference(stock: bool) -> None:
    """What one of them writes is the other's, of a copy as well."""
    make, cls, options = PAIRS["SGD"]
    memory = torch.arange(8.0)
    params = [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[3:])]
    step = npu_fuse_pass.compile_step((cls if stock else make)(params, **options), check_numerics=True)
    params[0].grad = torch.ones(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not fused
        for _ in range(3):
            step()
    assert float(memory[4]) < 4 and float(memory[7]) == 7


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parts of a complex number are compared, with the tolerance of the real dtype."""
    param = torch.nn.Parameter(torch.linspace(1, 2, 12, dtype=dtype) * (1 + 2j))
    step = npu_fuse_pass.compile_step(torch.optim.Adagrad([param], lr=0.1), check_numerics=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="npu_fused")  # it is not fused
        warnings.filterwarnings("error", message="Casting complex")
        for k in range(3):
            param.grad = torch.full_like(param, 0.3 + 0.1j * k)
            step()
    param.grad = param.detach().clone()
    compiled = step._compiled_update

    def wrong() -> None:
        compiled()
        param.detach().imag.add_(0.01)

    monkeypatch.setattr(step, "_compiled_update", wrong)
    with pytest.raises(npu_fuse_pass.NumericsError, match=r"'param' of .* \(12,\) differs"):
        step()


def test_a_step_with_a_closure_is_compared_too() -> None:
    params = parameters(SHAPES)
    opt = torch.optim.Adam(params, lr=0.1)
    step = npu_fuse_pass.compile_step(opt, check_numerics=True)
    for seed in range(3):
        assert step(lambda seed=seed: set_gradients(params, gradients(params, seed)) or 2.0) == 2.0
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and report.checked_steps == 3
    assert report.checked_against == ["the original", "torch.optim.Adam"]


def overlap(views: Callable[..., Any]) -> Callable[..., Any]:
    """Every parameter's state begins where the first one's does."""
    return lambda flat, params: (v.as_strided(v.shape, v.stride(), 0) for v in views(flat, params))


def swap(views: Callable[..., Any]) -> Callable[..., Any]:
    """Of two parameters of one shape, each is shown the other's state."""

    def swapped(self: Any, index: int) -> dict[str, Tensor]:
        return views(self, {0: 1, 1: 0}.get(index, index))

    return swapped


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_states_in_one_place_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a step is refused, and eager steps are as wrong: nobody is told that results stay right."""
    monkeypatch.setattr(batch, "views_of", overlap(batch.views_of))
    make, _, options = PAIRS[name]
    params = parameters(SHAPES)
    with pytest.warns(UserWarning, match="states of this optimizer share memory") as caught:
        train(params, torch.compile(make(params, **options).step, backend="npu_fused"))
    assert not any("results stay right" in str(w.message) for w in caught)


def test_states_of_another_parameter_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`opt.state` shows what a step does not use; fused and original agree."""
    make, _, options = PAIRS["Adam"]
    params = parameters(SHAPES)
    step = npu_fuse_pass.compile_step(make(params, **options), check_numerics=True)
    monkeypatch.setattr(batch.Batch, "states", swap(batch.Batch.states))
    monkeypatch.setattr(core_op, "run_rules", unswapped(core_op.run_rules, monkeypatch))
    with pytest.raises(npu_fuse_pass.NumericsError, match=r"uncompiled step of torch\.optim\.Adam") as caught:
        train(params, step)
    assert caught.value.group == "" and caught.value.parameter == "param_groups[0]['params'][0] (3, 4)"
    assert caught.value.tensor != "param" and caught.value.step == 1


def unswapped(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    swapped, right = batch.Batch.states, vars(batch.Batch)["states"].__closure__[0].cell_contents

    def run_rules(batches: Any) -> None:
        monkeypatch.setattr(batch.Batch, "states", right)
        run(batches)
        monkeypatch.setattr(batch.Batch, "states", swapped)

    return run_rules


def test_a_subclass_with_a_rule_of_its_own_has_no_class_of_torchs() -> None:
    class Other(optimizers.NpuFusedAdam):
        rule = optimizers.NpuFusedAdamW.rule

    params = parameters(SHAPES)
    train(params, npu_fuse_pass.compile_step(Other(params, weight_decay=0.1), check_numerics=True))
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and not report.reasons and report.checked_against == ["the original"]


def test_a_fault_of_two_units_in_the_last_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2% in bfloat16: more than one rounding, and less than steps of torch.optim, which round often, may differ."""
    plant(monkeypatch, QUOTIENT, r"const float \1 = 1.012f * \2 / \3;", count=1)
    params = [torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))]
    step = npu_fuse_pass.compile_step(optimizers.NpuFusedAdam(params, lr=0.01), check_numerics=True)
    params[0].grad = torch.linspace(0.5, 1.5, 64).bfloat16()
    with pytest.raises(npu_fuse_pass.NumericsError, match=r"allowed for torch\.bfloat16 here: 0\.0078125") as caught:
        step()
    assert 2**-7 < caught.value.error < 3e-2


@pytest.mark.parametrize(
    ("step_class", "dtype"), [(graph_step.GraphStep, torch.bfloat16), (rule_step.RuleStep, torch.float32)]
)
def test_a_wrong_stock_step_leaves_torchs_values(
    step_class: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was captured and what was fused agree, and both differ from the class itself."""
    params = parameters(SHAPES, dtype)
    others = clones(params)
    step = npu_fuse_pass.compile_step(torch.optim.SGD(params, lr=0.1), check_numerics=True)
    eager = torch.optim.SGD(others, lr=0.1)
    forward = step_class.__call__

    def wrong(self: Any, *args: Any) -> Any:
        result = forward(self, *args)
        params[0].data.mul_(1.5)
        return result

    monkeypatch.setattr(step_class, "__call__", wrong)
    with pytest.raises(npu_fuse_pass.NumericsError, match=r"torch\.optim\.SGD.*hold what torch's class gives"):
        train(params, step, 1)
    train(others, eager.step, 1)
    assert_close(params, others)
