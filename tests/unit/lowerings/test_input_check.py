"""The native check of a step's tensors: it is used, it notices what changes between steps, it keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import os
import pathlib
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.lowerings.cpu import build as cpu_build
from npu_fuse_pass.lowerings.cpu import input_check
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.rules.prelude import Prelude
from npu_fuse_pass.stock.binding import Binding
from tests.support.cases import CASES
from tests.support.kernel_cache import Path, counting_compiler, forget, own_cache
from tests.support.training import (
    assert_close,
    assert_fused,
    clones,
    compiled,
    gradients,
    last_report,
    parameters,
    set_gradients,
    step_with_a_shared_gradient,
    train,
)

Params = list[torch.nn.Parameter]
SHAPES = ((3, 4), (5,), (2, 3), (), (1,), (5,))


def watched(opt: Any) -> bool:
    prelude: Prelude = opt._prelude
    return prelude.unchanged


def checks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every check from here on finds."""
    found: list[bool] = []
    same = input_check.NativeInputs.same

    def noting(self: input_check.NativeInputs, *given: Any) -> bool:
        found.append(same(self, *given))
        return found[-1]

    monkeypatch.setattr(input_check.NativeInputs, "same", noting)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_optimizer_is_checked(case: Any) -> None:
    params = parameters(SHAPES)
    oracle, opt = case.oracle(params), case.build(params)
    step = compiled(opt)
    for seed in range(6):
        grads = gradients(params, seed)
        set_gradients(params, grads)
        versions = [p._version for p in params]
        step()
        assert [p._version > v for p, v in zip(params, versions, strict=True)] == [True] * len(params)
        oracle.step(grads)
        assert watched(opt) or seed < 3
    assert_close(params, oracle.values)


@pytest.mark.parametrize("foreach", [False, True])
def test_stock_optimizers_are_checked(foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    twins = clones(params)
    opt, eager = (torch.optim.Adam(ps, lr=1e-2, foreach=foreach) for ps in (params, twins))
    step, found = compiled(opt, fullgraph=False), checks(monkeypatch)
    side_by_side(params, step, twins, eager, 6)
    assert found[-2:] == [True, True]
    assert_close(params, twins, 1e-6)
    assert_fused(last_report(), parameters=len(params))


@pytest.mark.parametrize("groups", [1, 2])
def test_numbers_that_members_share_are_checked_once(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An lr that changes is a tensor of the graph, one for all parameters of a group."""
    shapes = [(3, 4)] * 10
    params = parameters(shapes)
    twins = clones(params)
    split = [slice(None)] if groups == 1 else [slice(4), slice(4, None)]
    opt, eager = (torch.optim.SGD([dict(params=ps[s]) for s in split], lr=0.1) for ps in (params, twins))
    step, found = compiled(opt, fullgraph=False), checks(monkeypatch)
    for seed in range(7):
        for o, ps in ((opt, params), (eager, twins)):
            for i, group in enumerate(o.param_groups):
                group["lr"] = 0.1 / (1 + seed + i)
            set_gradients(ps, gradients(ps, seed))
        step()
        eager.step()
    assert found[-2:] == [True, True]
    assert_close(params, twins, 1e-6)
    assert_fused(last_report(), parameters=len(params))


def side_by_side(
    params: Params, step: Any, twins: Params, eager: Any, steps: int, at_five: Callable[[Params], Any] = len
) -> None:
    """Both train on the same gradients; something happens to the parameters or gradients of both before step 5."""
    for seed in range(steps):
        for ps in (params, twins):
            set_gradients(ps, gradients(ps, seed))
            if seed == 5:
                at_five(ps)
        step()
        eager.step()


def replaced(params: Params) -> None:
    params[0].data = params[0].detach().clone()


def laid_out_otherwise(params: Params) -> None:
    params[0].data = params[0].detach().t().contiguous().t()


def swapped(params: Params) -> None:
    """The object stays, the tensor behind it is another one."""
    other = torch.nn.Parameter(params[0].detach() + 1)
    other.grad = params[0].grad
    torch.utils.swap_tensors(params[0], other)


def gradient_missing(params: Params) -> None:
    params[1].grad = None


def gradient_apart(params: Params) -> None:
    g = params[0].grad
    assert g is not None
    params[0].grad = torch.stack([g, g], -1)[..., 0]


def gradient_negated(params: Params) -> None:
    for p in params:
        assert p.grad is not None
        p.grad = torch._neg_view(p.grad.neg())


def gradient_expanded(params: Params) -> None:
    params[0].grad = torch.ones(()).expand_as(params[0])


def gradient_zero(params: Params) -> None:
    params[0].grad = torch._efficientzerotensor(params[0].shape)


def refused(params: Params) -> None:
    """Unfused this time, and without one of the parameters."""
    params[0].grad = params[0].detach()
    params[1].grad = None


def memory_written(params: Params) -> None:
    with torch.no_grad():
        params[0].mul_(2)


def moved(params: Params) -> None:
    """The tensor stays, its memory is elsewhere."""
    params[0].detach().set_(params[0].detach().clone().untyped_storage(), 0, params[0].shape, params[0].stride())
    with torch.no_grad():
        params[1].set_(params[1].detach().clone())


def overlapping(params: Params) -> None:
    """Two parameters share memory from now on: the step cannot run fused."""
    params[2].data = params[0].detach().flatten()[:6].view(2, 3)


def frozen(params: Params) -> None:
    params[0].requires_grad_(False)


BETWEEN: list[tuple[Callable[[Params], None], bool]] = [  # and whether the check sees tensors of the same kind
    (replaced, True),
    (memory_written, True),
    (moved, True),
    (overlapping, True),
    (frozen, True),
    (swapped, True),
    (laid_out_otherwise, False),
    (gradient_missing, False),
    (gradient_apart, False),
    (gradient_negated, False),
    (gradient_expanded, False),
    (gradient_zero, False),
    (refused, False),
]


@pytest.mark.parametrize(("change", "same"), BETWEEN, ids=[f.__name__ for f, _ in BETWEEN])
def test_what_changes_between_steps_is_noticed(change: Callable[[Params], None], same: bool) -> None:
    params = parameters(SHAPES)
    twins = clones(params)
    opt, eager = optimizers.NpuFusedAdam(params, lr=0.1), torch.optim.Adam(twins, lr=0.1)
    step, found = compiled(opt), list[bool]()

    def noting() -> None:
        step()
        found.append(watched(opt))

    side_by_side(params, noting, twins, eager, 10, change)
    assert found[4:6] == [True, same]
    assert_close(params, twins, 1e-5)


@pytest.mark.parametrize("change", [f for f, _ in BETWEEN if f is not swapped], ids=lambda f: f.__name__)
def test_what_changes_between_steps_of_stock_optimizers(change: Callable[[Params], None]) -> None:
    params = parameters(SHAPES)
    twins = clones(params)
    opt, eager = (torch.optim.SGD(ps, lr=0.1, momentum=0.9) for ps in (params, twins))
    side_by_side(params, compiled(opt, fullgraph=False), twins, eager, 10, change)
    assert_close(params, twins, 1e-5)


Change = Callable[[torch.optim.Optimizer, Params], None]


def states_exchanged(opt: torch.optim.Optimizer, params: Params) -> None:
    """The objects are those that they were, and each is another parameter's."""
    opt.state[params[1]], opt.state[params[5]] = opt.state[params[5]], opt.state[params[1]]


def states_replaced(opt: torch.optim.Optimizer, params: Params) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def counted_in(dtype: torch.dtype) -> Change:
    """As a checkpoint has it that was written under another default dtype."""

    def change(opt: torch.optim.Optimizer, params: Params) -> None:
        saved = copy.deepcopy(opt.state_dict())
        for entry in saved["state"].values():
            entry["step"] = entry["step"].to(dtype)
        opt.load_state_dict(saved)

    return change


@pytest.mark.parametrize(
    "changes",
    [
        [states_exchanged] * 2,
        [states_replaced] * 2,
        [counted_in(torch.float64), counted_in(torch.float32)],
        [counted_in(torch.float64), states_exchanged, counted_in(torch.float32)],
    ],
    ids=["exchanged", "replaced", "counted otherwise and back", "exchanged in between"],
)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("versions", [True, False])
def test_what_changes_in_the_states_of_stock_optimizers(
    changes: list[Change], steps: int, versions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are used as they are now, and checked natively again; with a Python whose dicts have no version, too."""
    if not versions:
        monkeypatch.setattr(input_check, "_have_versions", lambda: False)
    params = parameters(SHAPES)
    twins = clones(params)
    opt, eager = (torch.optim.Adam(ps, lr=0.1) for ps in (params, twins))
    npu_fuse_pass.compile_optimizer_(opt)
    side_by_side(params, opt.step, twins, eager, 4)
    (bound,) = [o for o in core_op._optimizers.values() if isinstance(o, Binding) and o.optimizer is opt]
    assert watched(bound)
    for change in changes:
        for o, ps in ((opt, params), (eager, twins)):
            change(o, ps)
        side_by_side(params, opt.step, twins, eager, steps)
        assert_close(params, twins, 1e-4)
        for p, q in zip(params, twins, strict=True):
            assert opt.state[p]["step"].equal(eager.state[q]["step"])
            assert_close([opt.state[p]["exp_avg"]], [eager.state[q]["exp_avg"]], 1e-4)
    side_by_side(params, opt.step, twins, eager, 4)
    assert_close(params, twins, 1e-4)
    assert watched(bound)
    assert_fused(last_report(), parameters=len(params))


ITEMS: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d.update(a=object()),
    lambda d: d.update(c=object()),
    lambda d: d.pop("b"),
    lambda d: d.update(a=d.pop("a")),
    lambda d: d.update(a=d["b"], b=d["a"]),
    lambda d: d.clear(),
]


@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize("change", range(len(ITEMS)))
def test_a_dict_that_holds_something_else_is_another(
    change: int, versions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that are watched, and until it holds the same again."""
    if not versions:
        monkeypatch.setattr(input_check, "_have_versions", lambda: False)
    x = torch.ones(4)
    tensors = input_check.NativeInputs([x], input_check._library["native"])
    dicts = [{name: object() for name in "ab"} for _ in range(40)]
    watched = input_check.NativeDicts(dicts)
    for place in (0, 17, 39):
        assert tensors.same(None, watched)
        before = dict(dicts[place])
        ITEMS[change](dicts[place])
        assert tensors.same(None) and not tensors.same(None, watched)
        dicts[place].clear()
        dicts[place].update(before)
        assert tensors.same(None, watched)


def test_attributes_of_an_object_are_items_of_its_dict() -> None:
    class Entry:
        def __init__(self) -> None:
            self.a, self.b = object(), object()

    entry, x = Entry(), torch.ones(4)
    tensors = input_check.NativeInputs([x], input_check._library["native"])
    watched = input_check.NativeDicts([vars(entry)])
    assert tensors.same(None, watched) and tensors.same(None, watched)
    entry.b = object()
    assert not tensors.same(None, watched)


def test_versions_of_dicts_are_where_this_python_has_them() -> None:
    assert input_check._have_versions() == (sys.version_info < (3, 14))


def test_gradients_of_a_refused_look_are_released() -> None:
    """What else a step looks at has changed: nothing holds the gradients that were looked at before."""
    params = parameters(SHAPES)
    opt = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    npu_fuse_pass.compile_optimizer_(opt)
    train(params, opt.step, seeds=range(4))
    opt.state[params[0]]["note"] = "mine"
    set_gradients(params, gradients(params, 9))
    storages = [weakref.ref(p.grad.untyped_storage()) for p in params if p.grad is not None]
    opt.step()
    opt.zero_grad()
    assert [s() for s in storages] == [None] * len(params)
    assert_fused(last_report(), parameters=len(params))


def reloaded(opt: Any) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def grown(opt: Any) -> None:
    """As pruning and splitting do: other parameters take the place of these."""
    group = opt.param_groups[0]
    new = [torch.nn.Parameter(torch.cat([p.detach().flatten()] * 2)) for p in group["params"]]
    opt.state.clear()
    group["params"] = new


def with_amsgrad(opt: Any) -> None:
    opt.state.clear()
    opt.param_groups[0]["amsgrad"] = True


@pytest.mark.parametrize("change", [reloaded, grown, with_amsgrad])
@pytest.mark.parametrize("another_group", [False, True])
def test_states_that_were_replaced_are_released(change: Callable[[Any], None], another_group: bool) -> None:
    """At the next step; no plan of before keeps the dicts that were watched, nor what they held."""
    params = parameters(SHAPES)
    opt = torch.optim.Adam(params, lr=0.1)
    npu_fuse_pass.compile_optimizer_(opt)
    train(params, opt.step, seeds=range(4))
    if another_group:
        opt.add_param_group({"params": (params := parameters(SHAPES))})
        train(params, opt.step, seeds=range(4))
    states = [weakref.ref(t) for entry in opt.state.values() for t in entry.values()]
    change(opt)
    params = [p for group in opt.param_groups for p in group["params"]]
    train(params, opt.step, seeds=range(1))
    gc.collect()
    assert [s() for s in states] == [None] * len(states)


def test_parameters_that_come_to_overlap_are_refused() -> None:
    params = parameters(SHAPES)
    opt = optimizers.NpuFusedAdam(params)
    step = compiled(opt)
    train(params, step, seeds=range(5))
    overlapping(params)
    with pytest.warns(UserWarning, match="share memory"):
        step()
    assert watched(opt)


def test_memory_given_back_under_a_tensor_is_not_touched() -> None:
    params = parameters(((4, 4), (5,)))
    step = compiled(optimizers.NpuFusedSGD(params, lr=0.1))
    train(params, step)
    grad = params[0].grad
    assert grad is not None
    check = input_check.NativeInputs([*params], input_check._library["native"])
    assert check.same(None)
    params[0].untyped_storage().resize_(0)
    assert not check.same(None)


def test_a_gradient_lives_no_longer_than_without() -> None:
    params = parameters(SHAPES)
    opt = optimizers.NpuFusedAdam(params)
    step = compiled(opt)
    for seed in range(5):
        grads = [g.clone() for g in gradients(params, seed)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        storages = [weakref.ref(g.untyped_storage()) for g in grads]
        step()
        opt.zero_grad()
        del grads, p, g
        assert [s() for s in storages] == [None] * len(params), seed
    assert watched(opt)


def test_no_tensor_is_kept_alive() -> None:
    """Dynamo keeps what it compiled; the parameters of an optimizer that is gone must not stay with it."""
    params = parameters(SHAPES)
    opt = torch.optim.Adam(params)
    step = compiled(opt, fullgraph=False)
    train(params, step)
    gone = [weakref.ref(p) for p in params]
    del params, opt, step
    gc.collect()
    assert [p() for p in gone] == [None] * len(gone)


def test_only_tensors_of_the_same_kind_are_the_same() -> None:
    x = torch.ones(4)
    check = input_check.NativeInputs([x], input_check._library["native"])
    others: list[Any] = [torch.ones(5), torch.ones(4).double(), torch.ones(4, 1), torch._neg_view(x), x.to("meta")]
    others += [None, 1.0, torch.nn.Parameter(x), torch.ones(8)[::2], torch.ones(4).to_sparse()]
    assert check.same([x]) and check.same([torch.ones(4)]) and check.same(None)
    assert [check.same([other]) for other in others] == [False] * len(others)


def differing_anywhere(threads: int) -> list[bool]:
    """What checks find where one of many tensors is of another kind: at several places, listed and as a gradient."""
    input_check.wait()
    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(600)]
    set_gradients(params, [torch.ones(2) for _ in params])
    listed = [*params, *(p.grad for p in params if p.grad is not None)]
    check = input_check.NativeInputs(listed, input_check._library["native"])
    assert check.same(None) and check.same(listed)
    found = []
    for place in (0, 299, 300, 599):
        other = torch.ones(3)
        found.append(check.same([*listed[:place], other, *listed[place + 1 :]]))
        kept, params[place].grad = params[place].grad, None
        found.append(check.same(None))
        params[place].grad = kept
    return found


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_that_share_a_check_notice_what_one_of_them_sees(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        assert not any(differing_anywhere(threads))
    finally:
        torch.set_num_threads(before)


def test_a_check_has_fewer_threads_than_it_asks_for() -> None:
    code = "from tests.unit.lowerings.test_input_check import differing_anywhere as d; assert not any(d(2))"
    limited = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env=limited, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_the_library_python_checks_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise npu_fuse_pass.PlatformError("no headers here")

    with monkeypatch.context() as patch:
        patch.setattr(cpu_build, "load", refuse)
        patch.setattr(input_check, "_library", {})
        input_check._load()
        missing = input_check._library
    monkeypatch.setattr(input_check, "_library", missing)
    params = parameters(SHAPES)
    twins = clones(params)
    opt, eager = optimizers.NpuFusedAdam(params), torch.optim.Adam(twins)
    side_by_side(params, compiled(opt), twins, eager, 4)
    assert not watched(opt)
    assert_close(params, twins, 1e-5)
    assert_fused(last_report(), parameters=len(params))
    assert "no headers here" in str(last_report())


def test_a_second_process_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, compiled_often = counting_compiler(tmp_path / "compiler")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(input_check, "_library", {})
    with own_cache(tmp_path):
        for _ in range(2):
            forget()
            input_check._library.clear()
            input_check._load()
            assert list(input_check._library) == ["native"]
    assert compiled_often() == 1


def test_a_gradient_of_a_gradient_is_an_object_of_its_own() -> None:
    p, g = parameters(((3,),))[0], torch.ones(3)
    p.grad, g.grad = g, torch.ones(3)
    tensors: list[Tensor] = [p, g, g.grad]
    assert input_check._owners(tensors) == [-1, 0, -1]


@pytest.mark.parametrize("shared", range(4))
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stock", [False, True])
def test_a_gradient_of_two_parameters_may_be_two_at_the_next_step(stock: bool, groups: int, shared: int) -> None:
    """What is learned while it is shared is not that both have the one's gradient."""

    def trained(fused: bool) -> Params:
        params = parameters(((3, 4), (5,), (3, 4)))
        split = [dict(params=params[:2]), dict(params=params[2:], lr=0.2)] if groups == 2 else params
        opt: Any = (torch.optim.SGD if stock else optimizers.NpuFusedSGD)(split, lr=0.1)
        if fused:
            npu_fuse_pass.compile_optimizer_(opt)
        step_with_a_shared_gradient(params, opt.step, [shared])
        return params

    assert_close(trained(True), trained(False), 1e-6)
    assert_fused(last_report(), parameters=3)


@pytest.fixture
def slow_to_come(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """As in a new process: the library is asked for anew, and comes when this is set."""
    coming, load = threading.Event(), input_check._load

    def later() -> None:
        coming.wait()
        load()

    before = dict(input_check._library)
    input_check.forget()
    monkeypatch.setattr(input_check, "_load", later)
    yield coming
    coming.set()
    input_check.wait()
    input_check._library.update(before)


def first_checks(tensors: int) -> list[bool]:
    """Which of three steps are watched."""
    params = parameters([(2,)] * tensors)
    opt = optimizers.NpuFusedAdam(params)
    step, found = compiled(opt), []
    for seed in range(3):
        set_gradients(params, gradients(params, seed))
        step()
        found.append(watched(opt))
    assert_fused(last_report(), parameters=tensors)
    return found


def test_a_step_of_very_many_tensors_waits_for_the_library(
    slow_to_come: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_check, "WAITED", 8)
    threading.Timer(0.5, slow_to_come.set).start()
    assert first_checks(tensors=5) == [False, False, True]


def test_others_do_not_wait(slow_to_come: threading.Event) -> None:
    assert first_checks(tensors=5) == [False] * 3


def test_patience_ends(slow_to_come: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_check, "WAITED", 8)
    monkeypatch.setattr(input_check, "PATIENCE", 0.1)
    assert first_checks(tensors=5) == [False] * 3


def test_the_library_is_compiled_beside_the_first_kernel(
    slow_to_come: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []
    load = cpu_build.load

    def noting(source: str, functions: Any, flags: tuple[str, ...] = ()) -> Any:
        begun.append(bool(input_check._threads))
        return load(source, functions, flags)

    monkeypatch.setattr(cpu_build, "load", noting)
    first_checks(tensors=5)
    assert begun[0]
