"""How threads share the work of a CPU kernel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.lowerings.cpu import tables as cpu_tables
from npu_fuse_pass.lowerings.cpu.tables import Tables

HALVED = parse("slot 0: f32\n%0: f32[] = mul($0, $0)\nwrite $0 = %0")


@given(st.lists(st.integers(0, 1_500_000), min_size=1, max_size=12), st.integers(1, 256))
def test_a_stretch_is_worth_its_turn_and_leaves_turns_to_all(numels: list[int], threads: int) -> None:
    tables = Tables(HALVED, numels, scratch=1, partial=1)
    tables.share(threads)
    args, elements = tables.args, sum(numels)
    assert args.threads == (threads if elements > cpu_tables._SERIAL else 1)
    assert args.grain >= 1
    if elements:
        average = elements / args.chunks
        stretch = args.grain * average  # elements that a thread takes at once
        fair = elements / (cpu_tables._TURNS * threads)
        assert args.grain == 1 or stretch <= min(cpu_tables._MANY, max(cpu_tables._FEW, fair))
        assert stretch + average > min(cpu_tables._FEW, elements)


def test_the_number_of_threads_may_change_between_calls() -> None:
    tables = Tables(HALVED, [4_000_000], scratch=1, partial=1)
    grains = []
    for threads in (1, 2, 8, 64, 2):
        tables.share(threads)
        grains.append(tables.args.grain)
    assert grains == [8, 7, 2, 2, 7]
