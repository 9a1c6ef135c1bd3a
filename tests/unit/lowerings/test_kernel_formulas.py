"""Generated C++ against the interpreter, on random formulas: every phase, every mixture of tensors and scalars."""

from __future__ import annotations

import math
import os
import pathlib

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from npu_fuse_pass.ir.expr import C_FUNCTIONS
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Formula, Group, Leaf
from npu_fuse_pass.lowerings import eager
from npu_fuse_pass.lowerings.cpu import codegen, compiler
from npu_fuse_pass.lowerings.cpu import program as cpu
from tests.support.formulas import EXACT_FORMULAS, LABELS
from tests.support.graphs import ulps

SIZES = (1, 16, 37, 16390)


def group_of(formula: Formula) -> tuple[list[Leaf], Group]:
    """Four members of different sizes; the last slot is a scalar of each member's own, lr is shared."""
    leaves = [Leaf("input", "lr", 0)]
    members = []
    for size in SIZES:
        first = len(leaves)
        leaves += [Leaf("input", f"t{first + k}", first + k, dtype=torch.float64, shape=(size,)) for k in range(3)]
        leaves.append(Leaf("input", f"c{first}", first + 3))
        members.append((first, first + 1, first + 2, 0, first + 3))
    totals = [tuple(range(len(formula.contributions)))] * len(members)
    return leaves, Group("update_random", formula, members, totals, LABELS)


def inputs(leaves: list[Leaf]) -> list[Tensor | None]:
    """Small multiples of 1/8, so that sums have one value in any order."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(-40, 41, leaf.shape, generator=g).double() / 8 for leaf in leaves]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(EXACT_FORMULAS)
def test_kernel_and_interpreter_agree_to_the_last_bit(formula):
    leaves, group = group_of(formula)
    kernel, interpreted = inputs(leaves), inputs(leaves)
    program = cpu.Program(leaves, [group])
    program(kernel, complete=True)
    eager.Program(leaves, [group])(interpreted, complete=True)
    for leaf, a, b in zip(leaves, kernel, interpreted, strict=True):
        assert a is not None and b is not None
        assert float(ulps(a, b).max()) == 0, f"{leaf.name} of\n{formula.text}\nkernel {a}\ninterpreter {b}"


def test_a_kernel_reads_everything_before_it_writes():
    """Reductions of what the same kernel overwrites, in a formula with three phases."""
    text = """\
slot 0: f32
slot 1: f32
slot 2: scalar
%0: f64[] = cast($0, f64)
%1: f64 = sum(%0)
%2: f32 = cast(%1, f32)
%3: f32[] = mul($1, %2)
%4: f64[] = cast(%3, f64)
%5: f64 = amax(%4)
%6: f32 = cast(%5, f32)
%7: f32[] = add($0, %6)
%8: f32[] = sub($1, %7)
%9: f64 = add($2, %5)
write $0 = %8
write $1 = %7
write $2 = %9"""
    leaves = [Leaf("input", n, i, dtype=torch.float32, shape=(40_000,)) for i, n in enumerate("pq")]
    leaves.append(Leaf("input", "s", 2))
    p, q, s = torch.ones(40_000), torch.full((40_000,), 0.5), torch.tensor(3.0, dtype=torch.float64)
    cpu.Program(leaves, [Group("update_phases", parse(text), [(0, 1, 2)], [()], ("p", "q", "s"))])([p, q, s])
    most = 40_000 * 0.5
    assert bool((p == 0.5 - (1 + most)).all())
    assert bool((q == 1 + most).all())
    assert float(s) == 3 + most


def _glibc() -> tuple[int, ...]:
    """The version of the C library; (0,) where it is another one."""
    try:
        found = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        found = ""
    return tuple(map(int, found.removeprefix("glibc ").split("."))) if found.startswith("glibc ") else (0,)


def _of(name: str) -> tuple[str, list[Tensor]]:
    """The formula y = f(x) or f(x, y) of float32 tensors, and arguments: usual ones, ends of ranges, no numbers."""
    two = name in ("pow", "atan2", "hypot")
    g = torch.Generator().manual_seed(3)
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4e38, 88.7, -103.9, 0.5]
    x = torch.cat([torch.randn(5003, generator=g) * 3, torch.tensor(special), torch.rand(1000, generator=g)])
    y = torch.cat([torch.randn(6003, generator=g) * 2, torch.tensor(special)])
    call = f"{name}($0, $1)" if two else f"{name}($0)"
    return f"slot 0: f32\nslot 1: f32\n%0: f32[] = {call}\nwrite $1 = %0", [x, y]


OF_VECTORS = [*(f for f in C_FUNCTIONS if f not in ("sqrt", "floor", "ceil", "trunc")), "pow", "atan2", "hypot"]


@pytest.mark.parametrize("name", OF_VECTORS)
def test_functions_of_tensors(name: str) -> None:
    """At most four units in the last place off, the ends of their ranges as torch has them."""
    text, (x, y) = _of(name)
    want = getattr(torch, name)(*((x.double(), y.double()) if name in ("pow", "atan2", "hypot") else (x.double(),)))
    leaves = [Leaf("input", n, i, dtype=torch.float32, shape=x.shape) for i, n in enumerate("xy")]
    group = Group("update_function", parse(text), [(0, 1)], [()], ("x", "y"))
    cpu.Program(leaves, [group])([x, y])
    far = ulps(y, want.float())
    # where the exact value is no normal number, units are all of one size
    assert float(far.max()) <= 4, (name, x[far.argmax()], y[far.argmax()], want[far.argmax()])


@pytest.mark.skipif(_glibc() < (2, 35) or os.uname().machine != "x86_64", reason="no vector forms of all of them")
@pytest.mark.parametrize("name", OF_VECTORS)
def test_functions_of_tensors_run_vector_by_vector(name: str, tmp_path: pathlib.Path) -> None:
    if "clang" in (compiler.compiler() or "clang"):
        pytest.skip("clang++ does not call glibc's")
    source = codegen.generate("update_function", parse(_of(name)[0]))
    assert b"_ZGV" in compiler.compile_library(source.text, (), tmp_path).read_bytes()


def test_float16_is_rounded_as_by_torch() -> None:
    """All halves, all floats between two of them and their neighbours, the ends; and from there, widened, back."""
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = halves + (halves.roll(-1) - halves) / 2
    near = [torch.nextafter(between, torch.full((), to)) for to in (-math.inf, math.inf)]
    ends = torch.tensor(
        [65519.9, 65520.0, 65536.0, 1e38, -1e38, 2.0**115, 1e-45, -1e-45, 0.0, -0.0, math.inf, math.nan]
    )
    wide = torch.cat([halves, between, *near, ends])
    wide = wide[: len(wide) // 512 * 512 + 13]  # not a multiple of what is converted at once
    narrow, again = torch.zeros_like(wide, dtype=torch.float16), torch.zeros_like(wide)
    text = "slot 0: f32\nslot 1: f16\nslot 2: f32\n%0: f16[] = cast($0, f16)\n%1: f32[] = cast(%0, f32)\n"
    tensors = [wide, narrow, again]
    leaves = [
        Leaf("input", n, i, dtype=x.dtype, shape=x.shape) for (i, x), n in zip(enumerate(tensors), "xyz", strict=True)
    ]
    group = Group("update_halves", parse(f"{text}write $1 = %0\nwrite $2 = %1"), [(0, 1, 2)], [()], ("x", "y", "z"))
    cpu.Program(leaves, [group])(tensors)
    want = wide.half()
    numbers = ~want.isnan()
    assert torch.equal(narrow.isnan(), ~numbers) and torch.equal(again.isnan(), ~numbers)
    assert torch.equal(narrow[numbers].view(torch.int16), want[numbers].view(torch.int16))
    assert torch.equal(again[numbers].view(torch.int32), want.float()[numbers].view(torch.int32))
    both = parse(f"{text}write $1 = %0\nwrite $2 = %0")  # a value that is rounded, in a slot that would not
    cpu.Program(leaves, [Group("update_both", both, [(0, 1, 2)], [()], ("x", "y", "z"))])(tensors)
    assert torch.equal(again[numbers].view(torch.int32), want.float()[numbers].view(torch.int32))
    negate = parse("slot 0: f32\nslot 1: f16\n%0: f32[] = neg($0)\nwrite $1 = %0")
    cpu.Program(leaves[:2], [Group("update_negated", negate, [(0, 1)], [()], ("x", "y"))])(tensors[:2])
    assert torch.equal(narrow[numbers].view(torch.int16), (-want)[numbers].view(torch.int16))
    widen = parse("slot 0: f16\nslot 1: f32\n%0: f32[] = cast($0, f32)\nwrite $1 = %0")
    cpu.Program([leaves[1], leaves[2]], [Group("update_widened", widen, [(0, 1)], [()], ("y", "z"))])([want, again])
    assert torch.equal(again[numbers].view(torch.int32), want.float()[numbers].view(torch.int32))


ARITHMETIC = {
    **dict.fromkeys(["add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "copysign"], 2),
    **dict.fromkeys(["sqrt", "abs", "sign", "round", "floor", "rsqrt"], 1),
    "fma": 3,
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="what g++ vectorises is another processor's matter")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_a_loop_over_many_tensors_is_vectorised(dtype: str, tmp_path: pathlib.Path) -> None:
    """Six tensors, four of them written: too many pairs for g++ to ask at run time whether they overlap."""
    if "clang" in (compiler.compiler() or "clang"):
        pytest.skip("asks g++ what it did")
    values = [f"f32[] = cast(${k}, f32)" for k in range(6)]
    for op, arity in ARITHMETIC.items():
        values.append(f"f32[] = {op}({', '.join(f'%{len(values) - 1 - k}' for k in range(arity))})")
    made = len(values)
    values += [f"{dtype}[] = cast(%{made - 1 - k}, {dtype})" for k in range(4)]
    text = [f"slot {k}: {dtype}" for k in range(6)] + [f"%{k}: {value}" for k, value in enumerate(values)]
    text += [f"write ${k} = %{made + k}" for k in range(4)]
    source, said = codegen.generate("update_many", parse("\n".join(text))), tmp_path / "said"
    compiler.compile_library(source.text, ("-O3", f"-fopt-info-vec-optimized={said}"), tmp_path)
    loop = [i for i, line in enumerate(source.text.splitlines(), 1) if "i < n; ++i) {" in line][-1]
    assert f":{loop}:" in "".join(line for line in said.read_text().splitlines() if "loop vectorized" in line)
