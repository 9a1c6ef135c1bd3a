"""The same bits whatever the number of threads, the layout, the order of members and the neighbours."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from npu_fuse_pass.lowerings.cpu import build
from optimizers.paddle import RMSProp
from optimizers.paddle import clip as paddle_clip
from tests.behaviour.test_numerics import STOCK, tensors_of
from tests.support.cases import BY_NAME
from tests.support.training import assert_fused, compiled, last_report, set_gradients

# around the size of a chunk (16384), of a thread's share, of a vector; odd sizes have tails
SHAPES = [(131, 67), (16384,), (16385,), (5,), (), (40_000,), (8, 6, 5, 7), (300, 301), (5,)]
STEPS = 2


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Paddle's RMSProp with a clip that is a norm: of each gradient, or of all together."""

    name: str
    clip: type
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, params: Any) -> Any:
        return RMSProp(0.02, momentum=0.9, parameters=params, weight_decay=0.1, grad_clip=self.clip(1.0))


# one for each kind of kernel: pointwise, sums over a tensor, sums over all tensors; one of torch's own
POINTWISE = [BY_NAME["adam"], BY_NAME["rmsprop_tf_centered"], STOCK[0]]
SUMMING = [BY_NAME["lamb"], Clipped("clip_by_norm", paddle_clip.ClipGradByNorm)]
TOTALLING = [BY_NAME["lamb_global"], Clipped("clip_by_global_norm", paddle_clip.ClipGradByGlobalNorm)]
# a sum in another order differs in its last place: that shows in float64, where nothing rounds it away
EVERY = [(c, torch.float32) for c in POINTWISE] + [(c, torch.float64) for c in (*SUMMING, *TOTALLING)]
every = pytest.mark.parametrize(("case", "dtype"), EVERY, ids=lambda x: getattr(x, "name", str(x)))

Make = Callable[[Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("shipped_kernels")


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def values(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Numbers that depend on a tensor's own place in the list only."""
    made = []
    for i, shape in enumerate(shapes):
        g = torch.Generator().manual_seed(1000 * seed + i)
        made.append(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
    return made


def same(t: Tensor) -> Tensor:
    return t


def results(
    case: Any,
    dtype: torch.dtype,
    make: Make = same,
    make_grad: Make = same,
    order: Sequence[int] | None = None,
    more: Callable[[], tuple[list[Tensor], list[Tensor | None]]] | None = None,
    only: Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """Parameters and states after some compiled steps, in the order of SHAPES.

    Args:
        make: gives a parameter its storage.
        make_grad: gives a gradient its storage.
        order: in which order the optimizer gets the parameters.
        more: further parameters, and their gradients.
        only: which parameters take part at all.
    """
    start = [make(v) for v in values(SHAPES, dtype, 0)]
    params = [torch.nn.Parameter(v) for v in start]
    extra, extra_grads = more() if more is not None else ([], [])
    chosen = list(only) if only is not None else list(range(len(params)))
    given = [params[i] for i in (order or chosen)]
    half = len(extra) // 2
    opt = case.build([*extra[:half], *given, *extra[half:]])
    step = compiled(opt, fullgraph=False)
    for t in range(1, STEPS + 1):
        grads = values(SHAPES, dtype, t)
        for i in chosen:
            params[i].grad = make_grad(grads[i])
        set_gradients(extra, extra_grads)
        step()
    assert last_report().fallback is None and not last_report().unfused
    return [{k: v.clone() for k, v in tensors_of(opt, params[i]).items()} for i in chosen]


def assert_same_bits(got: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            # equal() compares values; the sign of zero is looked at too
            same_bits = torch.equal(a[name], b[name]) and torch.equal(a[name].signbit(), b[name].signbit())
            differing = int((a[name] != b[name]).sum())
            assert same_bits, f"{name} of parameter {i} {tuple(b[name].shape)}: {differing} elements differ"


@functools.cache
def usual(name: str) -> list[dict[str, Tensor]]:
    """The results of a case in the usual order, alone, contiguous, on one thread."""
    torch.set_num_threads(1)
    case, dtype = next((c, d) for c, d in EVERY if c.name == name)
    return results(case, dtype)


@every
def test_threads(case, dtype):
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(results(case, dtype), usual(case.name))
    assert_fused(last_report(), parameters=len(SHAPES))


@every
def test_flags(case, dtype, kernels, monkeypatch):
    """Compiled without most optimisations, as in other tests (tests/conftest.py)."""
    expected = usual(case.name)
    load = mock.Mock(wraps=kernels.quick)
    monkeypatch.setattr(build, "load", load)
    assert_same_bits(results(case, dtype), expected)
    assert load.called


@every
def test_order_of_members(case, dtype):
    """Parameters in any order, so that chunks fall to other threads and sums over all parameters run otherwise."""
    chance = random.Random(0)
    for _ in range(2):
        order = chance.sample(range(len(SHAPES)), len(SHAPES))
        assert_same_bits(results(case, dtype, order=order), usual(case.name))


def neighbours(gradient: Callable[[Tensor], Tensor | None], dtype: torch.dtype) -> Any:
    def more() -> tuple[list[Tensor], list[Tensor | None]]:
        shapes = [(k % 7 + 1, 2 * k + 1) for k in range(50)]
        params: list[Tensor] = [torch.nn.Parameter(v) for v in values(shapes, dtype, 99)]
        return params, [gradient(p) for p in params]

    return more


@every
def test_neighbours(case, dtype):
    """With fifty others: with gradients (zero ones where sums run over all parameters), and without."""
    with_gradients = torch.zeros_like if case in TOTALLING else torch.ones_like
    assert_same_bits(results(case, dtype, more=neighbours(with_gradients, dtype)), usual(case.name))
    assert_same_bits(results(case, dtype, more=neighbours(lambda p: None, dtype)), usual(case.name))


@pytest.mark.parametrize(("case", "dtype"), EVERY[:-2], ids=lambda x: getattr(x, "name", str(x)))
def test_alone(case, dtype):
    """As the only parameter of its optimizer."""
    for i in (0, 2, 6):
        assert_same_bits(results(case, dtype, only=[i]), [usual(case.name)[i]])


def other_order(t: Tensor) -> Tensor:
    """Dense with the dimensions in another order in memory: channels_last, transposed."""
    if t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.t().contiguous().t() if t.ndim == 2 else t


def strided(t: Tensor) -> Tensor:
    """Every second element of something larger."""
    return torch.stack([t, t], -1)[..., 0]


@every
@pytest.mark.parametrize("layout", [other_order, strided])
def test_layout(case, dtype, layout):
    """Other strides of parameters, of gradients, of both: sums too run in an order that does not depend on them."""
    for kinds in ({"make": layout}, {"make_grad": layout}, {"make": layout, "make_grad": layout}):
        assert_same_bits(results(case, dtype, **kinds), usual(case.name))


@every
def test_views_of_one_buffer(case, dtype):
    """Parameters, and gradients, as adjacent views at odd addresses."""
    total = sum(v.numel() for v in values(SHAPES, dtype, 0))
    buffers = {"p": torch.zeros(total + 8, dtype=dtype), "g": torch.zeros(STEPS * total + 8, dtype=dtype)}
    places = {"p": 1, "g": 3}

    def placed(key: str) -> Make:
        def make(t: Tensor) -> Tensor:
            view = buffers[key][places[key] : places[key] + t.numel()].view(t.shape)
            places[key] += t.numel()
            return view.copy_(t)

        return make

    assert_same_bits(results(case, dtype, make=placed("p"), make_grad=placed("g")), usual(case.name))
