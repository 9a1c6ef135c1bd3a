"""The tail of a training step as one function: clipping, the step of an optimizer, an average of the parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.rules.clipping import grouped
from tests.support.cases import BY_NAME, ONE_EACH, Case
from tests.support.training import assert_close, assert_fused, error, gradients, last_report, parameters, set_gradients

SHAPES = [(3, 4), (5,), (2, 3, 2), (40,), (5,)]
MAX_NORM = 1.0

pytestmark = pytest.mark.usefixtures("afresh")


class Tail:
    """Parameters, an optimizer over them, averages of them, and the tail of a step over all."""

    def __init__(self, make: Callable[[Any], Any], shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        self.params = parameters(shapes)
        self.averages = [p.detach().clone() for p in self.params]
        self.opt = make(self.params)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.params, 0.1)

    def compiled(self, **options: Any) -> Callable[[], None]:
        tail = self  # one cell for everything, as in a script's globals

        def function() -> None:
            torch.nn.utils.clip_grad_norm_(tail.params, MAX_NORM)
            tail.opt.step()
            with torch.no_grad():
                torch._foreach_lerp_(tail.averages, tail.params, 0.1)

        return torch.compile(function, **{"backend": "npu_fused", "fullgraph": True, **options})

    @property
    def tensors(self) -> list[Tensor]:
        states = [s for p in self.params for s in self.opt.state.get(p, {}).values() if isinstance(s, Tensor)]
        return [p.detach() for p in self.params] + self.averages + states

    def twin(self) -> Tail:
        other = copy.copy(self)
        other.params, other.averages, other.opt = copy.deepcopy((self.params, self.averages, self.opt))
        return other


def both(tail: Tail, twin: Tail, step: Callable[[], None], seeds: Sequence[int], scale: float = 3.0) -> None:
    """The same steps, compiled and eagerly."""
    for seed in seeds:
        for t in (tail, twin):
            set_gradients(t.params, [scale * g for g in gradients(t.params, seed)])
        step()
        twin.step()


def assert_equal(tail: Tail, twin: Tail) -> None:
    assert_close(tail.tensors, twin.tensors, 2e-5)
    for a, b in zip(tail.params, twin.params, strict=True):  # what clipping leaves in the gradients
        assert a.grad is not None and b.grad is not None
        assert error(a.grad, b.grad) < 1e-6


def test_one_graph_one_group_fewest_passes() -> None:
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()
    both(tail, twin, tail.compiled(), range(4))
    assert_equal(tail, twin)
    [report] = npu_fuse_pass.reports()
    assert_fused(report, parameters=len(SHAPES))
    [group] = report.groups
    assert group.launches == 2  # the norm needs all gradients before anything can be written


def traffic(tail: Tail) -> int:
    """Bytes for each element from the unique leaves: all are read and written, gradients are read once more."""
    sizes = {"grad": 4, "param": 4, "average": 4, **{n: 4 for n, s in tail.opt.state[tail.params[0]].items() if s.ndim}}
    return sizes["grad"] + 2 * sum(sizes.values())  # the norm's pass reads gradients; the other reads and writes all


NORMS = 3 * 4  # LAMB's own: one pass reads p, g, m, v and writes g, m, v; another reads p, m, v again to write p


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda c: c.name)
def test_bytes_are_those_of_the_unique_leaves(case: Case) -> None:
    tail = Tail(case.build)
    twin = tail.twin()
    step = tail.compiled()
    both(tail, twin, step, range(3))
    assert_equal(tail, twin)
    [report] = npu_fuse_pass.reports()
    assert_fused(report, parameters=len(SHAPES))
    after = report.bytes_per_element["after"]
    assert after == traffic(tail) + (NORMS if case.name == "lamb" else 0)
    assert report.bytes_per_element["before"] > 3 * after


NUMBERS_OF_OTHERS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "the first one's": lambda tensors: tensors[0].norm(),
    "a test": lambda tensors: tensors[1].sum() > 0,
    "the mean of stacked norms": lambda tensors: torch.stack([t.norm() for t in tensors]).mean(),
    "an order of three": lambda tensors: torch.linalg.vector_norm(torch.stack([t.norm(3) for t in tensors]), 3),
}


@pytest.mark.parametrize("name", NUMBERS_OF_OTHERS)
def test_a_number_of_one_tensor_that_updates_of_others_read(name: str) -> None:
    tensors = gradients(parameters(SHAPES), 0)
    twins = copy.deepcopy(tensors)

    def update(tensors: list[Tensor]) -> Tensor:
        number = NUMBERS_OF_OTHERS[name](tensors)
        for t in tensors:
            t.mul_(2).mul_(number)
        return number

    torch.testing.assert_close(torch.compile(update, backend="npu_fused")(tensors), update(twins))
    assert_close(tensors, twins, 1e-6)
    report = last_report()
    assert report.fallback is None and {r.op for r in report.reasons} <= {"stack"}


def test_against_float64() -> None:
    """Independent of torch's eager code: clipping, Adam and the average written down in float64."""
    case = BY_NAME["adam"]
    tail = Tail(case.build)
    step, oracle = tail.compiled(), case.oracle(tail.params)
    averages = [p.detach().double() for p in tail.params]
    for seed in range(4):
        grads = [3 * g for g in gradients(tail.params, seed)]
        set_gradients(tail.params, grads)
        step()
        norm = torch.cat([g.double().flatten() for g in grads]).norm()
        oracle.step([g.double() * torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0) for g in grads])
        averages = [a + 0.1 * (p.double() - a) for a, p in zip(averages, oracle.values, strict=True)]
    assert_close(tail.params, oracle.values)
    assert_close(tail.averages, averages)


def test_changing_numbers_and_loading_never_compile_again() -> None:
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()
    step = tail.compiled()
    for seed in range(6):
        for t in (tail, twin):
            t.opt.param_groups[0].update(lr=0.01 / (seed + 1), betas=(0.9 - 0.01 * seed, 0.99), weight_decay=seed / 100)
            if seed in (2, 4):
                t.opt.load_state_dict(copy.deepcopy(t.opt.state_dict()))
        both(tail, twin, step, [seed])
    assert_equal(tail, twin)
    assert [r.cause for r in npu_fuse_pass.reports()] == ["compile"]


def test_gradients_that_come_and_go() -> None:
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()
    step = tail.compiled()
    for seed in range(5):
        for t in (tail, twin):
            grads: list[Tensor | None] = [3 * g for g in gradients(t.params, seed)]
            if seed % 2:
                grads[1] = None
            set_gradients(t.params, grads)
        step()
        twin.step()
        assert_close(tail.tensors, twin.tensors, 2e-5)
    assert len(npu_fuse_pass.reports()) == 2  # Dynamo's guard: two sets of gradients
    assert all(r.fallback is None and not r.unfused for r in npu_fuse_pass.reports())


def test_zero_dimensional_parameters() -> None:
    """CLIP's logit_scale."""
    tail = Tail(BY_NAME["adamw"].build, [(3, 4), (), (5,)])
    twin = tail.twin()
    both(tail, twin, tail.compiled(), range(4))
    assert_equal(tail, twin)
    assert_fused(last_report(), parameters=3)


def test_parameters_that_move_or_join() -> None:
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()
    step = tail.compiled()
    both(tail, twin, step, range(2))
    for t in (tail, twin):
        with torch.no_grad():
            t.params[0].data = t.params[0].data.clone()
        new = torch.nn.Parameter(torch.linspace(0, 1, 6).view(2, 3))
        t.params.append(new)
        t.averages.append(new.detach().clone())
        t.opt.add_param_group(dict(params=[new], lr=0.5))
    both(tail, twin, step, range(2, 4))
    assert_equal(tail, twin)
    assert_fused(last_report(), parameters=len(SHAPES) + 1)


def test_a_parameter_that_takes_the_place_of_another() -> None:
    """The graph does not know the new one; the optimizer updates it nevertheless, as it does eagerly."""
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()
    step = tail.compiled()
    both(tail, twin, step, range(2))
    new = []
    for t in (tail, twin):
        new.append(torch.nn.Parameter(torch.linspace(0, 1, 5)))
        t.opt.param_groups[0]["params"][1] = new[-1]
    for seed in range(2, 4):
        for p in new:
            p.grad = torch.full((5,), 0.1 * seed)
        both(tail, twin, step, [seed])
    assert_close(new[:1], new[1:], 2e-5)
    assert float(new[0].detach().sum()) != pytest.approx(2.5)
    assert_close(
        [p.detach() for p in tail.params] + tail.averages, [p.detach() for p in twin.params] + twin.averages, 2e-5
    )


def test_hooks_run_in_their_place() -> None:
    """A hook may look at clipped gradients: the graph runs operation by operation, and says so."""
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()
    seen: list[float] = []
    for t in (tail, twin):
        t.opt.register_step_pre_hook(lambda opt, *_: seen.append(float(opt.param_groups[0]["params"][0].grad.norm())))
    step = tail.compiled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both(tail, twin, step, range(2))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert_equal(tail, twin)
    assert "hooks" in (last_report().fallback or "")
    assert any("hooks" in str(w.message) for w in caught)


def test_two_optimizers() -> None:
    def make(params: Any) -> Any:
        return BY_NAME["adam"].build(params[:2])

    tail = Tail(make)
    twin = tail.twin()
    others = [BY_NAME["sgd_momentum"].build(t.params[2:]) for t in (tail, twin)]
    other, eager = others

    def function() -> None:
        torch.nn.utils.clip_grad_norm_(tail.params, MAX_NORM)
        tail.opt.step()
        other.step()

    step = torch.compile(function, backend="npu_fused", fullgraph=True)
    for seed in range(3):
        for t in (tail, twin):
            set_gradients(t.params, [3 * g for g in gradients(t.params, seed)])
        step()
        torch.nn.utils.clip_grad_norm_(twin.params, MAX_NORM)
        twin.opt.step()
        eager.step()
    assert_close(tail.params, twin.params, 2e-5)
    assert_fused(last_report(), parameters=len(SHAPES))
    assert len(last_report().groups) == 2


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_other_backends(backend: str) -> None:
    """Functionalised, the step gets copies of parameters and clipped gradients."""
    tail = Tail(BY_NAME["lamb"].build)
    twin = tail.twin()
    both(tail, twin, tail.compiled(backend=backend), range(3))
    assert_equal(tail, twin)


def test_a_closure_stays_outside() -> None:
    tail = Tail(BY_NAME["adam"].build)
    twin = tail.twin()

    def loss(t: Tail) -> Any:
        def closure() -> Tensor:
            t.opt.zero_grad()
            value = sum((p * p).sum() for p in t.params)
            value.backward()  # type: ignore[union-attr]
            return value  # type: ignore[return-value]

        return closure

    step = torch.compile(lambda: tail.opt.step(loss(tail)), backend="npu_fused")
    for _ in range(2):
        assert step().item() == pytest.approx(twin.opt.step(loss(twin)).item())
    assert_close(tail.params, twin.params, 2e-5)


@pytest.mark.parametrize("platform", ["cpu", "interpreter"])
def test_norms_of_what_was_clipped(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAMB's global norm of clipped gradients: one sum depends on another, so gradients are read once more."""
    if platform == "interpreter":
        monkeypatch.setenv("CXX", "/does/not/exist")
    tail = Tail(BY_NAME["lamb_global"].build)
    twin = tail.twin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter says that there is no compiler
        both(tail, twin, tail.compiled(), range(3))
    assert_equal(tail, twin)
    report = last_report()
    assert not report.unfused and len(report.groups) == 1
    if platform == "cpu":
        assert_fused(report, parameters=len(SHAPES))
        assert report.groups[0].launches == 3
        assert report.bytes_per_element["after"] == traffic(tail) + NORMS + 4
    args = [torch.ones(()) for _ in report.fused_graph.graph.find_nodes(op="placeholder")]
    assert len(args) > 0 and str(report.fused_graph.graph).count("multi_tensor_contribute") == 2


# Loss scaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "sgd_momentum", "lamb"])
def test_unscaling_and_skipped_steps(name: str) -> None:
    """As torch.amp.GradScaler does it, without asking the device: no step where a gradient is infinite."""
    tail = Tail(BY_NAME[name].build)
    twin = tail.twin()
    scale = torch.tensor(1 / 8.0)
    tail.opt.found_inf = torch.zeros(())
    skipped = []

    def function() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_([p.grad for p in tail.params], tail.opt.found_inf, scale)
        torch.nn.utils.clip_grad_norm_(tail.params, MAX_NORM)
        tail.opt.step()

    step = torch.compile(function, backend="npu_fused", fullgraph=True)
    for seed in range(5):
        grads = [3 * g for g in gradients(tail.params, seed)]
        if seed in (1, 3):
            grads[2].view(-1)[3] = float("inf") if seed == 1 else float("nan")
        set_gradients(tail.params, [8 * g for g in grads])
        tail.opt.found_inf.zero_()
        before = [t.clone() for t in tail.tensors]
        step()
        skipped.append(float(tail.opt.found_inf))
        if skipped[-1]:
            assert all(torch.equal(a, b) for a, b in zip(tail.tensors, before, strict=False))
            continue
        set_gradients(twin.params, grads)
        torch.nn.utils.clip_grad_norm_(twin.params, MAX_NORM)
        twin.opt.step()
    assert skipped == [0, 1, 0, 1, 0]
    assert_close([p.detach() for p in tail.params], [p.detach() for p in twin.params], 2e-5)
    for p, q in zip(tail.params, twin.params, strict=True):
        assert float(tail.opt.state[p].get("step", 3)) == float(twin.opt.state[q].get("step", 3)) == 3
    [report] = npu_fuse_pass.reports()
    assert report.fallback is None and not report.unfused
    assert sum(g.updates for g in report.groups if g.elements > 1) == len(SHAPES)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_step_by_itself_is_skipped_too(mode: str) -> None:
    tail = Tail(BY_NAME["adam"].build)
    step = torch.compile(tail.opt.step, backend="npu_fused") if mode == "compiled" else tail.opt.step
    set_gradients(tail.params, gradients(tail.params, 0))
    step()
    before = [t.clone() for t in tail.tensors]
    tail.opt.found_inf = torch.ones(())
    step()
    assert all(torch.equal(a, b) for a, b in zip(tail.tensors, before, strict=True))
    tail.opt.found_inf = None
    step()
    assert not torch.equal(tail.params[0], before[0])


# Stock optimizers ----------------------------------------------------------------------------------------------------


def test_stock_optimizers_break_the_graph_and_the_report_says_where() -> None:
    tail = Tail(lambda params: torch.optim.Adam(params, lr=0.02))
    twin = tail.twin()
    both(tail, twin, tail.compiled(fullgraph=False), range(3))
    assert_equal(tail, twin)
    reports = npu_fuse_pass.reports()
    assert all(r.fallback is None and not r.unfused for r in reports)
    assert sum(r.graph_break is None for r in reports) >= 1
    broken = [r for r in reports if r.graph_break]
    assert broken
    assert any("optim" in r.graph_break for r in broken), [r.graph_break for r in broken]  # torch's file that breaks
    assert all(r.graph_break in str(r) for r in broken)
    updated = [sum(g.updates for g in r.groups) for r in reports]
    assert updated.count(len(SHAPES)) >= 3  # clipping, the step and the average, each by itself


@pytest.mark.parametrize("with_indices", [False, True])
def test_gradients_are_grouped_as_torch_groups_them(with_indices: bool) -> None:
    """Older torches capture clipping by this function (scripts/versions.sh compiles with it)."""
    first = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(4), torch.ones(1, dtype=torch.bfloat16)]
    lists: list[list[Tensor | None]] = [[*first], [torch.zeros_like(first[0]), None, None, torch.zeros_like(first[3])]]
    found, expected = grouped(lists, with_indices), torch._C._group_tensors_by_device_and_dtype(lists, with_indices)
    assert found.keys() == expected.keys() and len(found) == 3
    for kind, (entries, positions) in found.items():
        assert positions == list(expected[kind][1])
        for of_list, others in zip(entries, expected[kind][0], strict=True):
            assert len(of_list) == len(others) and all(a is b for a, b in zip(of_list, others, strict=True))
