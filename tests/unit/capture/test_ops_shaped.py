"""Casts, fills, reductions and 0-dim values: kernel and interpreter against torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx

from npu_fuse_pass import npu_fused
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.graph import capture
from tests.support.graphs import PROGRAMS, check, fused, run, traced, ulps
from tests.support.ops_cases import TABLE, Op
from tests.unit.capture import test_ops_table as table

pytestmark = pytest.mark.usefixtures("shipped_kernels")

SIZES = (0, 1, 15, 16, 17, 33, 16384, 16385, 50001)  # around the number of lanes and the size of a chunk

# Casts and fills -----------------------------------------------------------------------------------------------------

CASTS: dict[torch.dtype, list[Callable[[Any], Any]]] = {
    torch.float32: [lambda x: x.to(torch.float32), lambda x: x.float()],
    torch.float64: [lambda x: x.to(dtype=torch.float64), lambda x: x.double()],
    torch.float16: [lambda x: x.to(torch.float16), lambda x: x.half()],
    torch.bfloat16: [lambda x: torch.ops.aten._to_copy(x, dtype=torch.bfloat16), lambda x: x.bfloat16()],
}


@pytest.mark.parametrize("source", table.DTYPES, ids=str)
def test_casts_round_as_torchs_do(source):
    """Exactly: overflow to infinity, values below the normal range, ties to even, NaN whatever its bits."""
    x = table.inputs(source)[0]
    tie = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519.9, 65520.0, 3e-8, 2e-8])
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, tie.to(source), nan.to(source)])
    forms = [(target, cast) for target, casts in CASTS.items() for cast in casts]

    def compute(x: Any, *outs: Any) -> None:
        for (_, cast), out in zip(forms, outs, strict=True):
            out.copy_(cast(x))

    check(compute, x, *(torch.zeros_like(x, dtype=target) for target, _ in forms))


def test_copy_and_type_as_convert():
    def compute(x: Any, half: Any, wide: Any, again: Any) -> None:
        wide.copy_(x.type_as(half))
        half.copy_(x)
        again.copy_(x.to(half) * 3)

    x = table.inputs(torch.float32)[0]
    check(compute, x, x.half(), x.double(), x.clone())


def _node(x: Any, function: Callable[..., Any], *args: Any) -> Any:
    """A call that does not notice that a graph is being made, as a node of that graph."""
    return x.tracer.create_proxy("call_function", function, args, {}) if isinstance(x, fx.Proxy) else function(*args)


FILLS: dict[str, Callable[[Any, Any], Any]] = {
    "zeros_like": lambda x, s: x + torch.zeros_like(x),
    "ones_like": lambda x, s: x + torch.ones_like(x),
    "full_like": lambda x, s: x + torch.full_like(x, 0.3),
    "full": lambda x, s: x + _node(x, torch.full, (), 0.3),
    "zeros": lambda x, s: x + _node(x, torch.zeros, 100),
    "ones": lambda x, s: x + _node(x, torch.ones, (100,)),
    "empty": lambda x, s: x + _node(x, torch.empty, ()).fill_(0.3),
    "empty_like": lambda x, s: x + torch.empty_like(x).fill_(0.3),
    "new_empty": lambda x, s: x + x.new_empty(100).copy_(s),
    "new_zeros": lambda x, s: x + x.new_zeros((100,)),
    "new_ones": lambda x, s: x + s.new_ones(()),
    "new_full": lambda x, s: x + x.new_full((100,), 0.3),
    "scalar_tensor": lambda x, s: x + _node(x, torch.scalar_tensor, 0.3),
    "as_tensor": lambda x, s: x + _node(x, torch.as_tensor, 0.3),
    "tensor": lambda x, s: x + _node(x, torch.tensor, 0.3),
    "clone": lambda x, s: x.clone().add_(1),
    "detach": lambda x, s: x.detach() + 1,
    "alias": lambda x, s: torch.ops.aten.alias(x) + 1,
    "lift_fresh": lambda x, s: torch.ops.aten.lift_fresh(x) + 1,
    "lift_fresh_copy": lambda x, s: torch.ops.aten.lift_fresh_copy(x).mul_(2),
    "fill_": lambda x, s: x.clone().fill_(0.3),
    "fill_ tensor": lambda x, s: x.clone().fill_(s),
    "zero_": lambda x, s: x.clone().zero_().add_(x),
    "copy_ number": lambda x, s: x.clone().copy_(s),
    "item": lambda x, s: x * s.item(),
    "_get_data_attr": lambda x, s: _node(x, torch._C._autograd._get_data_attr, x) + 1,
}


@pytest.mark.parametrize("name", FILLS)
def test_fills_and_copies(name):
    def compute(x: Any, s: Any, out: Any) -> None:
        out.copy_(FILLS[name](x, s))

    x = torch.randn(100)
    check(compute, x, torch.tensor(0.7, dtype=torch.float64), torch.zeros(100))


# Reductions ----------------------------------------------------------------------------------------------------------

# name -> (torch's call, the same in extended precision)
REDUCTIONS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "sum": (lambda x, y: x.sum(), lambda x, y: x.sum()),
    "amax": (lambda x, y: x.amax(), lambda x, y: x.max()),
    "amin": (lambda x, y: x.amin(), lambda x, y: x.min()),
    "max": (lambda x, y: x.max(), lambda x, y: x.max()),
    "min": (lambda x, y: torch.min(x), lambda x, y: x.min()),
    "mean": (lambda x, y: x.mean(), lambda x, y: x.mean()),
    "norm": (lambda x, y: x.norm(), lambda x, y: numpy.sqrt((x * x).sum())),
    "linalg_norm": (lambda x, y: torch.linalg.norm(x), lambda x, y: numpy.sqrt((x * x).sum())),
    "linalg_vector_norm": (lambda x, y: torch.linalg.vector_norm(x), lambda x, y: numpy.sqrt((x * x).sum())),
    "linalg_vector_norm 1": (lambda x, y: torch.linalg.vector_norm(x, 1), lambda x, y: abs(x).sum()),
    "linalg_vector_norm inf": (lambda x, y: torch.linalg.vector_norm(x, math.inf), lambda x, y: abs(x).max()),
    "linalg_vector_norm -inf": (lambda x, y: torch.linalg.vector_norm(x, -math.inf), lambda x, y: abs(x).min()),
    "linalg_vector_norm 0": (lambda x, y: torch.linalg.vector_norm(x, 0), lambda x, y: (x != 0).sum()),
    "dot": (lambda x, y: torch.dot(x, y), lambda x, y: (x * y).sum()),
    "vdot": (lambda x, y: torch.vdot(x, y), lambda x, y: (x * y).sum()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reductions_are_those_of_float64(dtype):
    """A reduction is a float64 sum of float64 values, rounded once: nearer to the truth than torch's float32 sums.

    The limit is 8 roundings of float64 of the sum of magnitudes (16 lanes, then chunks), whatever the size.
    """
    for n in SIZES:
        g = torch.Generator().manual_seed(n)
        x, y = (torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
        names = [name for name in REDUCTIONS if n or name in ("sum", "norm", "dot")]

        def compute(x: Any, y: Any, names: list[str] = names) -> tuple[Any, ...]:
            return tuple(REDUCTIONS[name][0](x, y) for name in names)

        captured, groups = fused(compute, x, y)
        wide = [t.double().numpy().astype(numpy.longdouble) for t in (x, y)]
        for how in PROGRAMS:
            for name, got in zip(names, run(captured, groups, [x, y], how), strict=True):
                truth = REDUCTIONS[name][1](*wide)
                magnitude = float(REDUCTIONS[name][1](*map(abs, wide)))
                rounding = torch.finfo(dtype).eps * abs(float(truth)) if dtype != torch.float64 else 0.0
                assert abs(float(got) - float(truth)) <= 8 * 2.0**-53 * magnitude + rounding, (how, name, n)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 99])
def test_reductions_of_special_values(value, place):
    x = torch.randn(100)
    x[place] = value
    names = [n for n in REDUCTIONS if "dot" not in n]

    def compute(x: Any) -> tuple[Any, ...]:
        return tuple(REDUCTIONS[name][0](x, x) for name in names)

    captured, groups = fused(compute, x)
    for how in PROGRAMS:
        for name, got in zip(names, run(captured, groups, [x], how), strict=True):
            torch.testing.assert_close(got, REDUCTIONS[name][0](x, x), equal_nan=True, msg=f"{how} {name}")


@pytest.mark.parametrize(
    "partial",
    [
        lambda x: x.mul_(x.sum(0)),
        lambda x: x.mul_(x.sum(1, keepdim=True)),
        lambda x: x.mul_(x.amax(-1, keepdim=True)),
        lambda x: x.mul_(torch.linalg.vector_norm(x, dim=0)),
        lambda x: x.mul_(torch.linalg.vector_norm(x, 3, dim=1, keepdim=True)),
        lambda x: x.mul_(x.mean(0)),
        lambda x: x.mul_(torch.norm(x, p=3, dim=0)),
    ],
)
def test_reductions_of_some_dimensions_stay_with_a_reason(partial):
    """They stay original operations, and what is computed around them is right."""
    x = torch.randn(4, 4)
    graph = traced(partial, x)
    reasons = [u.text for u in capture(graph).unfused]
    assert any(word in reason for reason in reasons for word in ("dimension", "keep", "order")), reasons
    wanted, got = x.clone(), x.clone()
    partial(wanted)
    with torch.no_grad():
        npu_fused(graph, [got])(got)
    torch.testing.assert_close(got, wanted)


def test_the_order_of_a_norm():
    """However it is passed."""
    x = torch.randn(9)
    for norm in (
        lambda x: torch.norm(x, 1),
        lambda x: torch.norm(x, p=1),
        lambda x: torch.norm(x, p=math.inf),
        lambda x: torch.norm(x, p="fro"),
        lambda x: x.norm(p=1),
        lambda x: x.norm(math.inf),
        lambda x: torch.linalg.vector_norm(x, ord=1),
        lambda x: torch.linalg.vector_norm(x, 3),
        lambda x: torch.linalg.vector_norm(x, ord=0.5),
        lambda x: torch.norm(x, p=4),
        lambda x: torch._foreach_norm([x], 1)[0],
        lambda x: torch._foreach_norm([x], ord=math.inf)[0],
    ):
        check(norm, x, tolerance=3e-7)


def test_every_shaped_row_is_tested():
    casts = {"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"}
    numbers = {"item", "_local_scalar_dense", "sym_float"}  # tests of capture
    numbers |= {"__round__", "sym_int", "lshift", "rshift"}  # test_python_numbers.py
    tested = {n.split()[0].rstrip("_") for n in (*FILLS, *REDUCTIONS)} | {op.row for op in TABLE}
    elsewhere = {*casts, *numbers, "_lower_version_count_by_1"}  # test_reasons.py: it is refused
    assert set(SHAPED) - elsewhere <= tested, set(SHAPED) - elsewhere - tested


def test_norms_are_zero_or_infinite_where_torchs_are() -> None:
    """A square that float32 does not hold counts as it does there, in the sum, too."""
    for value in (1e-30, 2e-23, 1e-20, 1e18, 3e19, 1e38):
        for size in (2, 100):  # of one element torch takes the magnitude
            x = torch.full((size,), value)
            for order in (2, 3):
                check(lambda x, order=order: torch.linalg.vector_norm(x, order), x, tolerance=3e-2)
            check(lambda x: x.sum() * x.sum(), x, tolerance=1e-6)


# 0-dim values --------------------------------------------------------------------------------------------------------


def test_operations_among_scalars_are_torchs_in_float64():
    """Every operation of the table on 0-dim float64 tensors, as step counters and bias corrections use them."""
    special = [0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 0.9, 0.999, 1e-8, 100.5, -2.5, math.inf, -math.inf, math.nan]
    numbers = [[torch.tensor(v, dtype=torch.float64) for v in (x, y, 0.3)] for x in special for y in special]
    t = torch.zeros(1, dtype=torch.float64)
    for start in range(0, len(TABLE), 32):
        ops = TABLE[start : start + 32]

        def compute(x: Any, y: Any, z: Any, t: Any, *outs: Any, ops: list[Op] = ops) -> None:
            for op, out in zip(ops, outs, strict=True):
                out.copy_(torch.where(t == 0, op.call(x, y, z), t))

        captured, groups = fused(compute, *numbers[0], t, *(t.clone() for _ in ops))
        assert len(groups) == 1
        places = [leaf.index if leaf.kind == "input" else None for leaf in captured.leaves]
        for how, program in PROGRAMS.items():
            made = program(captured.leaves, groups)
            found: list[list[Tensor]] = []
            for given in numbers:
                outs = [t.clone() for _ in ops]
                arguments = [*given, t, *outs]
                made([None if i is None else arguments[i] for i in places], complete=True)
                found.append(outs)
            for op, *got in zip(ops, *found, strict=True):
                wanted = torch.stack([table.reference(op, *given) for given in numbers])
                compared = torch.stack([op.compared(*given) for given in numbers])
                # a 0-dim result of torch may come from the vector loop or from its scalar tail
                limit = max(2.0, op.ulps) if op.ulps else 0.0
                worst = ulps(torch.cat(got), wanted)[compared].max()
                assert worst <= limit, (how, op.name, float(worst))
