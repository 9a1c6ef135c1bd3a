"""Generated NPU kernels as text: what they are made of, their tables, reasons. Their proof is in tests/npu_kernels."""

from __future__ import annotations

import pytest
import torch

from npu_fuse_pass.errors import Mismatch, Unsupported
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.lowerings.cpu.cpp_ops import CPP
from npu_fuse_pass.lowerings.npu.emit.split import split_whole
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernels, generate
from npu_fuse_pass.lowerings.npu.kernels.operations import REASONS, supported
from npu_fuse_pass.lowerings.npu.kernels.pipes import waiting_loads
from npu_fuse_pass.lowerings.npu.kernels.tables import chunk_table, member_spans


def kernels(*lines: str) -> Kernels:
    return generate("update", split_whole(parse("\n".join(lines)), ()), 1024)


def test_every_pointwise_operation_has_a_form_or_a_reason() -> None:
    apart = ("zero", "numel")  # constants
    assert {op for op in CPP if not supported(op)} - {*apart} == REASONS.keys()


def test_a_pointwise_formula_is_one_launch_that_moves_each_tensor_once() -> None:
    made = kernels("slot 0: f32", "slot 1: bf16", "slot 2: scalar", "%0: f32[] = cast($1, f32)",
                   "%1: f32 = cast($2, f32)", "%2: f32[] = mul(%0, %1)", "%3: f32[] = sub($0, %2)", "write $0 = %3"
    )  # fmt: skip
    (kernel,) = made.launches
    assert [(p.kind, p.dtype, p.slot) for p in kernel.pointers][:3] == [
        ("read", "f32", 0),
        ("read", "bf16", 1),
        ("write", "f32", 0),
    ]
    assert made.bytes_per_element == 4 + 2 + 4
    assert made.numbers == 1


NORM = ("slot 0: f32", "%0: f32[] = mul($0, $0)", "%1: f64[] = cast(%0, f64)", "%2: f64 = sum(%1)")


def test_a_norm_is_two_launches() -> None:
    made = kernels(*NORM, "%3: f64 = sqrt(%2)", "%4: f32 = cast(%3, f32)", "%5: f32[] = div($0, %4)", "write $0 = %5")
    assert [(k.over, k.bytes_per_element) for k in made.launches] == [("chunks", 4), ("chunks", 8)]
    assert made.sums == 1


@pytest.mark.parametrize(
    ("term", "of_members"),
    [
        (("contribute %2",), False),
        (("%3: f32 = cast(%2, f32)", "%4: f64 = sqrt(%3)", "%5: f32 = cast(%4, f32)", "%6: f64 = cast(%5, f64)",
          "%7: f64 = mul(%6, %6)", "contribute %7"), False),
        (("%3: bf16 = cast(%2, bf16)", "%4: f64 = cast(%3, f64)", "contribute %4"), True),
        (("%3: f64 = sqrt(%2)", "contribute %3"), True),
        (("%3: f64 = mul(%2, %2)", "contribute %3"), True),
        (("%3: f64[] = cast($0, f64)", "%4: f64 = sum(%3)", "%5: f64 = sqrt(%4)", "%6: f64 = mul(%5, %5)",
          "contribute %6"), True),
        (("%3: f64 = sqrt(%2)", "contribute %2", "contribute %3"), True),
    ],
)  # fmt: skip
def test_what_is_a_sum_over_elements_takes_no_launch_of_its_own(term: tuple[str, ...], of_members: bool) -> None:
    """The root of a sum that may be negative is not a number, so that its square is not that sum."""
    made = kernels(*NORM, *term)
    assert [(k.over, k.round) for k in made.launches] == [("chunks", 0), *[("members", 0)] * of_members]
    assert made.terms_of_members == of_members
    assert bool(made.sums) == of_members


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("slot 0: f64", "%0: f64[] = neg($0)", "write $0 = %0"), "the vector unit has no float64"),
        (("slot 0: f32", "%0: f32[] = atan($0)", "write $0 = %0"), "atan: .*would lose precision"),
        (("slot 0: f32", "%0: f32[] = fmod($0, $0)", "write $0 = %0"), "fmod: .*no exact remainder"),
    ],
)
def test_reasons(lines: tuple[str, ...], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        kernels(*lines)


def test_tables() -> None:
    addresses = torch.tensor([[4000, 8000, 0], [64, 128, 32]])
    table = chunk_table([0, 2, 5], [5, 4, 0], addresses, [4, 2], block=2)
    assert table.tolist() == [
        [0, 2, 1000, 32], [0, 2, 1002, 34], [0, 1, 1004, 36], [2, 2, 2000, 64], [2, 2, 2002, 66],
    ]  # fmt: skip
    assert member_spans(4, [0, 2], [5, 4], block=2).tolist() == [[0, 3], [0, 0], [3, 2], [0, 0]]
    with pytest.raises(Mismatch, match="no multiple"):
        chunk_table([0], [1], torch.tensor([[2]]), [4], block=2)


LOOP = """    scf.for %arg1 = %1 to %2 step %3  : i32 {{
      hivm.hir.wait_flag[<PIPE_MTE3>, <PIPE_MTE2>, {event}]
      hivm.hir.load ins(%a : memref<?xf32>) outs(%b : memref<?xf32>)
      hivm.hir.set_flag[<PIPE_MTE2>, <PIPE_MTE3>, <EVENT_ID0>]
      hivm.hir.wait_flag[<PIPE_MTE2>, <PIPE_MTE3>, <EVENT_ID0>]
      hivm.hir.store ins(%b : memref<?xf32>) outs(%a : memref<?xf32>)
      hivm.hir.set_flag[<PIPE_MTE3>, <PIPE_MTE2>, {event}]
    }}
"""


def test_a_copy_in_that_waits_for_the_last_copy_out_is_seen() -> None:
    assert waiting_loads(LOOP.format(event="<EVENT_ID0>")) == 1
    assert waiting_loads(LOOP.format(event="%7")) == 0  # an event for every other trip: it waits for the one before
