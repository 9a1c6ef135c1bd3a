"""How scripts/bench.py compares: the arithmetic of its rounds by hand, and who takes part in which."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # its modules import each other as scripts do

import bench  # noqa: E402
import bench_measure  # noqa: E402
from bench_cases import FAMILIES, WORKLOADS, Family, Workload, peers  # noqa: E402
from bench_measure import HEAT, Race, extra_memory, race  # noqa: E402

import npu_fuse_pass  # noqa: E402


def test_ratios_are_of_rounds_not_of_medians() -> None:
    """A machine that is half as fast in two rounds of three: medians of both sides would come from other rounds."""
    run = Race({}, {"ours": [1.0, 2.0, 4.0], "fused": [3.0, 2.0, 12.0], "for-loop": [9.0]}, [8.0, 4.0, 2.0])
    assert run.best_peer() == "fused"
    assert run.ratio("fused") == 3.0
    assert run.ratio("for-loop") == 9.0  # who left after the heat is compared within the heat
    assert run.share(4e9) == 0.5


def test_who_left_is_not_the_best_because_the_machine_was_faster_then() -> None:
    run = Race({}, {"ours": [1.0, 3.0, 3.0], "fused": [2.0, 6.0, 6.0], "for-loop": [3.0]}, [9.0, 3.0, 3.0])
    assert run.best_peer() == "fused" and run.ratio("fused") == 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands unless it is moved, and seconds as bench_measure takes them."""
    now = [0.0]
    monkeypatch.setattr(bench_measure.time, "perf_counter", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def test_who_is_far_behind_leaves_after_the_heat(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "mul_", lambda *args: clock(1.0))
    costs = {"ours": 4.0, "foreach": 1.0, "fused": 1.2, "for-loop": 2.0}  # ours goes on, however slow it is
    contestants = {name: ([], lambda cost=cost: clock(cost)) for name, cost in costs.items()}
    run = race(contestants, seconds=20.0, multiplied=8)  # type: ignore[arg-type]
    rounds = {name: len(steps) for name, steps in run.steps.items()}
    assert rounds["for-loop"] == HEAT
    assert rounds["ours"] == rounds["foreach"] == rounds["fused"] == len(run.inplace) > HEAT
    assert run.best_peer() == "foreach" and run.ratio("foreach") == 0.25


def test_cells_below_their_aims_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cell = {"workload": "ResNet-50", "optimizer": "Adam", "aim": 3.0, "aim, bandwidth": 0.85}
    reached = {**cell, "ratio": 3.0, "share of bandwidth": 0.85}
    limited = {**cell, "optimizer": "RMSprop, stock", "ratio": 2.0, "share of bandwidth": 0.8}
    bench.print_missed([reached])
    assert capsys.readouterr().out == ""
    bench.print_missed([reached, limited])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == [
        "| ResNet-50 | RMSprop, stock | 3.00x | 2.00x | 2.50x |",
        "| ResNet-50 | RMSprop, stock | 85% | 80% | – |",
    ]


@pytest.mark.parametrize("name", ["Adam", "clip, Adam, average"])
def test_a_cell_is_measured_fused(name: str) -> None:
    """What the table compares is the compiled step, not the original that a refused one would run."""
    npu_fuse_pass.clear_reports()
    family = next(f for f in FAMILIES if f.name == name)
    cell = bench.measure(Workload("2 x 8", [(8,)] * 2, large=False), family, seconds=0.0, inductor=False)
    report = npu_fuse_pass.reports()[-1]
    report.raise_if_unfused()
    assert len(report.groups) == 1 and report.groups[0].bytes_per_element == family.bytes_per_element
    assert set(cell["milliseconds"]) == {"ours", "for-loop", "foreach", "fused"} and cell["rounds"] == HEAT


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_step_needs_no_memory_of_the_parameters_size(family: Family) -> None:
    """The allocator's own count, as the table prints it."""
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    params, step = peers(family, Workload("4 x 65536", [(65536,)] * 4, large=False), inductor=False)["ours"]
    extra_memory(params, step)  # the first step makes states
    assert extra_memory(params, step) < 0.01
    npu_fuse_pass.reports()[-1].raise_if_unfused()


def test_a_temporary_is_counted() -> None:
    params = [torch.nn.Parameter(torch.randn(65536)) for _ in range(4)]
    assert extra_memory(params, lambda: [p + p for p in params]) == 1.0
    assert extra_memory(params, lambda: [None for p in params if (p + p).isnan().all()]) > 0.25  # one at a time


def test_every_optimizer_has_peers_and_an_aim() -> None:
    tiny = Workload("1 x 1", [(1,)], large=False)
    for family in FAMILIES:
        assert len(peers(family, tiny, inductor=False)) > 1
        assert all(family.aim(workload) > 0.9 for workload in WORKLOADS)
