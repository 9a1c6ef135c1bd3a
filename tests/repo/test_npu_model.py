"""The model of step times on an NPU (scripts/bench.py --model npu): its arithmetic by hand, and torch's own counts."""

from __future__ import annotations

import math
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # its modules import each other as scripts do

import npu_model  # noqa: E402
import npu_peers  # noqa: E402
from npu_model import compare, corners, eager, nominal, seconds, static_graph  # noqa: E402

from tests.support.forked import run_script  # noqa: E402

C = {"bandwidth": 1e12, "enqueue": 12e-6, "share": 0.5, "task": 2e-6, "head": 30e-6}


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (eager([500_000_000]), 1e-3),  # memory: 0.5 GB at half of 1 TB/s; its one launch takes 12 us meanwhile
        (static_graph([500_000_000]), 1e-3 + 30e-6),
        (eager([28_672] * 1000), 12e-3),  # launches: 1000 x 12 us, where the device needs 1000 x 2 us
        (static_graph([28_672] * 1000), 2e-3 + 30e-6),  # the shortest task: 0.06 us of memory each
        (static_graph([4, 4_000_000]), 2e-6 + 8e-6 + 2e-6 + 30e-6),  # 10 us of tasks, and a launch takes 12
        (static_graph([4], host=1e-3), 12e-6 + 1e-3 + 30e-6),  # Python before the launch
        (eager([]), 0.0),
    ],
    ids=["memory", "memory, graph", "launches", "tasks", "one launch", "python", "nothing"],
)
def test_a_step_by_hand(work: npu_model.Work, expected: float) -> None:
    assert seconds(work, C) == pytest.approx(expected, rel=1e-12)


def test_what_a_step_moves() -> None:
    work = eager([8, 12, 8])
    assert (work.nodes, work.launches, work.moved, work.graph) == (3, 3, 28, False)
    assert static_graph([8, 12, 8]).launches == 1


def test_every_constant_has_a_source_and_what_is_assumed_a_range() -> None:
    assert nominal()["bandwidth"] == 1.6e12 and nominal()["enqueue"] == 12.1e-6
    for c in npu_model.CONSTANTS.values():
        assert c.source
        assert ("assumed" in c.source) == (c.low is not None and c.high is not None)
        assert c.low is None or c.high is None or c.low < c.value < c.high
    assert len(list(corners())) == 2 ** len([c for c in npu_model.CONSTANTS.values() if c.low is not None])


def test_a_comparison_holds_or_says_what_decides() -> None:
    small, large = eager([28_672_000]), eager([81_920_000])
    won = compare(static_graph([28_672_000]), {"one": large, "two": eager([4096] * 1000)})
    assert (won.peer, won.why) == ("one", "")
    assert won.ratio == pytest.approx(seconds(large, nominal()) / seconds(static_graph([28_672_000]), nominal()))
    assert won.worst <= won.ratio
    for ours, why in [
        (static_graph([10_000] * 1000), "1000 nodes of at least 2 us each"),
        (static_graph([100_000_000]), "100 MB, the peer moves 29 MB"),
        (static_graph([28_672_000], host=1e-3), "Python before the launch takes 1000 us"),
        (static_graph([28_672_000]), "the graph's head of 30 us decides"),
        (static_graph([28_000_000, *[100] * 8]), "9 nodes with 28 MB, the peer has 1 with 29"),
    ]:
        lost = compare(ours, {"peer": small})
        assert lost.ratio < 1 and lost.worst < 1
        assert why in lost.why


# launches per list operation: 48 tensors at once, over the number of lists (op-plugin, ForeachConstants.h)
FOREACH = {
    "Adam": ((2, 1, 3, 2, 1, 1, 3), 12 + 8 + 12 + 8 + 8 + 8 + 16),  # lerp_ mul_ addcmul_ sqrt div_ add_ addcdiv_
    "AdamW": ((1, 2, 1, 3, 2, 1, 1, 3), 8 + 12 + 8 + 12 + 8 + 8 + 8 + 16),
    "SGD": ((1, 2, 2), 8 + 12 + 12),  # mul_ add_ add_
}


@pytest.mark.parametrize("name", FOREACH)
def test_torchs_foreach_by_hand(name: str) -> None:
    lists, size = FOREACH[name]
    n, options = 50, dict(lr=0.1, momentum=0.9) if name == "SGD" else {}
    work = npu_peers.foreach(name, [(3, 4)] * n, **options)
    assert work.launches == sum(math.ceil(n / (48 // count)) for count in lists)
    assert work.moved == size * 12 * n
    assert work.syncs == 0


def test_torchs_fused_forms_move_what_they_must() -> None:
    shapes = [(3, 4), (5,)]
    adamw, sgd = npu_peers.FUSED["AdamW"][0], npu_peers.FUSED["SGD"][0]
    assert adamw is not None and sgd is not None
    assert (adamw(shapes).tasks, adamw(shapes).launches) == ({28 * 12: 1, 28 * 5: 1}, 2)
    assert (sgd(shapes).tasks, sgd(shapes).launches) == ({20 * 17: 1}, 1)
    assert npu_peers.FUSED["Adam"][0] is None


def test_host_operations_are_not_launches() -> None:
    step, x = torch.zeros(()), torch.empty(4, device="meta")
    with npu_peers.Counting() as found:
        step += 1
        x.mul_(2).add_(x)
        x.view(2, 2).zero_()
    assert found.launches == [("mul_", 32), ("add_", 32), ("zero_", 16)]


def test_without_torch_npu_it_says_what_to_run(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run.py").write_text("import sys; sys.modules['torch_npu'] = None; import bench; bench.main()")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"}
    done = run_script(tmp_path / "run.py", "--model", "npu", cwd=tmp_path, environment=environment)
    assert done.returncode == 1
    assert "Run: bash scripts/bench.sh --model npu" in done.stderr
