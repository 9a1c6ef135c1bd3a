"""Every row of the table of operations: the kernel and the interpreter against torch, on awkward values."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass.capture.aten.rows import ROWS
from npu_fuse_pass.capture.aten.shaped import SHAPED
from npu_fuse_pass.capture.graph import capture
from tests.support.graphs import PROGRAMS, fused, run, traced, ulps
from tests.support.ops_cases import TABLE, Op

pytestmark = pytest.mark.usefixtures("shipped_kernels")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_BATCH = 32  # operations in one kernel


@functools.cache
def inputs(dtype: torch.dtype) -> list[Tensor]:
    """x, y, z: every pair of special values, then ordinary ones of all magnitudes; an odd number of elements."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1, -1, 0.5, -0.5, 2, 3, -3, 7, -2.5, 0.1, 0.3]
    special += [1e-3, -1e-4, 1e3, 100.5, info.tiny / 8, -info.tiny / 8, info.tiny, info.max, -info.max]
    s = torch.tensor(special, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1501, generator=g, dtype=torch.float64)

    def ordinary() -> Tensor:
        whole = torch.randint(-6, 7, (300,), generator=g).double()
        return torch.cat([normal(), normal() * torch.exp(4 * normal()), whole])

    x, y = (t.flatten() for t in torch.meshgrid(s, s, indexing="ij"))
    z = s[torch.randint(len(s), x.shape, generator=g)]
    return [torch.cat([t, ordinary()]).to(dtype) for t in (x, y, z)]


def reference(op: Op, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """What torch computes; its eager prims.fma rounds twice, its addcmul does not."""
    value = torch.addcmul(z, x, y) if op.row == "fma" else op.call(x, y, z)
    return value.to(x.dtype)


def refusal(op: Op, dtype: torch.dtype) -> str:
    """Why an operation on tensors of a dtype cannot be fused; empty if it can."""
    x, y, z = inputs(dtype)
    unfused = capture(traced(lambda x, y, z, o: o.copy_(op.call(x, y, z)), x, y, z, x.clone())).unfused
    return unfused[0].text if unfused else ""


@functools.cache
def results(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Operation -> "kernel" or "interpreter" -> result; a few kernels compute all operations of one dtype."""
    given = inputs(dtype)
    ops = [op for op in TABLE if not refusal(op, dtype)]
    found: dict[str, dict[str, Tensor]] = {}
    for start in range(0, len(ops), _BATCH):
        batch = ops[start : start + _BATCH]

        def compute(x: Any, y: Any, z: Any, *outs: Any, batch: list[Op] = batch) -> None:
            for op, out in zip(batch, outs, strict=True):
                out.copy_(op.call(x, y, z))

        outs = [torch.zeros_like(given[0]) for _ in batch]
        captured, groups = fused(compute, *given, *outs)
        for how in PROGRAMS:
            made = [t.clone() for t in outs]
            run(captured, groups, [*given, *made], how)
            for op, out in zip(batch, made, strict=True):
                found.setdefault(op.name, {})[how] = out
    return found


def test_the_table_has_every_row_once():
    of_numbers = {n for n in ROWS if n.removeprefix("_").startswith("sym_")}  # Python's: test_capture_reasons
    assert set(ROWS) - of_numbers <= {op.row for op in TABLE} <= {*ROWS, *SHAPED}
    assert len({op.name for op in TABLE}) == len(TABLE)
    assert all(op.why for op in TABLE if op.ulps or op.half or op.where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_an_operation_is_torchs(op, dtype):
    limit, refused = op.allowed(dtype), refusal(op, dtype)
    assert bool(refused) == (limit is None), refused or "computed, but the table expects a refusal"
    if limit is None:
        return
    x, y, z = inputs(dtype)
    wanted, compared = reference(op, x, y, z), op.compared(x, y, z)
    for how, got in results(dtype)[op.name].items():
        apart = torch.where(compared, ulps(got, wanted), 0.0)
        if apart.max() > limit:
            x0, y0, z0, got0, wanted0 = (float(t[apart.argmax()]) for t in (x, y, z, got, wanted))
            text = f"x={x0}, y={y0}, z={z0}: {got0}, torch has {wanted0}"
            raise AssertionError(f"{how}: {float(apart.max()):g} ulp, allowed are {limit}, at {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_interpreter_round_alike_where_nothing_but_arithmetic_is_asked(dtype):
    exact = [op.name for op in TABLE if op.ulps == 0 and op.half is not None and op.where is None]
    apart = {n: float(ulps(*results(dtype)[n].values()).max()) for n in exact}
    assert not {n: u for n, u in apart.items() if u}
