"""Parameters that torch refuses to write, and parameters that are listed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from optimizers import NpuFusedAdam
from tests.support.cases import BY_NAME, Case, over
from tests.support.plain import Plain
from tests.support.training import Step, assert_close, clones, gradients, last_report, parameters, set_gradients

modes = pytest.mark.parametrize("mode", ["eager", "compiled"])
KINDS = [BY_NAME[n] for n in ("sgd", "adam", "adamw", "rmsprop_tf", "lion", "paddle_rmsprop")]
O = torch.optim  # noqa: E741
STOCK = (O.Adam, O.AdamW, O.SGD, O.RMSprop, O.Adagrad, O.NAdam, O.RAdam, O.Adamax, O.Adadelta, O.ASGD, O.Rprop)
REFUSED = "Inplace update to inference tensor outside InferenceMode is not allowed"


def mixed() -> list[torch.nn.Parameter]:
    """An ordinary parameter, and one made in inference mode."""
    with torch.inference_mode():
        (made,) = parameters([(4,)])
    return [*parameters([(4,)], seed=1), made]


@over([*KINDS, BY_NAME["sgd_momentum"]])
@modes
def test_parameters_made_in_inference_mode(case: Case, mode: str) -> None:
    """Refused at every step, before anything is changed; taken inside inference mode, or without a gradient."""
    params = mixed()
    before = clones(params)
    opt = case.build(params)
    step = Step(opt, mode)
    for _ in range(2):
        set_gradients(params, gradients(params, 0))
        with pytest.raises(RuntimeError, match=REFUSED):
            step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert not opt.state
    params[1].grad = None
    step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])


@modes
def test_steps_inside_inference_mode(mode: str) -> None:
    """They are taken; the states that they made are refused outside, as in torch.optim."""
    params, others = mixed(), mixed()
    opt, stock = NpuFusedAdam(params), torch.optim.Adam(others)
    step = Step(opt, mode)
    with torch.inference_mode():
        for seed in range(2):
            set_gradients(params, gradients(params, seed))
            set_gradients(others, gradients(others, seed))
            step()
            stock.step()
        assert_close([p.clone() for p in params], [p.clone() for p in others])
    for o, own, call in ((opt, params, step), (stock, others, stock.step)):
        for p in own:
            p.grad = torch.ones(4) if not p.is_inference() else None
        with pytest.raises(RuntimeError, match=REFUSED):
            call()
        assert o.state


def test_an_optimizer_made_inside_inference_mode() -> None:
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.ones(4))
        opt = NpuFusedAdam([param], lr=0.1)
        param.grad = torch.ones(4)
        opt.step()
    assert_close([param.clone()], [torch.full((4,), 0.9)])


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_stock_classes_refuse_them_compiled(cls: Any, foreach: bool) -> None:
    """As torch does: with its error, behind the first write that it notices."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params = mixed()
    opt = cls(params, lr=0.1, foreach=foreach)
    step = torch.compile(opt.step, backend="npu_fused")
    for seed in range(3):
        set_gradients(params, gradients(params, seed))
        with pytest.raises(RuntimeError, match=REFUSED):
            step()
    assert last_report().groups
    before = params[1].clone()
    with torch.inference_mode():
        torch._dynamo.reset()
        torch.compile(opt.step, backend="npu_fused")()
    assert not torch.equal(params[1], before)


def twin(case: Case, params: list[Tensor]) -> Any:
    if case.stock is not None:
        with pytest.warns(UserWarning, match="duplicate parameters"):
            return case.stock(params, foreach=False, **case.options)
    return Plain(case.build(clones(params)), params)


@over([case for case in KINDS if case.name != "paddle_rmsprop"])  # which updates it once, and says so
@modes
def test_a_parameter_listed_twice(case: Case, mode: str) -> None:
    """It is updated twice, the second time from what the first update has made; torch's class warns, and ours."""
    p, q, r = parameters([(4,), (3, 2), (4,)])
    a, b, c = clones([p, q, r])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = case.build([p, q, p, r, p, q])
    other = twin(case, [a, b, a, c, a, b])
    step = Step(opt, mode)
    for seed in range(4):
        for params in ([p, q, r], [a, b, c]):
            set_gradients(params, gradients(params, seed))
        if seed == 3:
            q.grad = b.grad = None
        step()
        other.step()
        assert_close([p, q, r], [a, b, c])
        for name in case.states:
            assert_close([opt.state[x][name] for x in (p, q, r)], [other.state[x][name] for x in (a, b, c)])
    counts = [float(opt.state[x]["step"]) for x in (p, q, r)] if case.states else [12, 6, 4]
    assert counts == [12, 6, 4]
    opt.state.clear()
    other.state.clear()
    step()
    other.step()
    assert_close([p, q, r], [a, b, c])
    if mode == "compiled":
        assert "a parameter is listed twice" in last_report().fallback
        assert last_report().remedies == ["list every parameter once"]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("mode", ["plain", "compile_step", "compile_optimizer_"])
@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_stock_classes_with_a_parameter_listed_twice(cls: Any, mode: str) -> None:
    """Torch's foreach forms count both updates before they make either; compiled, it is the form that eager takes."""
    p, q = parameters([(4,), (3, 2)])
    a, b = clones([p, q])
    opt, other = cls([p, q, p], lr=0.1), cls([a, b, a], lr=0.1)
    step: Any = opt.step
    if mode == "compile_optimizer_":
        step = npu_fuse_pass.compile_optimizer_(opt).step
    else:
        step = npu_fuse_pass.compile_step(opt) if mode == "compile_step" else torch.compile(step, backend="npu_fused")
    for seed in range(4):
        for params in ([p, q], [a, b]):
            set_gradients(params, gradients(params, seed))
        step()
        other.step()
        assert_close([p, q], [a, b])
    assert npu_fuse_pass.reports()[-1].groups


def tied() -> list[Tensor]:
    memory = torch.linspace(-1, 1, 4)
    return [torch.nn.Parameter(memory), torch.nn.Parameter(memory.view(2, 2))]


def of_two_dtypes() -> list[Tensor]:
    return [*parameters([(4,)]), torch.nn.Parameter(torch.ones(4, dtype=torch.float16))]


def of_bfloat16() -> list[Tensor]:
    return [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters([(50,), (50,)])]


@over(KINDS)
def test_parameters_on_meta_without_gradients(case: Case, recwarn: pytest.WarningsRecorder) -> None:
    """Parts of a model that were never loaded: there is nothing to update, nor to warn of."""
    params, others = parameters([(4,)]), parameters([(4,)])
    opt = case.build([*params, torch.nn.Parameter(torch.empty(3, device="meta"))])
    other, step = case.build(others), npu_fuse_pass.compile_step(opt)
    step()
    for seed in range(3):
        for ps in (params, others):
            set_gradients(ps, gradients(ps, seed))
        step()
        other.step()
        assert_close(params, others)
        assert last_report().fallback is None
    assert not [str(w.message) for w in recwarn if "npu_fused" in str(w.message)]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("make", [tied, of_two_dtypes, of_bfloat16])
def test_compile_optimizer_takes_the_form_that_eager_takes(cls: Any, make: Any) -> None:
    """Torch's foreach form updates all before it writes any, and rounds elsewhere in half precision."""
    mine, others = make(), make()
    opt, other = cls(mine, lr=0.1, weight_decay=0.1), cls(others, lr=0.1, weight_decay=0.1)
    npu_fuse_pass.compile_optimizer_(opt)
    for seed in range(3):
        for params in (mine, others):
            scale = 6e4 if seed == 1 and make is of_two_dtypes else 1.0
            set_gradients(params, [g * scale for g in gradients(params, seed)])
        opt.step()
        other.step()
        for p, q in zip(mine, others, strict=True):
            assert torch.allclose(p, q, rtol=2e-6 if p.dtype == torch.float32 else 2e-3, equal_nan=True)
