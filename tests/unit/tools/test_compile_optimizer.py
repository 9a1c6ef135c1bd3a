"""`compile_optimizer_`: whoever calls `opt.step` calls the compiled one, and nothing around it notices."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as schedulers

import npu_fuse_pass
import optimizers
from npu_fuse_pass.report import logs
from npu_fuse_pass.rules.torch_steps import look_after_compiled_steps
from tests.fuzz.twin import Keeping, param
from tests.fuzz.twin import closure as closure_of
from tests.support.training import (
    FULL,
    assert_close,
    assert_fused,
    clones,
    gradients,
    parameters,
    set_gradients,
    step_with_a_shared_gradient,
    tier,
    train,
)

MATRICES = ((3, 4), (5,))
MAKERS: dict[str, Callable[..., Any]] = {
    "stock": lambda p, **given: torch.optim.RMSprop(p, lr=0.01, **given),  # states in its first step: one compile
    "ours": lambda p, **given: optimizers.NpuFusedAdamW(p, lr=0.1, **given),
}
ORACLES: dict[str, Callable[..., Any]] = {"stock": MAKERS["stock"], "ours": lambda p: torch.optim.AdamW(p, lr=0.1)}
# with schedulers, one compile each: their numbers are kept outside of the graph
SCHEDULED: dict[str, Callable[..., Any]] = {
    "stock": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
    "ours": lambda p: optimizers.NpuFusedAdamW(p, lr=0.1),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: min(1.0, epoch / 3)),  # warmup from 0
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 1, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum="betas" in o.defaults),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum="betas" in o.defaults),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=2),
}

pytestmark = pytest.mark.usefixtures("afresh")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of a test, as they come."""
    texts: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: texts.append(str(message))  # type: ignore[assignment]
        yield texts


def assert_all_fused(parameters: int = len(MATRICES)) -> None:
    reports = npu_fuse_pass.reports()
    assert reports
    for report in reports:
        assert_fused(report, parameters=parameters)


# Schedulers -----------------------------------------------------------------------------------------------------------


def scheduled(maker: str, scheduler: str, when: str, patch: Callable[[Any], Any]) -> tuple[list[Any], set[str]]:
    params = parameters(MATRICES)
    opt = SCHEDULED[maker](params)
    if when == "before":
        patch(opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = SCHEDULERS[scheduler](opt)
        if when == "after":
            patch(opt)
        for seed in range(4):
            train(params, lambda: opt.step(), seeds=[seed])
            made.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    if patch is npu_fuse_pass.compile_optimizer_:
        assert opt.step.__self__ is opt and callable(opt.step.__func__)
    return params, {str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)}


@pytest.mark.parametrize(
    ("maker", "scheduler", "when"), tier([(m, s, w) for s in SCHEDULERS for m in MAKERS for w in ("before", "after")])
)
def test_every_scheduler_before_and_after(maker: str, scheduler: str, when: str) -> None:
    want, usual = scheduled(maker, scheduler, "never", lambda o: None)
    got, said = scheduled(maker, scheduler, when, npu_fuse_pass.compile_optimizer_)
    assert_close(got, want, 1e-5)
    assert_all_fused()
    assert said <= usual, said - usual


def test_no_scheduler_of_torch_is_missed() -> None:
    named = {n for n in schedulers.__all__ if n not in ("LRScheduler", "_LRScheduler")}
    assert named - {"LRScheduler"} <= SCHEDULERS.keys()


def _put_compile_step(opt: Any) -> None:
    opt.step = npu_fuse_pass.compile_step(opt)


def _put_torch_compile(opt: Any) -> None:
    opt.step = torch.compile(opt.step, backend="npu_fused")


@pytest.mark.parametrize("patch", [_put_compile_step, _put_torch_compile])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_compiled_step_in_the_place_of_step_takes_a_scheduler(maker: str, patch: Callable[[Any], None]) -> None:
    for when in ("before", "after") if FULL else ("before",):
        want, usual = scheduled(maker, "StepLR", "never", lambda o: None)
        got, said = scheduled(maker, "StepLR", when, patch)
        assert_close(got, want, 1e-5)
        assert_all_fused()
        assert said <= usual, said - usual


def test_a_warning_of_torch_that_is_so_stays(said: list[str]) -> None:
    opt = npu_fuse_pass.compile_optimizer_(MAKERS["stock"](parameters(MATRICES)))
    schedulers.StepLR(opt, 1).step()
    assert any("lr_scheduler.step()` before `optimizer.step()" in text for text in said), said


# GradScaler, closures, hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [*MAKERS, "fused"])
def test_a_grad_scaler(maker: str) -> None:
    """Gradients are unscaled before the step, and a step with an infinite one is left out."""
    makers = {**MAKERS, "fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True)}

    def run(patch: Callable[[Any], Any]) -> list[Any]:
        params = parameters(MATRICES)
        opt = makers[maker](params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch(opt)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for seed in range(4):
            opt.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, gradients(params, seed), strict=True))
            scaler.scale(loss * (float("inf") if seed == 1 else 1.0)).backward()  # type: ignore[union-attr]
            scaler.step(opt)
            scaler.update()
        return params

    got, want = run(npu_fuse_pass.compile_optimizer_), run(lambda o: None)
    assert_close(got, want, 1e-5)
    assert_all_fused()


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is usually written: the closure is called between two halves."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        moved = []
        for p in self.param_groups[0]["params"]:
            e = p.grad * self.param_groups[0]["rho"]
            p.add_(e)
            moved.append((p, e))
        loss = closure()
        for p, e in moved:
            p.sub_(e)
            p.sub_(p.grad * 0.1)
        return loss


def classification(make: Callable[[Any], Any], patch: Callable[[Any], Any], steps: int = 4) -> tuple[list[Any], Any]:
    """Losses, parameters and how often the closure ran; with integer labels, which no kernel of ours takes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    opt = make(model.parameters())
    patch(opt)
    x, labels = torch.randn(8, 4), torch.randint(0, 3, (8,))
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        return loss

    closure()
    losses = [opt.step(closure) for _ in range(steps)]
    assert all(isinstance(loss, Tensor) and loss.requires_grad for loss in losses)
    return [*losses, *model.parameters()], calls


@pytest.mark.parametrize("maker", MAKERS)
def test_a_closure_runs_between_pre_hooks_and_the_update(maker: str, said: list[str]) -> None:
    want, usual = classification(ORACLES[maker], lambda o: None)
    got, calls = classification(MAKERS[maker], npu_fuse_pass.compile_optimizer_)
    assert_close(got, want, 1e-4)
    assert calls == usual == ["closure", *["pre", "closure", "post"] * 4]
    assert_all_fused(2)  # nothing of the model reached the backend
    assert not [text for text in said if "npu_fuse" in text], said


@pytest.mark.parametrize("maker", MAKERS)
def test_steps_with_and_without_a_closure_are_one_compile(maker: str) -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(MAKERS[maker](params))
    train(params, lambda: opt.step())
    opt.step(lambda: torch.tensor(1.0))
    opt.step(closure=lambda: torch.tensor(1.0))
    assert len(npu_fuse_pass.reports()) == 1
    assert_all_fused()


def test_who_calls_a_closure_in_between_keeps_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, usual = classification(Sam, lambda o: None)
        got, calls = classification(Sam, npu_fuse_pass.compile_optimizer_)
    assert_close(got, want, 1e-5)
    assert calls == usual
    assert any(r.groups for r in npu_fuse_pass.reports())


def test_a_new_closure_at_every_step_is_no_new_compile(said: list[str]) -> None:
    """Of a class that calls its closure itself; Lightning makes one for every step."""
    params = parameters(MATRICES)
    others = clones(params)

    def closure(given: list[Any], seed: int) -> None:
        set_gradients(given, gradients(given, seed))

    def run(given: list[Any], opt: Any) -> None:
        set_gradients(given, gradients(given, 0))
        for seed in range(1, 11):
            closures = [
                lambda s=seed: set_gradients(given, gradients(given, s)),
                functools.partial(closure, given, seed),
            ]
            opt.step(closures[seed % 2])

    run(params, npu_fuse_pass.compile_optimizer_(Sam(params)))
    run(others, Sam(others))
    assert_close(params, others, 1e-5)
    reports = npu_fuse_pass.reports()
    assert 1 <= len(reports) <= 2 and all(r.groups and not r.fallback for r in reports), reports
    assert not [text for text in said if "npu_fused" in text], said


def test_steps_without_a_closure_after_too_many_compiles() -> None:
    """Once torch compiles no more, it runs without one what it has compiled for a closure."""
    runs = []
    for tool in (npu_fuse_pass.compile_optimizer_, lambda opt: opt):
        params = [param((3, 4), torch.float32, kind, seed) for kind, seed in (("strided", 1), ("transposed", 2))]
        opt = tool(Keeping(params, lr=0.05))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for k in range(11):
                if k < 2:
                    set_gradients(params, gradients(params, k))
                with torch.inference_mode(k == 6):
                    opt.step(*([closure_of(params, torch.tensor([0]))] if k == 3 else []))
        runs.append(params)
    assert_close(*runs, 1e-5)
    assert any(r.groups for r in npu_fuse_pass.reports())


def test_a_pre_hook_may_exchange_the_closure() -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(MAKERS["stock"](params))
    opt.register_step_pre_hook(lambda o, *_: ((o, lambda: torch.tensor(2.0)), {}))
    set_gradients(params, gradients(params, 0))
    assert float(opt.step(lambda: torch.tensor(1.0))) == 2.0
    assert_all_fused()


def _torchs() -> list[Any]:
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    return [c for c in classes if c is not torch.optim.Optimizer]


@pytest.mark.parametrize("name", [c.__name__ for c in _torchs() if c is not torch.optim.LBFGS])
def test_torchs_classes_call_their_closure_once_and_first(name: str) -> None:
    """What is compiled relies on it. `LBFGS` is the one that does not."""
    params = parameters(((3, 4), (2, 2)))
    opt = getattr(torch.optim, name)(params)
    before, states, seen = clones(params), copy.deepcopy(opt.state_dict()), []

    def closure() -> Tensor:
        torch.testing.assert_close((params, opt.state_dict()), (before, states), rtol=0, atol=0)
        seen.append(torch.is_grad_enabled())
        set_gradients(params, gradients(params, 0))
        if name == "SparseAdam":
            for p in params:
                p.grad = p.grad.to_sparse()
        return torch.tensor(2.0)

    assert float(opt.step(closure)) == 2.0 and seen == [True]


# Forms of torch's classes ---------------------------------------------------------------------------------------------

FORMS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


@pytest.mark.parametrize("platform", ["auto", "eager"])
@pytest.mark.parametrize("name", FORMS if FULL else ["Adam"])
def test_lr_0_is_no_nan_and_the_choice_of_a_form_stays_open(name: str, platform: str) -> None:
    """Elements whose second moment is 0 divide 0 by lr in torch's for-loop form of Adam; also where it runs unfused."""

    def run(patch: Callable[[Any], Any]) -> list[Tensor]:
        p = torch.nn.Parameter(torch.ones(4))
        opt = getattr(torch.optim, name)([p], lr=0.0)
        patch(opt)
        for lr in (0.0, 0.0, 0.1, 0.1):
            opt.param_groups[0]["lr"] = lr
            p.grad = torch.tensor([0.0, 1.0, 2.0, -3.0])
            opt.step()
        assert opt.param_groups[0]["foreach"] is None
        return [p, *(v for v in opt.state[p].values() if isinstance(v, Tensor))]

    got = run(lambda o: npu_fuse_pass.compile_optimizer_(o, platform=platform))
    want = run(lambda o: None)
    assert all(v.isfinite().all() for v in got)
    assert_close(got, want, 1e-5)
    reports = npu_fuse_pass.reports()
    assert reports and all(not r.fallback and r.groups for r in reports), reports
    assert {g.lowering for r in reports for g in r.groups} == {"cpu" if platform == "auto" else "eager"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_an_adam_after_one_with_fused(dtype: torch.dtype) -> None:
    """Dynamo skips the code of Adam.step from then on, and fails on the foreach form of what that calls."""

    class Own(torch.optim.Adam):
        pass

    def run(patch: Callable[[Any], Any]) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(2)]
        opt = Own([{"params": [p]} for p in params], lr=0.1)
        patch(opt)
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            opt.step()
        assert all(g["foreach"] is None for g in opt.param_groups)
        return [t for p in params for t in (p, *opt.state[p].values())]

    want = run(lambda opt: None)
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    torch._dynamo.reset()
    torch.compile(torch.optim.Adam([p], fused=True).step, backend="eager")()
    npu_fuse_pass.clear_reports()
    for got, value in zip(run(npu_fuse_pass.compile_optimizer_), want, strict=True):
        assert torch.allclose(got, value, rtol=1e-4 if dtype.is_complex else 1e-6)
    assert any(r.groups for r in npu_fuse_pass.reports()) or dtype.is_complex
    torch._dynamo.reset()


def test_what_the_user_chose_stays_chosen() -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(torch.optim.Adam(params, foreach=False))
    seen = []
    opt.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["foreach"]))
    train(params, lambda opt=opt: opt.step())
    assert seen == [False] * 4
    assert_all_fused()


def test_fused_is_switched_off_with_a_word_and_after_every_checkpoint(said: list[str]) -> None:
    params = parameters(MATRICES)
    others = clones(params)
    opt, stock = torch.optim.Adagrad(params, lr=0.1, fused=True), torch.optim.Adagrad(others, lr=0.1, fused=True)
    npu_fuse_pass.compile_optimizer_(opt)
    assert sum("compile_optimizer_ has switched it off" in text for text in said) == 1, said
    for o, p in ((opt, params), (stock, others)):
        train(p, lambda o=o: o.step(), seeds=range(2))
    opt.load_state_dict(copy.deepcopy(stock.state_dict()))  # says fused=True
    assert opt.param_groups[0]["fused"]
    for o, p in ((opt, params), (stock, others)):
        train(p, lambda o=o: o.step(), seeds=range(2, 4))
    assert not opt.param_groups[0]["fused"]
    assert_close(params, others, 1e-5)
    assert_all_fused()
    npu_fuse_pass.restore_optimizer_(opt)
    assert opt.param_groups[0]["fused"] and opt.defaults["fused"]
    assert opt._step_supports_amp_scaling  # type: ignore[attr-defined]


@pytest.mark.parametrize("note", [5, {"step": torch.tensor(3)}], ids=["a number", "a dict"])
def test_fused_is_switched_off_beside_what_is_no_parameters_state(note: Any) -> None:
    params = parameters(MATRICES)
    others = clones(params)
    opt, stock = torch.optim.Adagrad(params, lr=0.1, fused=True), torch.optim.Adagrad(others, lr=0.1, fused=True)
    for o, p in ((opt, params), (stock, others)):
        o.state["note"] = note  # type: ignore[index]
        if o is opt:
            npu_fuse_pass.compile_optimizer_(opt)
        train(p, lambda o=o: o.step(), seeds=range(2))
    npu_fuse_pass.restore_optimizer_(opt)
    assert opt.state["note"] is note  # type: ignore[index]
    assert_close(params, others, 1e-5)


# Copies and undoing ---------------------------------------------------------------------------------------------------


def _saved(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": _saved,
}


COPIED = [(maker, how) for maker in MAKERS for how in COPIES]


@pytest.mark.parametrize(("maker", "how"), COPIED if FULL else COPIED[::5])
def test_copies_are_compiled_as_well(maker: str, how: str, said: list[str], tmp_path: Path) -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(MAKERS[maker](params), dump=tmp_path)
    scheduler = schedulers.StepLR(opt, 1, gamma=0.5)
    train(params, lambda: opt.step(), seeds=range(2))
    scheduler.step()
    twin = COPIES[how](COPIES[how](opt))
    others = twin.param_groups[0]["params"]
    assert twin.step.__self__ is twin and not any(p is q for p, q in zip(params, others, strict=True))
    npu_fuse_pass.clear_reports()
    dumped = len(list(tmp_path.rglob("*")))
    train(others, lambda: twin.step(), seeds=range(2, 4))
    assert_all_fused()
    assert len(list(tmp_path.rglob("*"))) > dumped  # with the options of the first
    assert not any(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    train(params, lambda: opt.step(), seeds=range(2, 4))
    assert_close(others, params, 0)
    npu_fuse_pass.restore_optimizer_(twin)
    assert "step" not in vars(twin) and "step" in vars(opt)
    assert not [text for text in said if "npu_fused" in text], said


@pytest.mark.parametrize("maker", ["stock", "ours"])
def test_a_copy_in_a_compiled_function(maker: str) -> None:
    """Its step is in the function's graphs; Dynamo does not follow how it would be compiled by itself."""
    params = parameters(MATRICES)
    twin = copy.deepcopy(npu_fuse_pass.compile_optimizer_(MAKERS[maker](params)))
    train(twin.param_groups[0]["params"], torch.compile(lambda: twin.step(), backend="npu_fused"), seeds=range(2))
    assert_fused(npu_fuse_pass.reports()[-1], parameters=len(params))
    opt = MAKERS[maker](params)
    train(params, lambda: opt.step(), seeds=range(2))
    assert_close(twin.param_groups[0]["params"], params)


def test_a_shallow_copy_leaves_the_first_alone() -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(MAKERS["stock"](params))
    npu_fuse_pass.restore_optimizer_(copy.copy(opt))
    train(params, lambda: opt.step())
    assert_all_fused()


@pytest.mark.parametrize("maker", MAKERS)
def test_explain_of_a_compiled_optimizer_changes_nothing(maker: str) -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(MAKERS[maker](params))
    before, step = clones(params), opt.step
    assert_fused(npu_fuse_pass.explain(opt), parameters=len(params))
    assert_close(params, before, 0)
    assert opt.step == step


@pytest.mark.parametrize(
    ("maker", "scheduler_first"),
    [(maker, first) for maker in MAKERS for first in (False, True) if FULL or first == (maker == "stock")],
)
def test_it_can_be_undone(maker: str, scheduler_first: bool) -> None:
    params = parameters(MATRICES)
    opt = MAKERS[maker](params)
    if scheduler_first:
        schedulers.StepLR(opt, 1)
    before = {k: v for k, v in vars(opt).items() if k not in ("state", "param_groups")}
    hooks = len(opt._optimizer_step_pre_hooks)
    npu_fuse_pass.compile_optimizer_(opt)
    kept = opt.step
    train(params, kept)
    assert npu_fuse_pass.restore_optimizer_(opt) is opt
    after = {k: v for k, v in vars(opt).items() if k not in ("state", "param_groups", "_opt_called", "_call")}
    assert after.keys() == before.keys() - {"_opt_called", "_call"} and len(opt._optimizer_step_pre_hooks) == hooks
    assert after.get("step") is before.get("step")
    npu_fuse_pass.clear_reports()
    torch._dynamo.reset()
    train(params, lambda: opt.step())
    train(params, kept)  # who kept the compiled step runs the original
    assert not npu_fuse_pass.reports()
    assert npu_fuse_pass.restore_optimizer_(opt) is opt  # nothing left to undo
    npu_fuse_pass.compile_optimizer_(opt)
    train(params, lambda: opt.step())
    assert_all_fused()


def test_a_second_call_replaces_the_options() -> None:
    params = parameters(MATRICES)
    opt = MAKERS["stock"](params)
    npu_fuse_pass.compile_optimizer_(opt)
    npu_fuse_pass.compile_optimizer_(opt, platform="eager")
    train(params, lambda: opt.step())
    assert {g.lowering for r in npu_fuse_pass.reports() for g in r.groups} <= {"eager"}
    assert len(opt._optimizer_step_pre_hooks) == 1
    npu_fuse_pass.restore_optimizer_(opt)
    assert "step" not in vars(opt)


# Never silently eager -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_a_step_that_somebody_kept_says_so_once(maker: str, said: list[str]) -> None:
    params = parameters(MATRICES)
    opt = MAKERS[maker](params)
    kept = opt.step
    npu_fuse_pass.compile_optimizer_(opt)
    train(params, kept)
    texts = [text for text in said if "npu_fused" in text]
    assert len(texts) == 1 and "Call compile_optimizer_ first" in texts[0], texts
    train(params, lambda: opt.step())
    assert_all_fused()


class Accelerated:
    """What accelerate's AcceleratedOptimizer does to `opt.step` when it has a GradScaler."""

    def __init__(self, opt: Any, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = opt, scaler
        self.original = method = opt.step
        self.stepped = 0

        def patched(*args: Any, **kwargs: Any) -> Any:
            self.stepped += 1
            return method(*args, **kwargs)

        self.patched = patched

    def step(self, closure: Any = None) -> None:
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.optimizer.step = self.original


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("maker", MAKERS)
def test_accelerate_keeps_the_step_of_the_moment(maker: str, when: str, said: list[str]) -> None:
    params = parameters(MATRICES)
    others = clones(params)
    opt, stock = MAKERS[maker](params), ORACLES[maker](others)
    if when == "before":
        npu_fuse_pass.compile_optimizer_(opt)
    wrapped = Accelerated(opt, torch.amp.GradScaler("cpu", init_scale=8.0))
    if when == "after":
        npu_fuse_pass.compile_optimizer_(opt)
    for seed in range(4):
        set_gradients(others, gradients(others, seed))
        stock.step()
        set_gradients(params, [8 * g for g in gradients(params, seed)])
        wrapped.scaler.scale(torch.tensor(1.0))
        wrapped.step()
    assert wrapped.stepped == 4
    assert_close(params, others, 1e-5)
    texts = [text for text in said if "npu_fused" in text]
    if when == "before":
        assert_all_fused()
        assert not texts
    else:
        assert not npu_fuse_pass.reports()
        assert len(texts) == 1 and "nothing was compiled" in texts[0] and "accelerate" in texts[0], texts
    npu_fuse_pass.restore_optimizer_(opt)
    assert not opt._optimizer_step_pre_hooks


# what torch hides from a backend, and what a warning must name
HIDDEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.1), "npu_fuse_pass.rule"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), "npu_fuse_pass.rule"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "dense gradients"),
}


@pytest.mark.parametrize("name", [name for name in HIDDEN if FULL or name != "Adafactor"])
def test_what_torch_hides_from_the_plain_backend_says_so_once(name: str, said: list[str]) -> None:
    look_after_compiled_steps()  # torch._dynamo.reset() has forgotten it
    make, names = HIDDEN[name]
    params = parameters(MATRICES)
    opt = make(params)
    step = torch.compile(opt.step, backend="npu_fused")
    for seed in range(3):
        set_gradients(params, gradients(params, seed))
        if name == "SparseAdam":
            for p in params:
                p.grad = p.grad.to_sparse()
        step(*([lambda: torch.tensor(1.0)] if name == "LBFGS" else []))
    texts = [text for text in said if "npu_fused" in text]
    assert len(texts) == 1 and names in texts[0] and "nothing is compiled" in texts[0], texts


@pytest.mark.parametrize("fused", [True, False])
def test_fused_under_the_plain_backend_is_right(fused: bool, said: list[str]) -> None:
    look_after_compiled_steps()  # torch._dynamo.reset() has forgotten it
    params = parameters(MATRICES)
    others = clones(params)
    opt, stock = torch.optim.Adagrad(params, fused=fused), torch.optim.Adagrad(others, fused=fused)
    train(params, torch.compile(opt.step, backend="npu_fused"))
    train(others, stock.step)
    assert_close(params, others)
    texts = [text for text in said if "npu_fused" in text]
    if fused:
        assert len(texts) == 1 and "compile_step" in texts[0] and "nothing is compiled" in texts[0], texts
        assert not npu_fuse_pass.reports()
    else:
        assert not texts
        assert_all_fused()


class Plain(torch.optim.Optimizer):
    """Somebody's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


OF_TORCH = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


@pytest.mark.parametrize("shared", [(0, 1), (2,)], ids=["at first", "later"])
@pytest.mark.parametrize("cls", [*(getattr(torch.optim, name) for name in OF_TORCH), Plain])
def test_a_gradient_of_two_parameters_may_be_two_at_the_next_step(cls: Any, shared: tuple[int, ...]) -> None:
    """Dynamo finds gradients by what they are, and gives both parameters the one, whatever they have later."""

    def trained(compiled: bool) -> list[torch.Tensor]:
        params = parameters([(3, 4), (5,), (3, 4)])
        opt = cls(params, lr=0.1)
        step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
        step_with_a_shared_gradient(params, step, shared)
        return [p.detach() for p in params]

    assert_close(trained(True), trained(False))
    assert any(r.groups for r in npu_fuse_pass.reports())


def test_fused_under_another_backend_is_nothing_of_ours(said: list[str]) -> None:
    look_after_compiled_steps()
    params = parameters(MATRICES)
    train(params, torch.compile(torch.optim.Adagrad(params, fused=True).step, backend="eager"))
    assert not [text for text in said if "npu_fused" in text], said


@pytest.mark.parametrize("maker", MAKERS if FULL else ["ours"])
def test_whole_functions_still_fuse_an_optimizer_that_is_watched(maker: str, said: list[str]) -> None:
    params = parameters(MATRICES)
    opt = npu_fuse_pass.compile_optimizer_(MAKERS[maker](params))

    def whole() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    others = clones(params)
    stock = ORACLES[maker](others)
    train(params, torch.compile(whole, backend="npu_fused"))
    for seed in range(4):
        set_gradients(others, gradients(others, seed))
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        stock.step()
    assert_close(params, others, 1e-4)
    assert all(r.groups and not r.fallback for r in npu_fuse_pass.reports()) and npu_fuse_pass.reports()
    assert not [text for text in said if "npu_fused" in text], said


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Adafactor])
def test_what_torch_hides_stays_as_it_is_and_says_so(cls: Any) -> None:
    opt = cls(parameters(MATRICES))
    with pytest.warns(UserWarning, match=f"{cls.__name__} was not compiled"):
        assert npu_fuse_pass.compile_optimizer_(opt) is opt
    assert "step" not in vars(opt)
    with pytest.raises(npu_fuse_pass.NotCapturedError, match=cls.__name__):
        npu_fuse_pass.compile_optimizer_(opt, strict=True)


class Lookahead(torch.optim.Optimizer):
    """A wrapper whose __init__ does not call torch's, as those of public libraries: it has no hooks of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()
        with torch.no_grad():
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class LookaheadOfDicts(Lookahead):
    """As pytorch_optimizer writes wrappers: torch registers no hook in a plain dict."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}


@pytest.mark.parametrize("cls", [Lookahead, LookaheadOfDicts])
def test_a_wrapper_without_hooks(cls: type[Lookahead]) -> None:
    params = parameters(MATRICES)
    others = clones(params)
    opt = npu_fuse_pass.compile_optimizer_(cls(torch.optim.SGD(params, lr=0.1, momentum=0.9)))
    train(params, lambda: opt.step())
    train(others, cls(torch.optim.SGD(others, lr=0.1, momentum=0.9)).step)
    assert_close(params, others)
    assert any(r.groups for r in npu_fuse_pass.reports())
    assert "step" not in vars(npu_fuse_pass.restore_optimizer_(opt))


def test_bad_input_changes_nothing() -> None:
    opt = torch.optim.AdamW(parameters(MATRICES), fused=True)
    with pytest.raises(npu_fuse_pass.OptionError, match="allowed are"):
        npu_fuse_pass.compile_optimizer_(opt, plattform="cpu")
    assert opt.param_groups[0]["fused"] and "step" not in vars(opt)
    in_place = (npu_fuse_pass.compile_optimizer_, npu_fuse_pass.restore_optimizer_)
    for door in (*in_place, npu_fuse_pass.compile_step, npu_fuse_pass.explain):
        with pytest.raises(TypeError, match=rf"{door.__name__}\(Linear\): allowed are"):
            door(torch.nn.Linear(1, 1))  # type: ignore[operator]


@pytest.mark.parametrize("maker", MAKERS)
def test_one_variable_switches_everything_off(
    maker: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NPU_FUSE_DISABLE", "1")
    logs._say_disabled.cache_clear()
    with caplog.at_level(logging.WARNING, "npu_fuse_pass"):
        for way in (
            lambda o: torch.compile(o.step, backend="npu_fused"),
            npu_fuse_pass.compile_step,
            lambda o: npu_fuse_pass.compile_optimizer_(o).step,
        ):
            params = parameters(MATRICES)
            others = clones(params)
            train(params, way(MAKERS[maker](params)))
            train(others, MAKERS[maker](others).step)
            assert_close(params, others)
    assert not npu_fuse_pass.reports()
    assert [r.message for r in caplog.records if "NPU_FUSE_DISABLE" in r.message] == [
        "npu_fused: NPU_FUSE_DISABLE=1 switches everything off: the original steps run"
    ]


def test_what_was_compiled_elsewhere_is_eager_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(MATRICES)
    pickled = pickle.dumps(npu_fuse_pass.compile_optimizer_(MAKERS["stock"](params)))
    monkeypatch.setenv("NPU_FUSE_DISABLE", "1")
    opt = pickle.loads(pickled)
    train(opt.param_groups[0]["params"], lambda: opt.step())
    train(params, MAKERS["stock"](params).step)
    assert_close(opt.param_groups[0]["params"], params)
    assert not npu_fuse_pass.reports()
