"""Operations on lists: every row of the table, which groups take them, how many launches that leaves, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from layouts import Parameters, Twins, adjacent, shapes
from torch import Tensor

import optimizers
from npu_fuse_pass import errors
from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.lowerings.npu.emit import elementwise, list_operations
from npu_fuse_pass.match.result import NoMatch
from optimizers.paddle import RMSProp
from tests.support.graphs import fused

pytestmark = pytest.mark.usefixtures("afresh")


# Every row of the table: what is computed from two tensors of a member and a number -----------------------------------

ROWS: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    ("add", "tt"): lambda x, y, w: x + y,
    ("sub", "tt"): lambda x, y, w: x - y,
    ("mul", "tt"): lambda x, y, w: x * y,
    ("div", "tt"): lambda x, y, w: x / y,
    ("maximum", "tt"): lambda x, y, w: torch.maximum(x, y),
    ("minimum", "tt"): lambda x, y, w: torch.minimum(x, y),
    ("fma", "tst"): lambda x, y, w: torch.add(x, y, alpha=3),
    ("fma", "ttt"): lambda x, y, w: torch.addcmul(x, y, y),
    ("lerp", "tts"): lambda x, y, w: torch.lerp(x, y, w),
    ("sqrt", "t"): lambda x, y, w: (x * x + y * y).sqrt(),
    ("neg", "t"): lambda x, y, w: -x + y,
    ("abs", "t"): lambda x, y, w: x.abs() + y,
    ("reciprocal", "t"): lambda x, y, w: y.reciprocal() + x,
    ("add", "ts"): lambda x, y, w: x + w,
    ("sub", "ts"): lambda x, y, w: x - w,
    ("mul", "ts"): lambda x, y, w: w * x,
    ("div", "ts"): lambda x, y, w: x / w,
}


def run(
    row: tuple[str, str], count: int = 3, dtype: torch.dtype = torch.float32, kernels: str = "auto"
) -> tuple[list[Tensor], list[Tensor], harness.GeGraph]:
    """What a graph makes of some tensors of other shapes, what eager makes of them, and the graph."""
    generator = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(k % 7 + 1, generator=generator).to(dtype) for k in range(count)] for _ in range(2))
    w = torch.tensor(0.25, dtype=torch.float64)
    function = ROWS[row]
    wanted = [function(x, y, w) for x, y in zip(xs, ys, strict=True)]

    def step(*given: Tensor) -> None:
        for k in range(count):
            given[k].copy_(function(given[k], given[count + k], given[2 * count]))

    examples = [*xs, *ys, w]
    captured, groups = fused(step, *examples)
    values = [examples[leaf.index] if leaf.kind == "input" else None for leaf in captured.leaves]
    with harness.record() as graphs:
        matches = {g.name: NoMatch("not asked for") for g in groups}
        npu.Program(captured.leaves, groups, matches=matches, kernels=kernels)(values, complete=True)
    return xs, wanted, graphs[0]


def test_every_row_has_a_case() -> None:
    assert set(ROWS) == set(list_operations.LISTS)
    assert set(list_operations.DOCUMENTS) <= set(elementwise.DOCUMENTS)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_row(row: tuple[str, str]) -> None:
    got, wanted, graph = run(row)
    assert graph.counts()[list_operations.LISTS[row].name] == 1
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_chunks() -> None:
    """At most 50 tensors are in a list."""
    for count, chunks in ((50, [50]), (51, [50, 1]), (120, [50, 50, 20])):
        got, wanted, graph = run(("mul", "tt"), count)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
        found = [len(op.output_desc) for op in graph.ops if op.type == "ForeachMulList"]
        assert found == chunks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """One operation for each tensor."""
    got, wanted, graph = run(("mul", "tt"), dtype=dtype)
    torch.testing.assert_close(got, wanted)
    assert not any(name.startswith("Foreach") for name in graph.counts())


@pytest.mark.parametrize(("chip", "used"), [("Ascend910ProB", False), ("Ascend910_9391", True), ("Ascend950", False)])
def test_chips(chip: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_npu

    monkeypatch.setattr(torch_npu.npu, "get_device_name", lambda *_: chip)
    _, _, graph = run(("mul", "tt"))
    assert ("ForeachMulList" in graph.counts()) == used


# Optimizers -----------------------------------------------------------------------------------------------------------


def separate(count: int) -> Callable[[], Parameters]:
    return lambda: [torch.nn.Parameter(t.clone()) for t in adjacent(shapes(count), 0)]


# For a chunk of 50 parameters: launches in lists, for each parameter besides; bytes per element as elementwise.
OPTIMIZERS: dict[str, tuple[Callable[[Parameters], Any], int, int, int]] = {
    "RMSpropTF": (lambda p: optimizers.NpuFusedRMSpropTF(p, lr=0.02), 9, 0, 92),
    "Paddle RMSProp": (lambda p: RMSProp(0.02, parameters=p), 11, 0, 108),
    "AMSGrad": (lambda p: optimizers.NpuFusedAdam(p, lr=0.02, amsgrad=True), 12, 2, 136),
    "LAMB": (lambda p: optimizers.NpuFusedLamb(p, lr=0.02), 13, 3, 148),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    make, in_lists, each, size = OPTIMIZERS[name]
    for count in (10, 100):
        plain = Twins(make, separate(count), kernels="elementwise")
        plain.step(0)
        alone = plain.row
        twins = Twins(make, separate(count))
        for k in range(3):
            twins.step(k, missing=(3,) if k == 1 else ())
        assert [g.runs for g in twins.graphs] == [3]
        print(f"{name}, N = {count}: nodes {twins.nodes()} in lists, {plain.nodes()} elementwise; {size} bytes/element")
        assert twins.row.kernel == list_operations.KERNEL
        assert twins.row.launches == math.ceil(count / 50) * in_lists + count * each
        assert twins.row.bytes_per_element == alone.bytes_per_element == size
        assert twins.nodes() < 0.6 * plain.nodes() and twins.row.launches < alone.launches / 2
        assert set(twins.graphs[0].counts()) <= set(elementwise.DOCUMENTS)


def test_on_request_elementwise() -> None:
    twins = Twins(OPTIMIZERS["RMSpropTF"][0], separate(4), kernels="elementwise")
    twins.step(0)
    assert twins.row.kernel == "GE elementwise"
    assert not any(name.startswith("Foreach") for name in twins.graphs[0].counts())


@pytest.mark.parametrize("leaf", ["load", "run", "write"])
def test_refused_lists(leaf: str) -> None:
    """Where GE refuses them the elementwise form runs from the same values."""
    twins = Twins(OPTIMIZERS["RMSpropTF"][0], separate(4))
    failing = harness.Recording(failing={leaf: RuntimeError("no such operation")}, only=frozenset({"ForeachSqrt"}))
    harness._recordings.append(failing)
    try:
        with pytest.warns(UserWarning, match="no such operation"):
            twins.step(0)
        twins.step(1)
    finally:
        harness._recordings.remove(failing)
    assert twins.row.kernel == "GE elementwise"
    assert "no such operation" in twins.row.note


# These tests can fail -------------------------------------------------------------------------------------------------

PLANTED = {
    ("add", "tt"): ("sub", "tt"), ("sub", "tt"): ("add", "tt"), ("mul", "tt"): ("div", "tt"),
    ("div", "tt"): ("mul", "tt"), ("maximum", "tt"): ("minimum", "tt"), ("minimum", "tt"): ("maximum", "tt"),
    ("fma", "ttt"): ("lerp", "tts"), ("sqrt", "t"): ("abs", "t"), ("neg", "t"): ("abs", "t"),
    ("reciprocal", "t"): ("neg", "t"), ("add", "ts"): ("sub", "ts"), ("div", "ts"): ("mul", "ts"),
    ("mul", "ts"): ("div", "ts"),
}  # fmt: skip


@pytest.mark.parametrize("row", PLANTED, ids=" ".join)
def test_a_planted_error_is_noticed(row: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(list_operations.LISTS, row, list_operations.LISTS[PLANTED[row]])
    with pytest.raises((AssertionError, errors.GraphRefused)):
        test_row(row)


def test_too_long_lists_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_operations, "LONGEST", 60)
    with pytest.raises(errors.GraphRefused, match="at most 50"):
        run(("mul", "tt"), 60)
