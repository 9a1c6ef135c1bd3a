"""Flags and barriers of the last IR order all that conflicts; where one kind is planted missing, that is found."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import pytest
import torch

from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel
from npu_fuse_pass.lowerings.npu.program import Program
from tests.npu_kernels import machine
from tests.npu_kernels.compiler import final_ir
from tests.npu_kernels.executed import Cores, captured_rules
from tests.npu_kernels.races import Races
from tests.npu_kernels.steps import OURS, Step, parameters, set_gradients
from tests.support.graphs import inputs_of_step

SIZES = (3 * 4096, 5000, 4 * 4096, 1, 9000, 700, 33)
Edit = Callable[[str], str]


class Watched(Cores):
    """Executes one block under a watch; `edit` plants a mistake."""

    def __init__(self, edit: Edit, size: int | None = None) -> None:
        super().__init__(chunk=size)
        self._edit = edit
        self.seen: list[tuple[Kernel, Races]] = []

    def __call__(self, kernel: Kernel, arguments: Sequence[int], rows: int) -> None:
        races = Races()
        machine.Kernel(self._edit(final_ir(kernel.text)), races)(1, *arguments)
        self.seen.append((kernel, races))


def watch(step: Step, edit: Edit = lambda text: text, size: int | None = None) -> list[tuple[Kernel, Races]]:
    params = parameters(SIZES)
    opt = step.build(params)
    set_gradients(params, 0)
    captured = captured_rules(opt)
    watched = Watched(edit, size)
    program = Program(captured.leaves, captured.groups, hardware=watched)
    given = inputs_of_step(opt)
    program([*given, *[None] * (len(captured.leaves) - len(given))])
    return watched.seen


def combines(kernel: Kernel) -> bool:
    """Whether it adds up sums of members before their chunks."""
    return any(p.kind == "spans" for p in kernel.pointers)


@pytest.mark.parametrize("step", OURS, ids=str)
def test_no_race_and_no_load_that_waits(step: Step) -> None:
    for kernel, races in watch(step):
        assert not races.found and not races.left, (kernel.name, races.found, races.left)
        if kernel.over == "chunks" and not combines(kernel):
            assert races.loads > 5 and races.waiting == 0, (kernel.name, races.waiting, races.loads)


def test_loads_wait_where_a_core_comes_to_a_member_alone() -> None:
    (kernel,) = (found for found in watch(BY_NAME["lamb"], size=1024) if combines(found[0]))
    races = kernel[1]
    each = sum(p.slot >= 0 and not p.written for p in kernel[0].pointers) + 2  # tensors, and two sums
    assert not races.found
    assert 2 * each * len(SIZES) < races.loads and races.waiting <= each * len(SIZES)


@functools.cache
def ordering(step: Step) -> list[str]:
    """Patterns of lines: each kind of flag and barrier that a step's kernels have."""
    texts = [final_ir(kernel.text) for kernel, _ in watch(step)]
    flags = {m for text in texts for m in re.findall(r"set_flag\[<(\w+)>, <(\w+)>", text)}
    return [*(f"flag[<{a}>, <{b}>" for a, b in sorted(flags)), "pipe_barrier[<PIPE_V>"]


def without(pattern: str) -> Edit:
    return lambda text: "\n".join(line for line in text.splitlines() if pattern not in line)


BY_NAME = {step.name: step for step in OURS}


# each load there waits for a vector operation that has waited for the store before it
IMPLIED = {("adam", "flag[<PIPE_MTE3>, <PIPE_MTE2>")}


@pytest.mark.parametrize("step", OURS, ids=str)
def test_each_kind_of_flag_is_needed(step: Step) -> None:
    kinds = ordering(step)
    assert len(kinds) >= 4
    found = {p for p in kinds if any(races.found for _, races in watch(step, without(p)))}
    assert {(step.name, p) for p in kinds} - {(step.name, p) for p in found} <= IMPLIED


def test_a_flag_that_is_left_set() -> None:
    def edit(text: str) -> str:
        start = text.rindex("hivm.hir.wait_flag")  # behind the loop
        return text[:start] + text[text.index("\n", start) :]

    for planted, change in ((False, lambda text: text), (True, edit)):
        ((_, races),) = watch(BY_NAME["adamw"], change)
        assert not races.found and len(races.left) == planted


def test_halves_of_a_double_buffer_at_one_address() -> None:
    def edit(text: str) -> str:
        choices = re.findall(r"arith\.select %\w+, (%\w+), (%\w+) : memref<", text)
        first, second = next(c for c in choices if c[0] != c[1])
        return re.sub(rf"({first} = hivm\.hir\.pointer_cast)\(%\w+\)", rf"\1({address(text, second)})", text)

    def address(text: str, name: str) -> str:
        found = re.search(rf"{name} = hivm\.hir\.pointer_cast\((%\w+)\)", text)
        assert found
        return found[1]

    assert any(races.found for _, races in watch(BY_NAME["adamw"], edit))


def test_two_inputs_at_one_address_give_wrong_numbers() -> None:
    """A core's memory is bytes at planned addresses when IR is executed here: a wrong plan shows in the results."""

    def edit(text: str) -> str:
        loads = re.findall(r"hivm\.hir\.load .* outs\((%\w+) :", text)
        first, second = (re.search(rf"{name} = memref\.subview (%\w+)", text) for name in loads[:2])
        assert first and second
        return text.replace(f"{loads[1]} = memref.subview {second[1]}", f"{loads[1]} = memref.subview {first[1]}")

    found = []
    for change in (lambda text: text, edit):
        params = parameters((5000,))
        opt = BY_NAME["adamw"].build(params)
        set_gradients(params, 0)
        captured = captured_rules(opt)
        program = Program(captured.leaves, captured.groups, hardware=Watched(change))
        given = inputs_of_step(opt)
        program([*given, *[None] * (len(captured.leaves) - len(given))])
        found.append(params[0].detach().clone())
    assert not torch.allclose(*found)
