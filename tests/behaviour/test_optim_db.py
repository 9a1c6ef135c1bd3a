"""torch's database of optimizers: every step is fused, and equal to eager's within torch's own tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.optim_cases import CASES, HIDDEN, NOT_SHOWN, PARTLY, SHOWN, STEPS, Case, Result, run
from tests.support.training import assert_fused, heard, tier

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")

# operations that have no place in a fused kernel: matrix products, and reductions over one of several dimensions
KEPT = {"Muon": {"T", "matmul", "addmm", "norm"}, "Adafactor": {"norm", "matmul", "mean", "div_", "_foreach_div_"}}
# the groups that write, as multiples of the number of parameters. Muon's: momenta and
# parameters. Adafactor's: counters, parameters, variances
WRITTEN = {"Muon": [1, 1], "Adafactor": [1, 1, 2]}


def assert_equal(case: Case, got: Result, want: Result) -> None:
    """torch's own tolerances (`torch.testing`); Muon iterates in bfloat16, torch's own test leaves it out."""

    def close(a: Any, b: Any, what: str) -> None:
        limits: dict[str, Any] = dict(rtol=1.6e-2, atol=1e-5) if case.name == "Muon" else {}
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, **limits, msg=lambda m: f"{case}, {what}: {m}")
        elif isinstance(b, list):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                close(x, y, what)
        else:
            assert a == b, f"{case}, {what}"

    for i, (a, b) in enumerate(zip(got.params, want.params, strict=True)):
        close(a, b, f"parameter {i}")
        assert got.states[i].keys() == want.states[i].keys()
        for name, value in want.states[i].items():
            close(got.states[i][name], value, f"{name} of parameter {i}")
    for a, b in zip(got.losses, want.losses, strict=True):
        close(a, b, "loss")


def assert_all_fused(case: Case, got: Result, active: Callable[[int], int] = lambda graph: -1) -> None:
    """Every step ran in a graph that writes; each of those has a report, which accounts for all parameters."""
    count = len(got.params)
    assert sum(graph.runs for graph in got.steps) == STEPS, "some steps were not compiled"
    for number, graph in enumerate(got.steps):
        (report,) = graph.reports
        updates = count if active(number) < 0 else active(number)
        if case.name in PARTLY:
            assert report.fallback is None, report.fallback
            assert {u.op for u in report.unfused} <= KEPT[case.name], report.unfused
            written = sorted(group.updates for group in report.groups if group.writes == "leaves")
            assert written == [k * updates for k in WRITTEN[case.name]], report
            assert {group.lowering for group in report.groups} == {"cpu"}
            continue
        assert_fused(report, parameters=updates)
        assert [group.updates for group in report.groups] == [updates], report
    for graph in got.graphs:
        for report in [] if graph.writes else graph.reports:  # a closure's forward pass: nothing to fuse
            assert (report.groups, report.unfused, report.fallback) == ([], [], None)


def check(case: Case, backend: Any) -> None:
    """A case under a backend against eager."""
    want = run(case, None)
    with heard() as said:
        got = run(case, backend)
    assert_equal(case, got, want)
    assert_all_fused(case, got)
    assert not said


@pytest.mark.parametrize("case", tier(SHOWN), ids=str)
def test_case(case: Case) -> None:
    check(case, "npu_fused")


# What no backend is shown ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", tier(HIDDEN), ids=str)
def test_not_shown(case: Case) -> None:
    """Nothing that writes reaches a backend, aot_eager neither: the step is torch's own, or Dynamo's error."""
    for backend in ("npu_fused", "aot_eager"):
        if case.form == "unwrapped":
            with pytest.raises(torch._dynamo.exc.Unsupported):
                run(case, backend)
            continue
        got = run(case, backend)
        assert not got.steps
        assert_equal(case, got, run(case, None))


def test_every_case_is_shown_or_listed() -> None:
    """The table of what is not shown has no row too many, and the fast tier meets every optimizer in every form."""
    assert len(SHOWN) + len(HIDDEN) == len(CASES) == len(set(map(str, CASES)))
    for name, implementation, form in NOT_SHOWN:
        assert any(
            (name in (c.name, "*")) and (implementation in (c.implementation, "*")) and form == c.form for c in HIDDEN
        )
    fast = [c for i, c in enumerate(SHOWN) if i % 6 == i // 6 % 6]
    assert {c.name for c in fast} == {c.name for c in SHOWN}
    assert {(c.implementation, c.form) for c in fast} == {(c.implementation, c.form) for c in SHOWN}


# Step counters --------------------------------------------------------------------------------------------------------

COUNTING = [
    case
    for case in SHOWN
    if case.form == "method" and case.input.startswith("0:") and case.name not in ("SGD", "Muon", "Adafactor")
]


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_counters_that_differ(case: Case) -> None:
    """Every parameter's own counter counts: a loaded state in which they differ."""

    def prepare(params: list[Tensor], opt: Any, seed: int) -> None:
        if seed == 2:
            loaded = opt.state_dict()
            for i, state in loaded["state"].items():
                state["step"] = state["step"] + (0.0, 3.0, 40.0, 7.0)[i]
            opt.load_state_dict(loaded)

    want, got = run(case, None, prepare), run(case, "npu_fused", prepare)
    assert [float(s["step"]) for s in got.states] == [8, 11, 48, 15]
    assert_equal(case, got, want)
    assert_all_fused(case, got)


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_a_late_gradient(case: Case) -> None:
    """A parameter without a gradient at first: two counters differ from then on."""

    def prepare(params: list[Tensor], opt: Any, seed: int) -> None:
        if seed < 3:
            params[1].grad = None

    want, got = run(case, None, prepare), run(case, "npu_fused", prepare)
    assert [float(s["step"]) for s in got.states] == [8, 5, 8, 8]
    assert_equal(case, got, want)
    early = sum(graph.reports[0].groups[0].updates == 3 for graph in got.steps)
    assert early > 0
    assert_all_fused(case, got, lambda number: 3 if number < early else 4)


# The test of the tests ------------------------------------------------------------------------------------------------


def _passes_through(gm: Any, inputs: Any) -> Any:
    return gm.forward


def _runs_twice(gm: Any, inputs: Any) -> Any:
    from npu_fuse_pass import npu_fused

    compiled = npu_fused(gm, inputs)

    def twice(*args: Any) -> Any:
        compiled(*args)
        return compiled(*args)

    return twice


@pytest.mark.parametrize("backend", [_passes_through, _runs_twice, "aot_eager"], ids=["pass", "twice", "aot"])
def test_a_wrong_backend_is_noticed(backend: Any) -> None:
    for case in COUNTING[::5]:
        with pytest.raises((AssertionError, ValueError)):
            check(case, backend)


def test_silent_eager_is_noticed() -> None:
    """Where Dynamo gives up, steps run eagerly: right, but not what was asked for."""
    limited = torch._dynamo.config.patch(recompile_limit=1)
    with limited, pytest.raises(AssertionError, match="not compiled"):
        check(COUNTING[0], "npu_fused")
