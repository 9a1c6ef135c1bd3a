"""Bad input: an error that names the value and what is allowed, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass import FuseError, GradientError, OptionError, PlatformError, npu_fused
from optimizers import NpuFusedAdam
from tests.support.cases import BY_NAME, ONE_EACH, Case, over
from tests.support.training import (
    Step,
    assert_close,
    assert_fused,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    train,
)
from tests.support.unchanged import Unchanged

modes = pytest.mark.parametrize("mode", ["eager", "compiled"])


def test_a_change_is_noticed() -> None:
    """What the tests below rely on."""
    for change in (
        lambda opt, p: p.data[0].add_(1e-7),
        lambda opt, p: opt.state[p]["exp_avg"][0].add_(1e-9),
        lambda opt, p: opt.state[p]["step"].add_(1),
        lambda opt, p: opt.param_groups[0].update(lr=0.5),
        lambda opt, p: p.grad.zero_(),
        lambda opt, p: setattr(p, "data", p.data.clone()),
        lambda opt, p: opt.state.pop(p),
    ):
        params = parameters([(3, 4), (5,)])
        opt = NpuFusedAdam(params)
        train(params, opt.step)
        unchanged = Unchanged(opt)
        unchanged()
        change(opt, params[0])
        with pytest.raises(AssertionError):
            unchanged()


# Options of the backend ----------------------------------------------------------------------------------------------

PLATFORMS = "allowed are ['auto', 'cpu', 'npu', 'eager']"
WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"options": "cpu"}, "options='cpu': allowed is a dict of ['check_numerics'"),
    ({"options": {1: "cpu"}}, "unknown option '1'"),
    ({"options": {"platfrom": "cpu"}}, "unknown option 'platfrom'; allowed are ["),
    ({"options": {"platform": "cpu", "zzz": 1}}, "unknown option 'zzz'; allowed are ["),
    ({"options": {"platform": "gpu"}}, f"platform='gpu'; {PLATFORMS}"),
    ({"options": {"platform": None}}, f"platform=None; {PLATFORMS}"),
    ({"options": {"platform": ["cpu"]}}, f"platform=['cpu']; {PLATFORMS}"),
    ({"options": {"strict": 1}}, "strict=1; allowed are True and False"),
    ({"options": {"strict": "yes"}}, "strict='yes'; allowed are True and False"),
    ({"options": {"torchair_config": 3}}, "torchair_config=3; allowed are None and a torchair.CompilerConfig"),
    ({"options": {"platform": "npu", "torchair_config": {}}}, "torchair_config={}; allowed are None"),
    ({"options": {"platform": "cpu", "torchair_config": 3}}, "platform='cpu'; it is allowed with 'auto' and 'npu'"),
    ({"mode": "max-autotune"}, "mode='max-autotune'"),
    ({"mode": "reduce-overhead"}, "mode='reduce-overhead'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_OPTIONS, ids=str)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_wrong_options(arguments: dict[str, Any], message: str, used: bool) -> None:
    """Named, also with what is allowed, by the string and by the function; then right options work."""
    params = parameters()
    opt = NpuFusedAdam(params, lr=0.02)
    if used:
        train(params, opt.step)
    set_gradients(params, gradients(params, 5))
    unchanged = Unchanged(opt)
    npu_fuse_pass.clear_reports()
    with pytest.raises(Exception) as error:
        torch.compile(opt.step, backend="npu_fused", **arguments)()
    assert message in str(error.value)
    if "options" in arguments:
        assert any(name in str(error.value) for name in ("platform", "strict", "torchair_config"))
    unchanged()
    assert not npu_fuse_pass.reports()
    with pytest.raises(OptionError) as direct:
        npu_fused(torch.fx.GraphModule({}, torch.fx.Graph()), [], **arguments)
    assert message in str(direct.value)
    assert isinstance(direct.value, (ValueError, FuseError))
    oracle = BY_NAME["adam"].oracle(params)
    oracle.options = [{"lr": 0.02}] * len(params)
    if not used:
        step = compiled(opt)
        train(params, step, oracle)
        assert_close(params, oracle.values)
        assert_fused(last_report(), parameters=len(params))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "default"},
        {"options": {}},
        {"options": {"platform": "auto", "strict": True}},
        {"options": {"platform": "cpu"}},
    ],
    ids=str,
)
def test_right_options(arguments: dict[str, Any]) -> None:
    params = parameters()
    npu_fuse_pass.clear_reports()
    step = torch.compile(NpuFusedAdam(params).step, backend="npu_fused", **arguments)
    train(params, step)
    assert_fused(last_report(), parameters=len(params))


def test_npu_without_torch_npu() -> None:
    """Nothing falls back silently where a platform was asked for by name: the error says what to install."""
    params = parameters()
    opt = NpuFusedAdam(params)
    train(params, opt.step)
    set_gradients(params, gradients(params, 5))
    unchanged = Unchanged(opt)
    with pytest.raises(Exception, match="torch_npu") as error:
        compiled(opt, platform="npu")()
    assert "pip install" in str(error.value)
    release = torch.__version__.partition("+")[0]  # without it pip takes the newest torch_npu, and its torch along
    assert f'"npu-fuse-pass[npu]" torch=={release}' in str(error.value)
    unchanged()
    assert issubclass(PlatformError, RuntimeError)
    assert torch.optim.Optimizer.__subclasses__()  # the process is not broken
    train(params, compiled(opt))


# Gradients -----------------------------------------------------------------------------------------------------------


def sparse(p: Tensor) -> Tensor:
    return torch.ones_like(p).to_sparse()


def complex_(p: Tensor) -> Tensor:
    return torch.ones_like(p, dtype=torch.complex64)


WRONG_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (sparse, "layout torch.sparse_coo; allowed is torch.strided: call grad.to_dense()"),
    "complex": (complex_, "torch.complex64; allowed are real floating-point dtypes"),
}


@over(ONE_EACH)
@modes
def test_integers(case: Case, mode: str) -> None:
    """A rule over them would run, and keep integers for states."""
    p = torch.nn.Parameter(torch.full((3,), 10), requires_grad=False)
    p.grad = torch.ones_like(p)
    with pytest.raises(npu_fuse_pass.GradientError, match=r"torch.int64; allowed are real floating-point dtypes"):
        Step(case.build([p]), mode)()
    assert torch.equal(p, torch.full((3,), 10))


@over(ONE_EACH)
@modes
@pytest.mark.parametrize("kind", WRONG_GRADIENTS)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
def test_wrong_gradients(case: Case, mode: str, kind: str, first: bool) -> None:
    """Of one parameter in the second group; none is updated, and the next step is as if nothing was."""
    params = parameters([(3, 4), (4, 2), (5,)])
    oracle, opt = case.oracle(params), case.build([{"params": params[:1]}, {"params": params[1:]}])
    step = Step(opt, mode)
    if not first:
        train(params, step, oracle)
    make, message = WRONG_GRADIENTS[kind]
    set_gradients(params, gradients(params, 7))
    params[1].grad_dtype = None
    params[1].grad = make(params[1])
    unchanged = Unchanged(opt)
    for _ in range(2):
        with pytest.raises(GradientError) as error:
            step()
        assert message in str(error.value)
        unchanged()
    train(params, step, oracle, range(8, 11))
    assert_close(params, oracle.values)
    step.check(len(params))


# Closures ------------------------------------------------------------------------------------------------------------


@over([c for c in ONE_EACH if c.name != "paddle_rmsprop"])
@modes
def test_wrong_closures(case: Case, mode: str) -> None:
    params = parameters()
    oracle, opt = case.oracle(params), case.build(params)
    step = Step(opt, mode)
    train(params, step, oracle)
    set_gradients(params, gradients(params, 7))
    unchanged = Unchanged(opt)
    calls: list[int] = []
    handle = opt.register_step_pre_hook(lambda *_: calls.append(1))
    for wrong in (3, "loss", torch.ones(()), 0, False, [lambda: 1]):
        for call in (lambda w=wrong: step(w), lambda w=wrong: step.function(closure=w)):
            with pytest.raises(TypeError, match="is not callable; pass a function that returns the loss, or None") as e:
                call()
            assert f"closure={wrong!r}" in str(e.value)
            unchanged()
    assert not calls
    handle.remove()

    def failing() -> Tensor:
        raise KeyError("the batch")

    with pytest.raises(KeyError, match="the batch"):
        step(failing)
    unchanged()
    train(params, step, oracle, [8])
    assert_close(params, oracle.values)


# Storage of states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["float32", torch.int64, torch.complex64, torch.bool, 32, float], ids=str)
def test_wrong_state_dtype(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"state_dtype=.*allowed are None and floating-point torch dtypes"):
        NpuFusedAdam(parameters(), state_dtype=wrong)
