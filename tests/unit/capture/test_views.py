"""Stage 1, capture: in-place operations through views, and views of what was written in place, around fused groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.capture import graph
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.errors import Mismatch
from npu_fuse_pass.ir import verify
from npu_fuse_pass.ir.types import Captured
from npu_fuse_pass.lowerings import eager, segmented
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.reasons import Code
from tests.support.graphs import traced

Step = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def copies_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_SAVED", 0)


EXAMPLES = 400
CODES = {Code.VIEW_WRITTEN, Code.VIEW_STALE}


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 4, generator=generator) + k for k in range(2)]


def diagonal_of_a_product(p: Any, q: Any) -> None:
    """Newton-Schulz iterations add to the diagonal."""
    y = p @ q
    y.diagonal(dim1=-2, dim2=-1).add_(2.0)
    p.add_(y)


def rows_of_a_state(p: Any, q: Any) -> None:
    p.mul_(0.5)
    p[:2].addmm_(p[2:], q)
    q.sub_(p)


def overlapping(p: Any, q: Any) -> None:
    a, b = p[:2], p[1:]
    a.add_(1)
    b.mul_(2)
    a.sub_(q[:2])
    p.mul_(0.5)
    q.add_(b[0] * 2)


def views_of_views(p: Any, q: Any) -> None:
    a, c = p[1:], p.t()
    b = a[0]
    b.mul_(3)
    c[0].add_(1)
    a.add_(b * 0.5)
    q.copy_(c)


def in_another_shape(p: Any, q: Any) -> None:
    v = p.view(-1)
    v.add_(1)
    p.mul_(2)
    q.add_(v[:4])
    v[3:7].zero_()
    q.mul_(p[0])


def a_view_is_read_after_its_base_was_written(p: Any, q: Any) -> None:
    v = p[1]
    p.sub_(q)
    q.add_(torch.sinc(v) * v)
    p.zero_()
    q.add_(v)


def random_numbers(p: Any, q: Any) -> None:
    p.mul_(0.5)
    v = p[:, ::2]
    v.mul_(2)
    v.normal_()
    w = torch.rand_like(q)
    p[1].uniform_()
    q.mul_(w)


def bits(p: Any, q: Any) -> None:
    p.mul_(1.5)
    p.view(torch.int32).bitwise_and_(-65536)
    q.add_(p)


def an_expanded_view(p: Any, q: Any) -> None:
    e = p[:1].expand(4, 4)
    p[0].add_(1)
    q.add_(e)


def several_at_once(p: Any, q: Any) -> None:
    torch._foreach_add_([p[0], q[0], p[1]], 1.0)
    for i, row in enumerate(p.unbind()):
        row.mul_(i + 1)
    a, b = q.split(2)
    a.add_(b)
    q.add_(p)


def assigned(p: Any, q: Any) -> None:
    v = p[0]
    torch.add(p[0], q[0], out=p[1])
    q.add_(v)
    v.copy_(q[1])
    p.mul_(q)


def elements(p: Any, q: Any) -> None:
    p[0][0].add_(1)
    p[1][2].mul_(0.5)
    q.mul_(p)


def what_is_returned(p: Any, q: Any) -> Any:
    t = p * 2
    v = t[0].add_(q[0])
    p.sub_(t)
    v.lerp_(q[1], 0.5)
    return t


def integers(p: Any, q: Any) -> None:
    m = torch.zeros(4, dtype=torch.int64)
    m[1:3].add_(2)
    p.add_(q[m])


def in_another_layout(p: Any, q: Any) -> None:
    """A tensor's value is one that lies transposed in memory."""
    p.copy_(torch.sinc(q.t()))
    p.view(torch.int16).bitwise_and_(-256)
    q.copy_(torch.sinc(p.t()))
    q.mul_(torch.rand_like(q))


def gaps_in_another_layout(p: Any, q: Any) -> None:
    v = p.t()[:, ::2]
    v.copy_(q[:, 1:3] * 2)
    q[:, 1:3].mul_(torch.rand_like(v))
    p.mul_(2)


STEPS: list[Step] = [
    *(diagonal_of_a_product, rows_of_a_state, overlapping, views_of_views, in_another_shape),
    *(a_view_is_read_after_its_base_was_written, random_numbers, bits, an_expanded_view, several_at_once),
    *(assigned, elements, what_is_returned, integers, in_another_layout, gaps_in_another_layout),
]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("step", STEPS)
def test_views_stay_and_the_rest_is_fused(step: Step) -> None:
    got, want = tensors(), tensors()
    if step is in_another_shape:
        got[1], want[1] = got[1][0].clone(), want[1][0].clone()
    compiled = torch.compile(step, backend="npu_fused", options={"verify": True})
    for seed in range(2):
        found = []
        for function, arguments in ((step, want), (compiled, got)):
            torch.manual_seed(seed)
            found.append([*arguments, function(*arguments), torch.get_rng_state()])
        for a, b in zip(*found, strict=True):
            assert a is b is None or torch.equal(a, b)
    (report,) = npu_fuse_pass.reports()
    assert report.groups and not report.fallback, report
    assert CODES & {reason.code for reason in report.unfused}, report


def test_a_view_of_all_elements_costs_no_call() -> None:
    def step(p: Any, q: Any) -> None:
        v = p.view(-1)
        v.add_(1)
        p.mul_(q)
        v.sub_(q.view(-1))

    captured = capture(traced(step, *tensors()), dimensions=True)
    assert captured.updates and not captured.unfused and not captured.segments


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("others", [False, True])
def test_copies_that_cost_more_than_kernels_save_are_not_made(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a flat buffer that are written in turn would each be a copy of all of it."""
    monkeypatch.undo()

    def step(flat: Any, p: Any) -> None:
        for part in flat.split(2):
            part.mul_(0.5)
        if others:
            p.mul_(0.5).add_(p.sqrt()).add_(p.exp())

    got, want = [torch.ones(8), torch.ones(400)], [torch.ones(8), torch.ones(400)]
    torch.compile(step, backend="npu_fused")(*got)
    step(*want)
    torch.testing.assert_close(got, want)
    (report,) = npu_fuse_pass.reports()
    assert bool(report.groups) == others
    assert others or "copies cost more than kernels save" in report.fallback


def test_what_is_not_read_again_is_not_written_back() -> None:
    def step(p: Any, q: Any) -> None:
        (p * q)[0].add_(1)
        p.add_(q)

    captured = capture(traced(step, *tensors()))
    assert [len(segment.calls) for segment in captured.segments] == [1]


def gaps(p: Any, q: Any) -> None:
    p[:, ::2][0].add_(1)


def in_its_storage(p: Any, q: Any) -> None:
    p.as_strided((2,), (1,)).add_(1)


def beyond_a_view(p: Any, q: Any) -> None:
    row = p[1]
    row.mul_(2)
    q.add_(row.as_strided((4,), (4,), 0))


def several_elements_at_one_place(p: Any, q: Any) -> None:
    p.unfold(0, 2, 1)[0].add_(1)


def one_call_writes_both(p: Any, q: Any) -> None:
    torch._foreach_sinc_([p[:2], p[1:]]) if hasattr(torch, "_foreach_sinc_") else torch._foreach_lgamma_([p[:2], p[1:]])


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    "step", [gaps, in_its_storage, beyond_a_view, several_elements_at_one_place, one_call_writes_both]
)
def test_what_is_not_clear_is_left_to_the_original(step: Step) -> None:
    got, want = tensors(), tensors()
    step(*want)
    torch.compile(step, backend="npu_fused")(*got)
    assert all(map(torch.equal, got, want)) and npu_fuse_pass.reports()[-1].fallback


def transposed(p: Any, q: Any) -> None:
    q.add_(p.t())
    p.mul_(2)


def rows_and_an_element(p: Any, q: Any) -> None:
    for row in p.unbind():
        q.add_(row)
    q.mul_(p[0, 0])
    p.mul_(2)


def gaps_that_are_drawn_later(p: Any, q: Any) -> None:
    v = p.view(8, 2)[:, ::2]
    q.view(8, 2).add_(v)
    p.mul_(2)
    v.normal_()


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("step", [transposed, rows_and_an_element, gaps_that_are_drawn_later])
def test_views_of_what_kernels_write_are_read_before(step: Step) -> None:
    got, want = tensors(), tensors()
    compiled = torch.compile(step, backend="npu_fused")
    for seed in range(2):
        for function, arguments in ((step, want), (compiled, got)):
            torch.manual_seed(seed)
            function(*arguments)
        assert all(map(torch.equal, got, want))
    (report,) = npu_fuse_pass.reports()
    assert report.groups and not report.fallback


@pytest.mark.usefixtures("afresh")
def test_random_numbers_of_a_tensor_with_gaps() -> None:
    def step(p: Any, q: Any) -> None:
        p.mul_(2)
        p.normal_()
        q.add_(p)

    found = []
    for function in (step, torch.compile(step, backend="npu_fused")):
        torch.manual_seed(0)
        arguments = [torch.ones(8, 4)[::2], torch.ones(4, 4)]
        function(*arguments)
        found.append(arguments)
    assert all(map(torch.equal, *found)) and npu_fuse_pass.reports()[-1].fallback


@pytest.mark.usefixtures("afresh")
def test_complex_numbers_as_out() -> None:
    def step(p: Any, q: Any, c: Any) -> None:
        p.mul_(2)
        torch.add(p, q, out=c)

    got, want = ([*tensors(), torch.zeros(4, 4, dtype=torch.complex64)] for _ in range(2))
    step(*want)
    torch.compile(step, backend="npu_fused")(*got)
    (report,) = npu_fuse_pass.reports()
    assert all(map(torch.equal, got, want)) and report.groups and not report.fallback


def a_part_and_the_whole(p: Any, q: Any, count: Any) -> Any:
    m = torch.argsort(q)
    v = m[1:]
    v.add_(1)
    p.add_(q)
    return m, v


def a_part_of_an_argument(p: Any, q: Any, count: Any) -> Any:
    v = count[1:]
    count.add_(1)
    p.add_(q)
    return v


def bits_and_numbers(p: Any, q: Any, count: Any) -> Any:
    t = p * 2
    p.add_(q)
    return t.view(torch.int32), t


def in_another_shape_of_an_argument(p: Any, q: Any, count: Any) -> Any:
    q.add_(p)
    return torch.view_as_complex(p.view(-1, 2)), q


def not_written(p: Any, q: Any, count: Any) -> Any:
    m = torch.argsort(q)
    p.add_(q)
    return m, m[1:], count[1:]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    "step",
    [*(a_part_and_the_whole, a_part_of_an_argument, bits_and_numbers, in_another_shape_of_an_argument), not_written],
)
def test_returned_views_share_memory_as_they_do_without_fusion(step: Callable[..., Any]) -> None:
    shared = []
    for function in (step, torch.compile(step, backend="npu_fused")):
        arguments = (*tensors(), torch.arange(4))
        memory = [t.untyped_storage().data_ptr() for t in (*arguments, *function(*arguments))]
        shared.append([memory.index(m) for m in memory])
    assert shared[0] == shared[1]
    (report,) = npu_fuse_pass.reports()
    assert bool(report.groups) == (step in (in_another_shape_of_an_argument, not_written))


# Random programs -----------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Any], Any]] = {
    "first": lambda x: x[0],
    "rest": lambda x: x[1:],
    "every other": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "flat": lambda x: x.view(-1),
    "half": lambda x: x.view(2, -1),
    "reshaped": lambda x: x.reshape(-1),
    "one more": lambda x: x.unsqueeze(0),
    "diagonal": lambda x: x.diagonal(),
    "last": lambda x: x.unbind()[-1],
    "part": lambda x: x.split(2)[0],
    "repeated": lambda x: x.expand(2, -1, -1),
    "itself": lambda x: x.detach(),
    "bits": lambda x: x.view(torch.int32),
}
WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x.add_(y),
    "halve": lambda x, y: x.mul_(0.5),
    "copy": lambda x, y: x.copy_(y),
    "fill": lambda x, y: x.fill_(0.25),
    "assign": lambda x, y: x.copy_(y * 0.25 + x),
    "sums": lambda x, y: x.cumsum_(0),
    "random": lambda x, y: x.uniform_(),
    "cleared": lambda x, y: x.bitwise_and_(-65536),
    "list": lambda x, y: torch._foreach_add_([x, y], 1.0),
}
NEW: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda x, y: x + y,
    "half": lambda x, y: x * 0.5,
    "sinc": lambda x, y: torch.sinc(x),
    "clone": lambda x, y: x.clone(),
}
_DRAWN = st.lists(
    st.tuples(st.sampled_from([*VIEWS, *WRITES, *WRITES, *NEW]), st.integers(0, 30), st.integers(0, 30)),
    min_size=3,
    max_size=14,
)


def apply(op: str, pool: list[Any], i: int, k: int) -> None:
    x, y = pool[i], pool[k]
    if op in VIEWS:
        pool.append(VIEWS[op](x))
    elif op in WRITES:
        WRITES[op](x, y)
    else:
        pool.append(NEW[op](x, y))


def elements_of(t: Any) -> list[int]:
    """Where the elements of a tensor lie in its storage."""
    size = t.untyped_storage().nbytes() // t.element_size()
    return torch.arange(size).as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist()


def is_undefined(op: str, x: Any, y: Any) -> bool:
    """Torch reads elements that it has written, or not, in an order of its own where arguments overlap."""
    if op not in WRITES or x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    read, written = elements_of(y), elements_of(x)
    return read != written and not set(read).isdisjoint(written)


def possible(drawn: Any) -> tuple[list[tuple[str, int, int]], list[Tensor]]:
    """Those of the drawn operations that eager torch does, and what they leave."""
    pool: list[Any] = tensors()
    steps = []
    for op, i, k in drawn:
        i, k = i % len(pool), k % len(pool)
        if is_undefined(op, pool[i], pool[k]):
            continue
        held = [(t, t.clone()) for t in pool if 0 not in t.stride()]
        try:
            apply(op, pool, i, k)
        except (RuntimeError, IndexError, NotImplementedError):
            for t, before in held:
                t.copy_(before)
            continue
        if not pool[-1].dim() or not pool[-1].numel():  # 0-dim tensors are computed in float64
            pool.pop()
        else:
            steps.append((op, i, k))
    return steps, pool[:2]


def interpreted(captured: Captured, arguments: list[Tensor]) -> None:
    grouped = group(captured)
    verify.captured(captured)
    verify.grouped(grouped)
    values = [arguments[leaf.index] if leaf.kind == "input" else None for leaf in grouped.leaves]
    segments = [(eager.Program(grouped.leaves, s.groups), s.calls) for s in grouped.segments]
    segmented.Program(segments, eager.Program(grouped.leaves, grouped.groups), grouped.stores)(values, complete=True)


@pytest.mark.parametrize("dimensions", [False, True])
def test_random_programs_of_views_and_writes(dimensions: bool) -> None:
    said: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(_DRAWN)
    def check(drawn: Any) -> None:
        torch.manual_seed(0)
        steps, want = possible(drawn)
        state = torch.get_rng_state()

        def program(*given: Any) -> None:
            pool = list(given)
            for step in steps:
                apply(step[0], pool, *step[1:])

        captured = capture(traced(program, *tensors()), dimensions=dimensions)
        codes = {reason.code for reason in captured.unfused}
        if not captured.updates and not captured.stores:
            said["the original"] += bool(captured.unfused)
            said[str(captured.unfused and captured.unfused[0])] += bool(captured.unfused)
            return
        said["views"] += bool(codes & CODES)
        got = tensors()
        torch.manual_seed(0)
        try:
            interpreted(captured, got)
        except Mismatch:
            said["mismatch"] += 1
            return
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)), steps
        assert torch.equal(state, torch.get_rng_state()), steps

    check()
    print(said)
    assert said["views"] > EXAMPLES / 10 and said["the original"] < said["views"] / 4, said
