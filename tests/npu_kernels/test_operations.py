"""Every pointwise operation that has a form: accepted by the compiler, executed, compared with float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from npu_fuse_pass.ir.fused_op import evaluate
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Formula
from npu_fuse_pass.lowerings.cpu.cpp_ops import CPP
from npu_fuse_pass.lowerings.npu.emit.split import split_whole
from npu_fuse_pass.lowerings.npu.kernels.generate import generate
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS, supported
from npu_fuse_pass.lowerings.npu.kernels.tables import chunk_table
from tests.npu_kernels.executed import executable

TWO = [
    "add",
    "sub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "pow",
    "copysign",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
]
MASKS = ("and", "or", "xor", "not")
TRUTHS = ("lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "isfinite")
POSITIVE = ("sqrt", "rsqrt", "log", "log2", "log10", "pow")
LOOSE = {"tan": 3e-5, "erf": 2e-6, "pow": 2e-6}
LOOSE |= dict.fromkeys(("sin", "cos", "sinh", "exp2"), 1e-6)
"""Relative to the largest result; the compiler expands these into polynomials. The rest: 3e-7."""
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, math.inf, -math.inf, math.nan, 3e-5, -3e-5]
SMALL = ("erf", "expm1", "log1p", "sin", "sinh", "tan", "tanh")
"""They are near their arguments where these are near 0."""
OPERATIONS = sorted(op for op in CPP if supported(op) and op not in ("zero", "numel"))


def formula(op: str) -> Formula:
    """`$3` becomes the operation on `$0`, `$1`, `$2`."""
    lines = [f"slot {i}: f32" for i in range(4)]
    count = 2 if op in TWO else 3 if op == "fma" else 1
    given = ", ".join(f"${i}" for i in range(count))
    if op == "where" or op in MASKS:
        lines += ["%0: bool[] = lt($0, $1)", "%1: bool[] = gt($1, $2)"]
        mask = {"where": "%0", "not": "%2"}.get(op, "%2")
        if op in MASKS:
            lines.append(f"%2: bool[] = {op}({'%0' if op == 'not' else '%0, %1'})")
        lines += [f"%3: f32[] = where({mask}, $2, $0)", "write $3 = %3"]
    elif op in TRUTHS:
        lines += [f"%0: bool[] = {op}({given})", "%1: f32[] = cast(%0, f32)", "write $3 = %1"]
    else:
        lines += [f"%0: f32[] = {op}({given})", "write $3 = %0"]
    return parse("\n".join(lines))


def computed(made: Formula, given: Sequence[Tensor]) -> Tensor:
    """By a kernel."""
    split = split_whole(made, ())
    kernel = generate("kernel", split, 1024).launches[0]
    result = torch.full_like(given[0], 77.0)
    tensors = [[*given, result][s] for s in split.tensor_slots]
    addresses = torch.tensor([[t.data_ptr()] for t in tensors])
    table = chunk_table([0], [result.numel()], addresses, [4] * len(tensors), 1024)
    numbers = torch.zeros(8)
    vectors = {"table": table.data_ptr(), "numbers": numbers.data_ptr()}
    arguments = [0 if p.slot >= 0 else vectors[p.kind] for p in kernel.pointers]
    executable(kernel.text)(2, *arguments, *[len(table)] * len(kernel.integers))
    return result


def wanted(made: Formula, given: Sequence[Tensor]) -> Tensor:
    """By torch, in float64."""
    wide = parse(made.text.replace("f32", "f64"))
    found = evaluate(wide, {i: t.double() for i, t in enumerate(given)}, {})
    return found[id(wide.writes[0][1])]


@pytest.mark.parametrize("op", OPERATIONS)
def test_numbers(op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2500, generator=generator) * 2 for _ in range(3)]
    given[1][:99] = given[0][:99]
    if op in POSITIVE:
        given[0] = given[0].abs() + 0.1
    if op == "log1p":
        given[0] = given[0].abs() - 0.5
    made = formula(op)
    got, want = computed(made, given).double(), wanted(made, given)
    if op == "tan":  # near its poles any rounding of the argument is all of it
        usual = want.abs() < 10
        got, want = got[usual], want[usual]
    assert (got - want).abs().max() <= LOOSE.get(op, 3e-7) * want.abs().max()


@pytest.mark.parametrize("op", SMALL)
def test_small_results_keep_their_digits(op: str) -> None:
    """Each result has its own size here: gradients may be far below 1."""
    sizes = 10.0 ** torch.linspace(-30, 0, 1250)
    given = [torch.cat([sizes, -sizes / 2]), torch.ones(2500), torch.ones(2500)]
    made = formula(op)
    got, want = computed(made, given).double(), wanted(made, given)
    assert ((got - want).abs() <= 4e-7 * want.abs()).all()


@pytest.mark.parametrize("op", OPERATIONS)
def test_special_values(op: str) -> None:
    """NaN, infinities and zeros give what torch gives in float32; where it is finite, nearly so."""
    pairs = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL))
    given = [pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), pairs[:, 1].flip(0).contiguous()]
    made = formula(op)
    got = computed(made, given)
    want = evaluate(made, dict(enumerate(given)), {})[id(made.writes[0][1])].float()
    if op in ("sin", "cos", "tan"):
        keep = given[0].isfinite()
        got, want = got[keep], want[keep]
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_what_has_none_has_a_reason() -> None:
    assert all(len(text) > 20 for text in REASONS.values())
