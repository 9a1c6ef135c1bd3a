"""Constants, random draws, integer tensors and numbers in a captured step: eager's values, dtypes and generator, fused
around what stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.match import find
from tests.support.training import FULL, tier

Body = Callable[..., Any]


def compare(body: Body, *given: Any, steps: int = 3, tolerance: float = 1e-6, fused: bool = True) -> None:
    """`body(p, g, *given)` eagerly and compiled, several times with the same tensors: what it writes and returns, and
    where it leaves the generator.
    """
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        p, g = torch.linspace(-1, 2, 24).reshape(4, 6), torch.linspace(1, -2, 24).reshape(4, 6)
        held = [x.clone() if isinstance(x, Tensor) else x for x in given]
        function = torch.compile(body, backend="npu_fused") if compiled else body
        returned = []
        with torch.no_grad():
            for k in range(steps):
                made = function(p, g * (k + 1), *[x(k) if callable(x) else x for x in held])
                returned += [
                    x.clone() if isinstance(x, Tensor) else x
                    for x in (made if isinstance(made, (list, tuple)) else [made])
                ]
        runs.append(([p, *held, *returned], torch.get_rng_state()))
    (want, state), (got, state_after) = runs
    for a, b in zip(want, got, strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert a.stride() == b.stride()
        else:
            assert (type(a) is type(b) and a == b) or callable(a)
    assert torch.equal(state, state_after)
    reports = npu_fuse_pass.reports()
    assert reports
    if fused:
        assert all(r.groups and not r.fallback for r in reports), [str(r) for r in reports]


# Order ---------------------------------------------------------------------------------------------------------------


def test_a_value_read_late_and_then_early() -> None:
    """An operation that reads a result, too, runs later than one behind it that reads the same value alone."""

    def body(p: Tensor, g: Tensor) -> Any:
        size = g.abs()
        late = torch.stack([g.sort()[0], size])
        early = size.flip(0)
        p.sub_(g * 0.1)
        return late, early

    compare(body)


# Constants -----------------------------------------------------------------------------------------------------------

CONSTANTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda p: torch.tensor(0.5),
    "tensor list": lambda p: torch.tensor([0.5]),
    "tensor nested": lambda p: torch.tensor([[0.5]]),
    "tensor of equal": lambda p: torch.tensor([0.5] * 6),
    "tensor of several": lambda p: torch.tensor([0.5, 0.25, 0.125, 1.0, 2.0, -1.0]),
    "tensor rows": lambda p: torch.tensor([[0.5] * 6] * 4),
    "tensor int": lambda p: torch.tensor(2),
    "tensor int list": lambda p: torch.tensor([2]),
    "tensor bool": lambda p: torch.tensor(True),
    "tensor bool list": lambda p: torch.tensor([True]),
    "tensor mixed": lambda p: torch.tensor([1, 0.5, 1, 1, 1, 1]),
    "tensor float64": lambda p: torch.tensor([0.1], dtype=torch.float64),
    "tensor 0-dim float64": lambda p: torch.tensor(0.1, dtype=torch.float64),
    "tensor half": lambda p: torch.tensor([0.1], dtype=torch.float16),
    "tensor int32": lambda p: torch.tensor(2.7, dtype=torch.int32),
    "tensor int64 of float": lambda p: torch.tensor(2.7, dtype=torch.int64),
    "tensor uint8": lambda p: torch.tensor([2], dtype=torch.uint8),
    "as_tensor": lambda p: torch.as_tensor(0.5),
    "as_tensor list": lambda p: torch.as_tensor([[0.5]]),
    "as_tensor tensor": lambda p: torch.as_tensor(p),
    "as_tensor dtype": lambda p: torch.as_tensor(p, dtype=torch.float64),
    "scalar_tensor": lambda p: torch.scalar_tensor(3),
    "full": lambda p: torch.full((4, 6), 0.3),
    "full 0-dim": lambda p: torch.full((), 0.3),
    "full named": lambda p: torch.full(p.shape, fill_value=0.3),
    "full int": lambda p: torch.full((6,), 3),
    "full bool": lambda p: torch.full((6,), True),
    "full as float": lambda p: torch.full((6,), 3, dtype=torch.float32),
    "full_like": lambda p: torch.full_like(p, 0.3),
    "full_like named": lambda p: torch.full_like(p, fill_value=0.3),
    "full_like int64": lambda p: torch.full_like(p, 3, dtype=torch.int64),
    "full_like bool": lambda p: torch.full_like(p, True, dtype=torch.bool),
    "full_like half": lambda p: torch.full_like(p, 0.1, dtype=torch.float16),
    "full_like float64": lambda p: torch.full_like(p, 0.1, dtype=torch.float64),
    "zeros_like int32": lambda p: torch.zeros_like(p, dtype=torch.int32),
    "ones_like bool": lambda p: torch.ones_like(p, dtype=torch.bool),
    "zeros": lambda p: torch.zeros(6),
    "ones": lambda p: torch.ones(4, 1),
    "arange": lambda p: torch.arange(6),
    "new_full": lambda p: p.new_full((6,), 0.3),
    "new_tensor": lambda p: p.new_tensor([0.3]),
    "new_zeros": lambda p: p.new_zeros(6),
    "new_zeros int": lambda p: p.new_zeros(6, dtype=torch.int32),
    "new_ones several": lambda p: p.new_ones(4, 6),
    "empty filled": lambda p: torch.empty((4, 6)).fill_(0.3),
    "empty count": lambda p: torch.empty((), dtype=torch.int64).fill_(3),
    "ones float64": lambda p: torch.ones(6, dtype=torch.float64),
    "eye": lambda p: torch.eye(4, 6),
    "indexed": lambda p: torch.tensor([0.9, 0.999])[1],
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    """Read in an update, changed in place, and returned."""

    def body(p: Tensor, g: Tensor) -> Any:
        made = CONSTANTS[name](p)
        p.sub_(g * made, alpha=0.1)
        other = CONSTANTS[name](p)
        return made, other * 2, other / 2

    compare(body)


def test_constants_are_kept_and_change() -> None:
    def body(p: Tensor, g: Tensor, mean: Tensor, count: Tensor) -> Any:
        mean += 0.5
        count += 1
        fresh, number = torch.tensor([0.25]), torch.tensor([3])
        fresh += 1
        number += 1
        p.sub_(g * mean * fresh, alpha=0.1)
        return fresh, number, count / 2

    compare(body, torch.tensor([0.25]), torch.tensor([3]))


# Draws ---------------------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli_": lambda x: x.bernoulli_(),
    "bernoulli_ p": lambda x: x.bernoulli_(0.25),
    "bernoulli_ tensor": lambda x: x.bernoulli_(torch.full_like(x, 0.25)),
    "normal_": lambda x: x.normal_(1.0, 0.5),
    "uniform_": lambda x: x.uniform_(-1, 1),
    "exponential_": lambda x: x.exponential_(2.0),
    "cauchy_": lambda x: x.cauchy_(),
    "log_normal_": lambda x: x.log_normal_(),
    "geometric_": lambda x: x.geometric_(0.3),
    "random_": lambda x: x.random_(),
    "random_ to": lambda x: x.random_(0, 7),
    "fill_diagonal_": lambda x: x.fill_diagonal_(0.5),
    "dropout_": lambda x: torch.nn.functional.dropout(x, 0.5, True, inplace=True),
    "init": lambda x: torch.nn.init.trunc_normal_(x),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 5),
    "rand": lambda x: torch.rand(x.shape),
    "randperm": lambda x: torch.randperm(6),
    "bernoulli": lambda x: torch.bernoulli(x.clamp(0, 1)),
    "normal out": lambda x: torch.randn(x.shape, out=x),
    "cumsum_": lambda x: x.cumsum_(0),
    "tril_": lambda x: x.tril_(),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([1]), 3.0),
    "setitem": lambda x: (_set(x), x)[1],
    "renorm_": lambda x: x.renorm_(2, 0, 0.5),
    "erfinv_": lambda x: x.clamp_(-0.5, 0.5).erfinv_(),
}
SOURCES: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "empty": lambda p: torch.zeros_like(p).copy_(p),
    "computed": lambda p: p * 0.5,
    "clone": lambda p: p.clone(),
    "transposed": lambda p: torch.ones(6, 4).t() * 2,
}


def _set(x: Tensor) -> None:
    x[1] = 0.5


FILLED = ("bernoulli_", "normal_", "uniform_", "exponential_")


DRAWN = [(n, "computed") for n in DRAWS] + [(n, s) for n in FILLED for s in SOURCES if s != "computed"]


@pytest.mark.parametrize(("name", "source"), DRAWN)
def test_draws(name: str, source: str) -> None:
    def body(p: Tensor, g: Tensor) -> Any:
        before = SOURCES[source](p)
        held = before.clone()
        drawn = DRAWS[name](before)
        p.sub_(g * drawn, alpha=0.1)
        return held, before * 1

    compare(body)


@pytest.mark.parametrize("name", [n for n in DRAWS if n.endswith("_")])
def test_draws_into_what_is_given(name: str) -> None:
    """Parameters and buffers themselves, whatever their dtype; the value before is read, too."""

    def body(p: Tensor, g: Tensor, wide: Tensor, scalar: Tensor) -> Any:
        old = p * 2
        DRAWS[name](p)
        DRAWS[name](wide)
        if name not in ("fill_diagonal_", "cumsum_", "tril_", "renorm_", "index_fill_"):  # not of 0-dim tensors
            DRAWS[name](scalar)
        p.sub_(g + old * scalar, alpha=0.1)

    compare(body, torch.ones(3, 3, dtype=torch.float64), torch.tensor(0.5))


def test_draws_keep_their_order() -> None:
    """A draw that waits for another operation comes before one that waits for none, if it is written so."""

    def body(p: Tensor, g: Tensor) -> None:
        late = torch.bernoulli((p.cumsum(0).cumsum(1) * g).sigmoid())
        early = torch.rand_like(p)
        p.sub_(late * early * g, alpha=0.1)

    compare(body)


def test_draws_with_a_generator() -> None:
    generator = torch.Generator().manual_seed(3)

    def body(p: Tensor, g: Tensor) -> None:
        p.sub_(torch.empty_like(p).normal_() * g, alpha=0.1)

    compare(body)
    assert generator.initial_seed() == 3


def test_a_step_that_is_refused_draws_nothing() -> None:
    """Tensors that share memory: the original runs, from where the generator was."""

    def body(p: Tensor, g: Tensor, q: Tensor) -> None:
        p.sub_(g * torch.rand_like(p))
        q.mul_(2)

    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        memory = torch.ones(30)
        p, q = torch.as_strided(memory, (4, 6), (6, 1)), torch.as_strided(memory, (4, 6), (6, 1), 3)
        with torch.no_grad():
            (torch.compile(body, backend="npu_fused") if compiled else body)(p, torch.ones(4, 6), q)
        if not compiled:
            want, state = memory.clone(), torch.get_rng_state()
    assert torch.equal(memory, want)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_layout_of_the_call() -> None:
    """Where Dynamo's guards let a graph run on tensors that lie otherwise: right, and the report says why unfused."""

    def body(p: Tensor) -> None:
        p.mul_(torch.ones_like(p).bernoulli_(0.5))

    def backend(gm: torch.fx.GraphModule, given: Any) -> Any:
        compiled.append(npu_fused(gm, given))
        return compiled[0]

    compiled: list[Any] = []
    npu_fuse_pass.clear_reports()
    start = torch.linspace(1, 2, 120).reshape(2, 3, 4, 5)
    torch.compile(body, backend=backend)(start.clone(memory_format=torch.channels_last))
    assert npu_fuse_pass.reports()[-1].groups and not npu_fuse_pass.reports()[-1].fallback
    runs = []
    for step in (body, compiled[0]):
        torch.manual_seed(0)
        p = start.clone()
        step(p)
        runs.append((p, torch.get_rng_state()))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert "lies otherwise in memory" in str(npu_fuse_pass.reports()[-1].fallback)


def test_draws_follow_the_layout_of_parameters_that_dynamo_knows_by_their_id() -> None:
    """It does once a function has read the optimizer's groups, and no longer guards how they lie."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        npu_fuse_pass.clear_reports()
        ps = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4, 3).t())]
        opt = optimizers.NpuFusedSGD(ps, lr=0.1)

        def body(ps: list[Any] = ps, opt: Any = opt) -> None:
            with torch.no_grad():
                ps[1].add_(torch.empty_like(ps[1]).uniform_())
            opt.step()
            opt.param_groups[0]["lr"] *= 0.5

        step = torch.compile(body, backend="npu_fused") if compiled else body
        for k in range(3):
            if k == 2:
                assert not compiled or not npu_fuse_pass.reports()[-1].fallback
                ps[1].data = ps[1].detach().contiguous()
            for p in ps:
                p.grad = torch.ones(3, 4)
            step()
        runs.append([*(p.detach() for p in ps), torch.get_rng_state()])
    assert all(map(torch.equal, *runs))
    report = npu_fuse_pass.reports()[-1]
    assert report.groups and "lies otherwise in memory" in str(report.fallback)


MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "full_like": lambda p, g: torch.full_like(p, 0.5),
    "ones_like, detached": lambda p, g: torch.ones_like(p).detach(),
    "contiguous ones": lambda p, g: torch.ones_like(p, memory_format=torch.contiguous_format),
    "sum": lambda p, g: p + g,
    "the other sum": lambda p, g: g + p,
    "clone": lambda p, g: torch.clone(p * 2, memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("order", ["transposed", "channels_last", "contiguous"])
def test_new_tensors_lie_in_memory_as_eagerly(name: str, order: str) -> None:
    p = torch.linspace(1, 2, 24).reshape(2, 3, 2, 2)
    if order != "contiguous":
        p = (
            p.transpose(0, 1).contiguous().transpose(0, 1)
            if order == "transposed"
            else p.to(memory_format=torch.channels_last)
        )

    def body(q: Tensor, g: Tensor) -> Tensor:
        q.mul_(0.5)
        return MADE[name](q, g)

    q, g = p.clone(), torch.ones(p.shape)
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    got, want = torch.compile(body, backend="npu_fused")(p, g), body(q, g)
    torch.testing.assert_close(got, want, check_stride=True)
    torch.testing.assert_close(p, q, check_stride=True)
    assert npu_fuse_pass.reports()[-1].groups and not npu_fuse_pass.reports()[-1].fallback


# Integers and numbers ------------------------------------------------------------------------------------------------

INTEGERS: dict[str, Callable[[Tensor], Any]] = {
    "half": lambda c: c / 2,
    "clamp": lambda c: c.clamp(min=1),
    "clamp float": lambda c: c.clamp(max=1.5),
    "times float": lambda c: c * 1.5,
    "times int": lambda c: c * 3,
    "power": lambda c: c**2,
    "power of": lambda c: 0.9**c,
    "sqrt": lambda c: c.sqrt(),
    "floor": lambda c: c // 2,
    "remainder": lambda c: c % 2,
    "truncated": lambda c: torch.div(c, 2, rounding_mode="trunc"),
    "negative": lambda c: -c,
    "compared": lambda c: c > 2,
    "equal": lambda c: c == 4,
    "chosen": lambda c: torch.where(c > 3, c, -c),
    "chosen numbers": lambda c: torch.where(c > 3, 1, 2),
    "float": lambda c: c.float() / 3,
    "double": lambda c: c.double() / 3,
    "to int32": lambda c: c.to(torch.int32) * 2,
    "to bool": lambda c: c.to(torch.bool),
    "of float": lambda c: (c / 2).to(torch.int64),
    "bool of float": lambda c: (c / 2).bool() + 1,
    "bits": lambda c: c & 1,
    "shifted": lambda c: c << 2,
    "mean": lambda c: c.float().mean(),
    "sum": lambda c: c.sum(),
    "log": lambda c: torch.log1p(c),
    "maximum": lambda c: torch.maximum(c, torch.tensor(4)),
    "reciprocal": lambda c: 1 / c,
    "abs": lambda c: (-c).abs(),
    "sub": lambda c: 1 - c,
    "full_like": lambda c: torch.full_like(c, 2.7),
    "ones_like": torch.ones_like,
    "like": lambda c: torch.zeros_like(c, dtype=torch.float32),
    "one_hot": lambda c: torch.nn.functional.one_hot(c % 4, 4),
    "stack": lambda c: torch.stack([c, c + 1]),
}


NARROW = ("half", "clamp", "power", "compared", "chosen", "to bool", "sum", "full_like")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((n, torch.int64) for n in INTEGERS),
        *((n, torch.int32) for n in (INTEGERS if FULL else NARROW)),
        *((n, torch.uint8) for n in NARROW),
    ],
    ids=str,
)
def test_integers(name: str, dtype: torch.dtype) -> None:
    def body(p: Tensor, g: Tensor, count: Tensor) -> Any:
        count += 1
        made = INTEGERS[name](count)
        if not made.shape:
            p.sub_(g * made, alpha=0.1)
        else:
            p.sub_(g, alpha=0.1)
        return made

    compare(body, torch.tensor(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integer_tensors_that_are_written(dtype: torch.dtype) -> None:
    def body(p: Tensor, g: Tensor, counts: Tensor, one: Tensor) -> Any:
        p.sub_(g * counts, alpha=0.1)
        counts.logical_not_() if dtype == torch.bool else counts.add_(1)
        one.logical_not_() if dtype == torch.bool else one.mul_(3).add_(1)
        p.sub_(g * counts * one, alpha=0.1)

    compare(body, torch.ones(4, 6, dtype=dtype), torch.ones((), dtype=dtype))


def test_large_integers() -> None:
    """A hash: no float64 holds it."""

    def body(p: Tensor, g: Tensor, seed: Tensor) -> None:
        seed.mul_(6364136223846793005).add_(1442695040888963407)
        p.sub_(g * (seed % 7), alpha=0.1)

    compare(body, torch.tensor(12345))


NUMBERS: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "roll": lambda p, g, t: p.sub_(g.roll(t, 0)),
    "roll computed": lambda p, g, t: p.sub_(g.roll(2 * t + 1, 0)),
    "index": lambda p, g, t: p.sub_(g[t]),
    "slice": lambda p, g, t: p.sub_(g[: t + 1].sum(0)),
    "narrow": lambda p, g, t: p.sub_(g.narrow(0, t, 1)),
    "foreach": lambda p, g, t: torch._foreach_add_([p], [g.cumsum(0)], alpha=t),
    "fill": lambda p, g, t: p.sub_(torch.full_like(g, t)),
    "tensor": lambda p, g, t: p.sub_(torch.tensor([t]) * g),
    "0-dim": lambda p, g, t: p.sub_(torch.tensor(t) / 2 * g),
    "none": lambda p, g, t: p.sub_(g * (1 if t == None else 0.5 * t)),  # noqa: E711
    "not none": lambda p, g, t: p.sub_(g * (1 if t != None else 0.5)),  # noqa: E711
    "diagonal": lambda p, g, t: p.sub_(torch.diag(torch.ones(6 - t), t)[:4] * g),
    "multiplied": lambda p, g, t: p.mul_(1 - 0.1 * t).add_(g.flip(0), alpha=-0.1 * t),
}


@pytest.mark.parametrize("number", [int, float], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change(name: str, number: type) -> None:
    if number is float and name in ("roll", "roll computed", "index", "slice", "narrow", "diagonal"):
        pytest.skip("takes an int")

    def body(p: Tensor, g: Tensor, t: Any) -> Any:
        NUMBERS[name](p, g, t)
        return t + 1

    compare(body, lambda k: number(k) if number is int else k + 0.5, steps=4, fused=False)
    assert any(r.groups and not r.fallback for r in npu_fuse_pass.reports())


# of positive numbers in float64: what a number that is a function's argument may meet
WIDE: dict[str, tuple[Callable[[Tensor, float], Any], ...]] = {
    "operators": (
        lambda g, t: g * (1 - 0.05 * t),
        lambda g, t: t / g - t,
        lambda g, t: (g + 1) ** t,
        lambda g, t: t**g,
        lambda g, t: g // t,
        lambda g, t: g % t,
    ),
    "functions": (
        lambda g, t: torch.add(g, g, alpha=-t),
        lambda g, t: torch.sub(g, g, alpha=t),
        lambda g, t: torch.addcmul(g, g, g, value=t),
        lambda g, t: torch.addcdiv(g, g, g + 1, value=t),
        lambda g, t: torch.lerp(g, g * g, t),
        lambda g, t: torch.lerp(g, g * g, 1 - t),
        lambda g, t: g.clamp(t / 4, 2 * t),
        lambda g, t: torch.where(g > 1, t, g),
        lambda g, t: g.masked_fill(g > 1, t),
        lambda g, t: torch.maximum(g, torch.full_like(g, t)),
    ),
    "in place": (
        lambda g, t: g.clone().mul_(t).add_(g, alpha=t).sub_(g, alpha=t),
        lambda g, t: g.clone().addcmul_(g, g, value=t).addcdiv_(g, g + 1, value=-t),
        lambda g, t: g.clone().lerp_(g * g, t).pow_(t).clamp_(max=4 * t),
        lambda g, t: g.clone().fill_(t),
    ),
    "lists": (
        lambda g, t: torch._foreach_mul([g, g], t)[0],
        lambda g, t: torch._foreach_mul([g, g], [t, 2 * t])[1],
        lambda g, t: torch._foreach_add([g], [g], alpha=t)[0],
        lambda g, t: torch._foreach_addcmul([g], [g], [g], value=t)[0],
        lambda g, t: torch._foreach_addcdiv([g], [g], [g + 1], [t])[0],
        lambda g, t: torch._foreach_lerp([g], [g * g], t)[0],
        lambda g, t: torch._foreach_pow([g], t)[0],
    ),
    "tensors": (
        lambda g, t: g * torch.tensor(t, dtype=torch.float64),
        lambda g, t: g * torch.tensor(t),  # a float32, in both
        lambda g, t: g * torch.as_tensor(t, dtype=torch.float64),
        lambda g, t: g * torch.full((), t, dtype=torch.float64),
        lambda g, t: g * g.new_full((), t),
        lambda g, t: g * torch.tensor([[t]], dtype=torch.float64),
    ),
    "Python": (
        lambda g, t: g * max(t, 0.2) * min(t, 0.7),
        lambda g, t: g * math.sqrt(t) + t**0.5,
        lambda g, t: g * abs(-t) * float(t),
        lambda g, t: g * (t // 0.03) + t % 0.03,
        lambda g, t: g.cumsum(0) * t + g.flip(0).renorm(2, 0, t),  # both stay as they are
    ),
}


@pytest.mark.parametrize("name", tier(list(WIDE)))
def test_numbers_are_float64_from_end_to_end(name: str) -> None:
    """A number that is a function's argument is no float32 anywhere on its way."""

    def body(p: Tensor, g: Tensor, t: Any) -> None:
        for form in WIDE[name]:
            p.add_(form(g, t))

    runs = []
    npu_fuse_pass.clear_reports()
    for compiled in (False, True):
        torch._dynamo.reset()
        p, g = torch.ones(4, 6, dtype=torch.float64), torch.linspace(0.1, 3, 24, dtype=torch.float64).reshape(4, 6)
        step = torch.compile(body, backend="npu_fused") if compiled else body
        with torch.no_grad():
            for t in (0.3, 0.1, 0.7):
                step(p, g, t)
        runs.append(p)
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-14, atol=0)
    reports = npu_fuse_pass.reports()
    assert reports and all(r.groups and not r.fallback for r in reports), reports


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.NAdam], ids=lambda cls: cls.__name__)
def test_hyperparameters_that_are_arguments_are_float64(cls: Any) -> None:
    runs = []
    npu_fuse_pass.clear_reports()
    for compiled in (False, True):
        torch._dynamo.reset()
        p = torch.nn.Parameter(torch.linspace(0.1, 3, 12, dtype=torch.float64))
        opt = cls([p], lr=0.1, weight_decay=0.1, foreach=False)

        def body(lr: float, weight_decay: float, opt: Any = opt) -> None:
            opt.param_groups[0].update(lr=lr, weight_decay=weight_decay)
            opt.step()

        step = torch.compile(body, backend="npu_fused") if compiled else body
        for k, t in enumerate((0.1, 0.05, 0.025, 0.3)):
            p.grad = torch.linspace(1 - k, 2, 12, dtype=torch.float64)
            step(t, t / 3)
        runs.append(p.detach())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-13, atol=0)
    reports = npu_fuse_pass.reports()
    assert reports and all(r.groups and not r.fallback for r in reports), reports


def test_a_reason_of_the_match_may_name_what_is_no_slot() -> None:
    assert find._named("weight_decay would be $31/$0", ("lr",)) == "weight_decay would be x31/lr"
