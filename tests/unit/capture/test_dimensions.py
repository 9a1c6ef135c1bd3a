"""Reductions over some of the dimensions, broadcasting, and tensors in another shape: kernels and interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npu_fuse_pass import lower
from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.ir import verify
from npu_fuse_pass.ir.dimensions import layout_of
from npu_fuse_pass.ir.types import Captured
from npu_fuse_pass.lowerings import eager, segmented
from npu_fuse_pass.options import Options, Target
from npu_fuse_pass.passes.group import group
from tests.support.graphs import traced
from tests.support.rules_noise import settled
from tests.support.training import FULL

Step = Callable[..., None]


def program(captured: Captured, how: str) -> Any:
    """A captured step of several segments as a program."""
    grouped = group(captured)
    verify.captured(captured)
    verify.grouped(grouped)
    if how == "kernel":
        return lower.lower(grouped, Target("cpu"), Options()).program, len(grouped.leaves)
    segments = [(eager.Program(grouped.leaves, segment.groups), segment.calls) for segment in grouped.segments]
    last = eager.Program(grouped.leaves, grouped.groups)
    return (segmented.Program(segments, last, grouped.stores) if segments else last), len(grouped.leaves)


def run(step: Step, tensors: Sequence[Tensor], how: str) -> list[str]:
    """Run a step on tensors, which are changed; what could not be fused of it."""
    captured = capture(traced(step, *tensors), dimensions=True)
    if captured.unfused:
        return [u.text for u in captured.unfused]
    made, count = program(captured, how)
    values: list[Tensor | None] = [None] * count
    for i, leaf in enumerate(captured.leaves):
        if leaf.kind == "input":
            values[i] = tensors[leaf.index]
    made(values, complete=True)
    return []


def check(
    step: Step, *tensors: Tensor, tolerance: float = 1e-6, how: Sequence[str] = ("kernel", "interpreter")
) -> None:
    """All of a step is fused, and as near to float64's as `tolerance`, relative to the largest element of a tensor."""
    wanted = [t.to(torch.float64, copy=True) for t in tensors]
    step(*wanted)
    for each in how:
        got = [t.clone() for t in tensors]
        assert run(step, got, each) == []
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            near = tolerance * float(b.abs().nan_to_num(0, 0, 0).max()) if b.numel() else 0.0
            torch.testing.assert_close(
                a.double(), b, rtol=0, atol=near, equal_nan=True, msg=lambda m, place=f"{each} {i}": f"{place}: {m}"
            )


def centralised(p: Any, g: Any) -> None:
    g.sub_(g.mean(dim=(1, 2), keepdim=True))
    p.sub_(g, alpha=0.1)


def rows_and_columns(p: Any, g: Any) -> None:
    p.sub_(
        g / (g.square().sum(-1, keepdim=True).sqrt() + 1) * g.amax(0) + g.sum((0, 2), keepdim=True) - g.amin(1, True)
    )


def norms(p: Any, g: Any) -> None:
    p.sub_(
        g / g.norm(dim=-1, keepdim=True) / torch.linalg.vector_norm(g, 1, (0,)) * torch.linalg.norm(g, dim=1)[:, None]
    )


def factored(p: Any, g: Any, row: Any, column: Any) -> None:
    square = g**2 + 1e-30
    row.mul_(0.9).add_(square.mean(dim=-1), alpha=0.1)
    column.mul_(0.9).add_(square.mean(dim=-2), alpha=0.1)
    update = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.unsqueeze(-2).rsqrt() * g
    p.sub_(update / (update.norm(2) / math.sqrt(2 * 3 * 4)).clamp_(min=1.0), alpha=0.01)


def in_another_shape(p: Any, g: Any) -> None:
    flat = p.view(2, -1)
    p.sub_((g / g.reshape(2, -1).norm(dim=1).view(2, 1, 1)) + (flat - flat.mean(1, keepdim=True)).view(2, 3, 4))


def masks_and_copies(p: Any, g: Any, row: Any) -> None:
    p.copy_(torch.where(row > 0, g.mean(2, keepdim=True), g))
    row.copy_(g.amax((1, 2), keepdim=True))


def clipped_first(p: Any, g: Any) -> None:
    clipped = g * (1 / (g.norm() + p.norm() + 1))
    p.sub_(clipped - clipped.mean((1, 2), keepdim=True))


def read_and_written(p: Any, g: Any, row: Any) -> None:
    p.sub_(g * row)
    row.mul_(0.5).add_(g.abs().mean((1, 2), keepdim=True))


def pairs(p: Any, g: Any) -> None:
    low, high = torch.aminmax(g)
    deviation, mean = torch.std_mean(g, dim=(1, 2), correction=0, keepdim=True)
    p.sub_((g - mean) / deviation / (high - low) + torch.std(g) + torch.var(g, 1, keepdim=True))
    p.add_(torch.var_mean(g, correction=0)[0])


def directions(p: Any, g: Any) -> None:
    aligned = torch.nn.functional.normalize(g, dim=0) * torch.nn.functional.normalize(p, p=1.0, dim=2, eps=0.5)
    likeness = torch.nn.functional.cosine_similarity(g, p, dim=-1).unsqueeze(-1)
    p.sub_((aligned + likeness) * 0.1 + torch.cosine_similarity(g.flatten(), p.flatten(), 0, eps=1e-6))


STEPS: list[tuple[Step, tuple[tuple[int, ...], ...]]] = [
    (centralised, ()),
    (rows_and_columns, ()),
    (factored, ((2, 3), (2, 4))),
    (in_another_shape, ()),
    (masks_and_copies, ((2, 1, 1),)),
    (clipped_first, ()),
    (pairs, ()),
    (directions, ()),
    (read_and_written, ((2, 1, 1),)),
]


def _tensors(shape: tuple[int, ...], more: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.rand(s, generator=g, dtype=torch.float64).add_(0.1).to(dtype) for s in (shape, shape, *more)]


@pytest.mark.parametrize(("step", "more"), STEPS, ids=lambda x: getattr(x, "__name__", ""))
def test_small_tensors_are_fused(step: Step, more: Sequence[tuple[int, ...]]) -> None:
    check(step, *_tensors((2, 3, 4), more, torch.float32))
    check(step, *_tensors((2, 3, 4), more, torch.float64), tolerance=1e-14, how=["interpreter"])


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (3, 0, 4), (1, 1, 1), (1, 5, 1), (7, 1, 300), (2, 40, 1500), (5, 900, 3)], ids=str
)
def test_shapes(shape: tuple[int, ...]) -> None:
    """Empty tensors, dimensions of one element, and more than a thread takes at once."""
    names = ["kernel", "interpreter"]

    def step(p: Any, g: Any) -> None:
        p.sub_(g.sum(-1, keepdim=True) / 10 + g.sum(1, keepdim=True) / 10 + g.mean((0, 2), keepdim=True))

    check(step, *_tensors(shape, (), torch.float32), tolerance=4e-7, how=names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_where_torch_does(dtype: torch.dtype) -> None:
    tensors = _tensors((2, 3, 4), (), dtype)
    wanted, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
    centralised(*wanted)
    assert run(centralised, got, "kernel") == []
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_other_layouts_count_as_their_indices_say(layout: str) -> None:
    def step(p: Any, g: Any) -> None:
        p.sub_(g - g.mean((1, 2, 3), keepdim=True) + g.amax(0, keepdim=True))

    p, g = _tensors((2, 3, 4, 5), (), torch.float32)
    if layout == "channels_last":
        p, g = (t.to(memory_format=torch.channels_last) for t in (p, g))
    elif layout == "transposed":
        p = p.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    else:
        g = g[:, :1].expand(2, 3, 4, 5)
    wanted = p.double()
    step(wanted, g.double())
    got = p.clone(memory_format=torch.preserve_format)
    assert got.stride() == p.stride() and run(step, [got, g], "kernel") == []
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_step_that_copies_says_so() -> None:
    p, g = (t.to(memory_format=torch.channels_last) for t in _tensors((2, 3, 4, 5), (), torch.float32))
    captured = capture(traced(lambda p, g: p.sub_(g - g.mean(0, keepdim=True)), p, g), dimensions=True)
    lowered = lower.lower(group(captured), Target("cpu"), Options())
    values: list[Tensor | None] = [*(None for _ in group(captured).leaves)]
    values[:2] = [p, g]
    assert lowered.program is not None
    lowered.program(values, complete=True)
    assert all("copied" in row.note for row in lowered.rows)


def test_nan_and_infinities_are_those_of_torch() -> None:
    def step(p: Any, g: Any) -> None:
        p.copy_(g.amax(1, keepdim=True) + g.amin(0) * g.sum(1, keepdim=True))

    for place, value in ((3, math.nan), (0, math.inf), (11, -math.inf)):
        p, g = torch.zeros(3, 4), torch.rand(3, 4)
        g.view(-1)[place] = value
        check(step, p, g)


def test_bits_do_not_depend_on_threads() -> None:
    tensors = _tensors((64, 9, 200), (), torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = [t.clone() for t in tensors]
            assert run(rows_and_columns, got, "kernel") == []
            found.append(got)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_two_shapes_share_a_kernel() -> None:
    def step(p: Any, g: Any, q: Any, h: Any) -> None:
        for a, b in ((p, g), (q, h)):
            a.sub_(b - b.mean(tuple(range(1, b.dim())) if not isinstance(b, torch.fx.Proxy) else -1, keepdim=True))

    p, g = _tensors((2, 3), (), torch.float32)
    q, h = _tensors((5, 7), (), torch.float32)
    captured = capture(traced(step, p, g, q, h), dimensions=True)
    assert [len(x.members) for x in group(captured).all_groups] == [2, 2]
    check(step, p, g, q, h, how=["kernel"])


REFUSED: dict[str, Step] = {
    "alternating": lambda x: x.mul_(x.sum((0, 2, 4), keepdim=True)),
    "with indices": lambda x: x.mul_(x.max(1, keepdim=True)[0]),
    "a count": lambda x: x.mul_((x > 0).sum(1, keepdim=True)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_says_why(name: str) -> None:
    captured = capture(traced(REFUSED[name], torch.rand(2, 3, 2, 3, 2, 3)), dimensions=True)
    assert captured.updates and captured.unfused and captured.unfused[0].text


def test_layouts() -> None:
    assert layout_of((8, 3, 5), [0]) == (1, 8, 15, 1)
    assert layout_of((8, 3, 5), [1, 2]) == (1, 1, 8, 15)
    assert layout_of((8, 3, 5), [1]) == (8, 3, 5, 1)
    assert layout_of((8, 3, 5), [0, 2]) == (1, 8, 3, 5)
    assert layout_of((8, 1, 3, 5), [1]) == (1, 1, 120, 1)
    assert layout_of((8, 3, 5, 2, 4), [1, 3]) == (8, 3, 5, 2) or layout_of((8, 3, 5, 2), [1, 3]) == (8, 3, 5, 2)
    assert layout_of((8, 3, 5, 2, 4), [1, 3]) is None


# Random steps --------------------------------------------------------------------------------------------------------

_SHAPES: list[tuple[int, ...]] = [(3, 4), (2, 3, 4), (2, 1, 3), (2, 3, 1, 2), (1, 6), (6, 1), (5,), (2, 2, 2)]
_REDUCE = ("sum", "mean", "amax", "amin", "norm")
_PAIRS = (torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.lerp)
_ALONE = (torch.tanh, torch.neg, torch.abs, torch.square)


def random_step(shape: tuple[int, ...], choices: Sequence[tuple[int, int, int, int]]) -> tuple[Step, list[Tensor]]:
    """A step on a parameter, its gradient and two small states; the choices say of what it is made."""
    masks = [choices[k][3] for k in (0, -1)]
    small = [tuple(1 if mask >> d & 1 else size for d, size in enumerate(shape)) for mask in masks]

    def step(*tensors: Any) -> None:
        pool: list[Any] = [*tensors]
        shapes: list[tuple[int, ...]] = [shape, shape, *small]  # of proxies, too, which have none
        for kind, i, j, k in choices:
            x, own = pool[i % len(pool)], shapes[i % len(pool)]
            y, other = pool[j % len(pool)], shapes[j % len(pool)]
            if kind == 0 and own:
                dims = [d for d in range(len(own)) if k >> d & 1] or [k % len(own)]
                keep = bool(k >> 4 & 1)
                name = _REDUCE[j % len(_REDUCE)]
                call = torch.linalg.vector_norm if name == "norm" else getattr(torch, name)
                made = call(x, dim=dims, keepdim=keep)
                new = tuple(1 if d in dims else size for d, size in enumerate(own) if keep or d not in dims)
            elif kind == 1 and own and other:
                try:
                    new = tuple(torch.broadcast_shapes(own, other))
                except RuntimeError:
                    continue
                if math.prod(new) > 24:
                    continue
                pair = _PAIRS[k % len(_PAIRS)]
                made = torch.tanh(pair(x, y, weight=0.3) if pair is torch.lerp else pair(x, y))
            elif kind == 2:
                made, new = _ALONE[k % len(_ALONE)](x), own
            elif kind == 3 and own:
                place = k % (len(own) + 1)
                new = (math.prod(own),) if k % 2 else (*own[:place], 1, *own[place:])
                made = x.reshape(new)
            elif kind == 4 and math.prod(other) and len(other) <= len(shapes[k % 4]):
                place, target = k % 4, shapes[k % 4]
                if any(a not in (1, b) for a, b in zip(other[::-1], target[::-1], strict=False)):
                    continue
                pool[place].mul_(0.5).add_(y.clone())
                continue
            else:
                continue
            pool.append(made)
            shapes.append(new)
        fits = [x for x, own in zip(pool[2:], shapes[2:], strict=True) if _within(own, shape)]
        tensors[0].sub_(fits[-1] + tensors[1])

    g = torch.Generator().manual_seed(len(choices))
    return step, [torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, shape, *small)]


def _within(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    pairs = zip(own[::-1], shape[::-1], strict=False)
    return len(own) <= len(shape) and all(a in (1, b) for a, b in pairs)


_CHOICES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(0, 30), st.integers(0, 31)), min_size=2, max_size=14
)


@pytest.mark.parametrize(
    ("how", "examples"),
    [
        ("interpreter", 60),
        pytest.param("interpreter", 4000 if FULL else 400, marks=pytest.mark.slow, id="interpreter-many"),
        pytest.param("kernel", 150 if FULL else 15, marks=pytest.mark.slow),
    ],
)
def test_random_steps(how: str, examples: int) -> None:
    reasons: list[list[str]] = []

    @settled(examples)
    @given(st.sampled_from(_SHAPES), _CHOICES)
    def check_one(shape: tuple[int, ...], choices: list[tuple[int, int, int, int]]) -> None:
        step, tensors = random_step(shape, choices)
        wanted, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
        step(*wanted)
        reasons.append(run(step, got, how))
        if reasons[-1]:
            return
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")

    check_one()
    left = [why for found in reasons for why in found]
    print(len(reasons), "steps,", sum(map(bool, reasons)), "not fused:", sorted(set(left)))
    assert sum(map(bool, reasons)) <= 0.3 * len(reasons), left
