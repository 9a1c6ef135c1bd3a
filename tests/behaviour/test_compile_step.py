"""`compile_step` and `explain`: what a backend alone cannot set or notice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import npu_fuse_pass
import optimizers.paddle
from tests.support.training import (
    Unseen,
    assert_fused,
    assert_one_fused_step,
    clones,
    error,
    gradients,
    parameters,
    set_gradients,
    train,
    warned,
)
from tests.support.unchanged import Unchanged

MATRICES = ((3, 4), (5, 2), (2, 2))
OURS: dict[str, Any] = {
    "NpuFusedAdam": lambda p: optimizers.NpuFusedAdam(p, lr=0.01),
    "paddle RMSProp": lambda p: optimizers.paddle.RMSProp(0.01, parameters=p),
}
STOCK: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
}
SHOWN = OURS | STOCK
# what torch hides from backends: how it is made, and what the error must name besides the class
HIDDEN: dict[str, tuple[Any, str]] = {
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.01), "npu_fuse_pass.rule"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "dense gradients"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), "item"),
}

pytestmark = pytest.mark.usefixtures("afresh")


# compile_step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHOWN)
def test_a_compiled_step_is_fused_and_as_eager(name: str) -> None:
    params = parameters(MATRICES)
    others = clones(params)
    train(params, npu_fuse_pass.compile_step(SHOWN[name](params)))
    train(others, SHOWN[name](others).step)
    limit = 2e-2 if name == "Muon" else 1e-5  # Muon iterates in bfloat16
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= limit
    if name != "Muon":
        assert_fused(npu_fuse_pass.reports()[-1], parameters=len(params))


def test_every_instance_has_its_own_limit() -> None:
    """With torch.compile alone, the ninth instance of a class is silently eager."""

    def compiled_instances(compile_it: Any) -> int:
        torch._dynamo.reset()
        npu_fuse_pass.clear_reports()
        for i in range(11):
            params = parameters(((3 + i,),))
            train(params, compile_it(torch.optim.SGD(params, lr=0.1)), seeds=range(2))
        return sum(bool(r.groups) for r in npu_fuse_pass.reports())

    assert compiled_instances(npu_fuse_pass.compile_step) == 11
    assert compiled_instances(lambda opt: torch.compile(opt.step, backend="npu_fused")) < 11


def test_fused_kernels_of_torch_are_switched_off_with_a_warning() -> None:
    """Also in the middle of training: the states stay."""
    params = parameters(MATRICES)
    others = clones(params)
    opt, stock = (torch.optim.AdamW(p, lr=0.01, fused=True) for p in (params, others))
    for o, p in ((opt, params), (stock, others)):
        train(p, o.step, seeds=range(2))
    with pytest.warns(UserWarning, match="fused=True.*switched it off"):
        step = npu_fuse_pass.compile_step(opt)
    train(params, step)
    train(others, stock.step)
    assert_fused(npu_fuse_pass.reports()[-1], parameters=len(params))
    assert not opt.defaults["fused"] and not opt.param_groups[0]["fused"]
    assert float(opt.state[params[0]]["step"]) == 6
    assert max(error(p, q) for p, q in zip(params, others, strict=True)) <= 1e-5


@pytest.mark.parametrize("name", HIDDEN)
def test_what_never_reaches_a_backend_is_an_error_at_the_second_step(name: str) -> None:
    make, says = HIDDEN[name]
    params = parameters(MATRICES)
    others = clones(params)
    opt, stock = make(params), make(others)

    def run(step: Any, given: list[Any], seed: int) -> None:
        set_gradients(given, gradients(given, seed))
        if name == "SparseAdam":
            for p in given:
                p.grad = p.grad.to_sparse()
        step(*([lambda: torch.tensor(1.0)] if name == "LBFGS" else []))

    step = npu_fuse_pass.compile_step(opt)
    run(step, params, 0)
    with pytest.raises(npu_fuse_pass.NotCapturedError, match=f"(?s){name}.*{says}"):
        run(step, params, 1)
    for seed in range(2):
        run(stock.step, others, seed)
    torch.testing.assert_close(params, others)


def test_steps_without_gradients_are_no_error() -> None:
    params = parameters(MATRICES)
    step = npu_fuse_pass.compile_step(torch.optim.SGD(params, lr=0.1))
    for _ in range(3):
        step()
    train(params, step)
    assert_fused(npu_fuse_pass.reports()[-1], parameters=len(params))


@pytest.mark.parametrize("make", [torch.optim.SGD, optimizers.NpuFusedSGD])
@pytest.mark.parametrize("by", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_switching_torch_compile_off_is_no_error(by: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(MATRICES)
    at_import = by == "TORCH_COMPILE_DISABLE"
    with torch._dynamo.config.patch(disable=at_import), monkeypatch.context() as patch:
        patch.setenv(by, "1")
        train(params, npu_fuse_pass.compile_step(make(params, lr=0.1)))
    assert not npu_fuse_pass.reports()
    train(params, npu_fuse_pass.compile_step(make(params, lr=0.1)))  # others are compiled again
    assert_fused(npu_fuse_pass.reports()[-1], parameters=len(params))


class Captured(torch.optim.SGD):
    """Dynamo captures the step of a subclass, which may be another one."""


@pytest.mark.parametrize("make", [optimizers.NpuFusedAdam, torch.optim.Adam], ids=["ours", "torch's"])
def test_rules_are_not_captured_and_follow_the_stance(make: Any) -> None:
    params = parameters(((3,), (2, 5)))
    step = npu_fuse_pass.compile_step(make(params, lr=0.1))
    set_gradients(params, gradients(params, 0))
    eager, frames = [], []
    for stance in ("default", "default", "force_eager", "default"):
        with torch.compiler.set_stance(stance), Uncompiled() as uncompiled:
            step()
        eager.append(uncompiled.steps)
        frames.append(torch._dynamo.utils.counters["frames"].total())
    assert eager == [0, 0, 1, 0]
    assert frames[0] == frames[-1]  # the plan itself takes Dynamo's lock
    assert [float(step.__self__.state[p]["step"]) for p in params] == [4.0, 4.0]
    assert_one_fused_step(step)


class Uncompiled(torch.overrides.TorchFunctionMode):
    """Counts the steps of rules that are not compiled."""

    steps = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps += func is torch.ops.npu_fused.rule_step.default
        return func(*args, **(kwargs or {}))


def test_steps_that_torch_stops_compiling_are_noticed_once() -> None:
    """Beyond the limit of recompiles Dynamo runs eagerly and says nothing."""
    params = parameters(((3,), (4,), (5,)))
    step = npu_fuse_pass.compile_step(Captured(params, lr=0.1))
    said = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for left_out in ((), (0,), (1,), (2,), (0, 1)):
            set_gradients(params, [None if i in left_out else g for i, g in enumerate(gradients(params, 0))])
            said += warned(step)
    assert len(said) == 1 and "ran eagerly" in said[0] and "other gradients are None" in said[0], said


def test_options_are_checked_at_once() -> None:
    opt = torch.optim.SGD(parameters(), lr=0.1)
    for function in (npu_fuse_pass.compile_step, npu_fuse_pass.explain):
        with pytest.raises(npu_fuse_pass.OptionError, match="allowed are"):
            function(opt, plattform="cpu")


def test_strict_raises_its_own_error_and_changes_nothing() -> None:
    """Not the one that Dynamo wraps around it."""
    params = parameters(MATRICES)
    set_gradients(params, gradients(params, 0))
    before = [p.detach().clone() for p in params]
    with pytest.raises(npu_fuse_pass.UnfusedError, match=r"matmul|addmm|norm"):
        npu_fuse_pass.compile_step(torch.optim.Muon(params), strict=True)()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)


def test_an_error_of_the_step_itself_is_passed_on() -> None:
    params = parameters(MATRICES)
    step = npu_fuse_pass.compile_step(optimizers.NpuFusedAdam(params))
    params[0].grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(npu_fuse_pass.GradientError, match="sparse"):
        step()


# explain --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("name", SHOWN)
def test_explain_changes_nothing(name: str, trained: bool) -> None:
    params = parameters(MATRICES)
    opt = SHOWN[name](params)
    called: list[Any] = []
    opt.register_step_pre_hook(lambda *args: called.append(args))
    if trained:
        train(params, opt.step)
        opt.zero_grad()
        params[0].grad = torch.ones_like(params[0])
    called.clear()
    unchanged = Unchanged(opt)
    every = register_optimizer_step_post_hook(lambda *args: called.append(args))
    try:
        report = npu_fuse_pass.explain(opt)
    finally:
        every.remove()
    unchanged()
    assert not called
    assert report.fallback is None
    written = [g for g in report.groups if g.writes == "leaves"]
    assert max(g.updates for g in written) == len(params)
    train(params, npu_fuse_pass.compile_step(opt), seeds=range(2))  # and it still trains


@pytest.mark.parametrize("name", SHOWN)
def test_explain_says_what_a_compiled_step_reports(name: str) -> None:
    """The steady state: SGD's first step, which makes its buffers, is another graph."""
    params = parameters(MATRICES)
    said = npu_fuse_pass.explain(SHOWN[name](params))
    train(params, npu_fuse_pass.compile_step(SHOWN[name](params)), seeds=range(2))
    report = npu_fuse_pass.reports()[-1]
    assert [(g.name, g.formula, g.updates) for g in said.groups] == [
        (g.name, g.formula, g.updates) for g in report.groups
    ]
    assert said.unfused == report.unfused


@pytest.mark.parametrize("name", [*HIDDEN, "fused"])
def test_explain_of_what_is_hidden(name: str) -> None:
    params = parameters(MATRICES)
    opt = torch.optim.Adam(params, fused=True) if name == "fused" else HIDDEN[name][0](params)
    set_gradients(params, gradients(params, 0))
    unchanged = Unchanged(opt)
    report = npu_fuse_pass.explain(opt)
    unchanged()
    assert not report.groups
    assert report.fallback is not None
    assert ("compile_step" if name == "fused" else HIDDEN[name][1]) in str(report)


def test_explain_of_an_unknown_optimizer_that_never_reaches_the_backend() -> None:
    report = npu_fuse_pass.explain(Unseen(parameters(MATRICES)))
    assert not report.groups and "no update reached" in str(report.fallback)


def test_explain_keeps_shared_memory_shared() -> None:
    """Tied parameters are tied in the copy, too: the report says what would happen."""
    buffer = torch.randn(12)
    params = [torch.nn.Parameter(buffer[:8].view(2, 4)), torch.nn.Parameter(buffer[4:])]
    for p in params:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = npu_fuse_pass.explain(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    assert report.fallback is not None and "share" in report.fallback, report


class Keeps(torch.optim.Optimizer):
    """An optimizer with fields of its own, which torch's copies do not keep."""

    def __init__(self, params: Any) -> None:
        self.scale = 0.5
        self.seen: list[int] = []
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen.append(1)
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * self.scale)


def test_explain_of_an_optimizer_with_fields_of_its_own() -> None:
    opt = Keeps(parameters(MATRICES))
    assert sum(g.updates for g in npu_fuse_pass.explain(opt).groups) == len(MATRICES)
    assert opt.seen == []


def test_explain_with_a_scheduler_steps_the_copy() -> None:
    """Schedulers wrap `step` of the instance that they were given."""
    params = parameters(MATRICES)
    opt = torch.optim.SGD(params, lr=0.1)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    unchanged = Unchanged(opt)
    assert npu_fuse_pass.explain(opt).fallback is None
    unchanged()


def test_explain_strict_raises() -> None:
    with pytest.raises(npu_fuse_pass.UnfusedError, match=r"matmul|addmm|norm"):
        npu_fuse_pass.explain(torch.optim.Muon(parameters(MATRICES)), strict=True)


def test_steps_that_found_inf_holds_back_are_not_missed() -> None:
    """Gradients that are not finite are usual in the first steps of a run in float16: nothing is compiled then."""
    params = parameters(MATRICES)
    opt = optimizers.NpuFusedAdam(params, lr=0.01)
    opt.found_inf = torch.ones(())
    before = clones(params)
    step = npu_fuse_pass.compile_step(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(params, step)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        opt.found_inf.zero_()
        train(params, step)
        assert_fused(npu_fuse_pass.reports()[-1], parameters=len(params))
        opt.found_inf.fill_(1)
        train(params, step)
    assert all(int(state["step"]) == 4 for state in opt.state.values())


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_are_named_with_a_remedy_that_helps(cls: Any) -> None:
    """A rule refuses them; and torch's own break around every step of its optimizers is no reason."""
    for sparse in (True, False):
        table = torch.nn.Embedding(4, 3, sparse=sparse)
        table(torch.tensor([1])).sum().backward()
        reasons = npu_fuse_pass.explain(cls(table.parameters(), lr=0.1)).reasons
        assert bool(reasons) == sparse
        for reason in reasons:
            assert "sparse" in str(reason) and "sparse=False" in str(reason.remedy), reason


def test_a_rule_optimizer_with_a_step_of_its_own_is_not_told_to_write_a_rule() -> None:
    class Mine(optimizers.NpuFusedAdam):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    params = parameters()
    opt = Mine(params)
    set_gradients(params, gradients(params, 0))
    (reason,) = npu_fuse_pass.explain(opt).reasons
    assert reason.remedy is not None and "before_step and after_step" in reason.remedy
    step = npu_fuse_pass.compile_step(opt)
    step()
    with pytest.raises(npu_fuse_pass.NotCapturedError, match="leave step as RuleOptimizer has it") as error:
        step()
    assert "npu_fuse_pass.rule" not in str(error.value)


def test_a_class_of_code_without_a_module() -> None:
    """`exec` with bare globals, as notebooks' tools and tests run code: its functions' __module__ is None."""
    names: dict[str, Any] = {"torch": torch}
    exec(
        "class Plain(torch.optim.Optimizer):\n"
        "    @torch.no_grad()\n"
        "    def step(self, closure=None):\n"
        "        for p in self.param_groups[0]['params']:\n"
        "            p.sub_(p.grad, alpha=self.param_groups[0]['lr'])\n",
        names,
    )
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    step = npu_fuse_pass.compile_step(names["Plain"]([param], {"lr": 0.1}))
    for _ in range(3):
        step()
    assert torch.allclose(param, torch.full((4,), 0.7))
    assert npu_fuse_pass.reports()[-1].groups
