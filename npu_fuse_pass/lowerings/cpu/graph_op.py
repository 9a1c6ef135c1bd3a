"""The fused node on a CPU inside another compiler's program (Inductor's): the generated kernel as an operation.

`npu_fused::multi_tensor_kernel` takes and gives what `npu_fused::multi_tensor_update` does. It is an operation of its
own because that one's eager kernel is the oracle for every lowering, this one too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.ir.fused_op import fake_update, multi_tensor_update, parsed
from npu_fuse_pass.ir.text import serialise
from npu_fuse_pass.ir.types import Group, Leaf, group_name
from npu_fuse_pass.lowerings.cpu import program as cpu
from npu_fuse_pass.user_warnings import warn

_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define("multi_tensor_kernel(Tensor[] tensors, Tensor[] scalars, int members, str formula) -> Tensor[]")
multi_tensor_kernel = torch.ops.npu_fused.multi_tensor_kernel.default


def use_kernels(gm: fx.GraphModule) -> None:
    """Make every fused node of a rewritten graph one that runs the generated kernel."""
    for found in gm.graph.find_nodes(op="call_function", target=multi_tensor_update):
        found.target = multi_tensor_kernel
    gm.recompile()


_Shapes = tuple[tuple[int, ...], ...]


def _run(tensors: Sequence[Tensor], scalars: Sequence[Tensor], members: int, formula: str) -> list[Tensor]:
    program = _program(formula, members, tuple(tuple(t.shape) for t in tensors))
    if program is None:
        made: list[Tensor] = multi_tensor_update(tensors, scalars, members, formula)
        return made
    slots = parsed(formula)
    written = set(slots.written)
    values: list[Tensor | None] = []
    for row, numbers, given in ((slots.tensor_slots, False, tensors), (slots.scalar_slots, True, scalars)):
        for slot, t in zip((s for s in row for _ in range(members)), given, strict=True):
            new = t.detach().to(torch.float64, copy=True) if numbers else t.detach().clone()
            values.append(new if slot in written else t.detach())
    first = {s: members * rank for rank, s in enumerate([*slots.tensor_slots, *slots.scalar_slots])}
    program(values, complete=True)
    results = [values[first[s] + m] for s in slots.written for m in range(members)]
    return [t for t in results if t is not None]


@functools.lru_cache(maxsize=64)
def _program(text: str, members: int, shapes: _Shapes) -> Callable[..., None] | None:
    """The kernel of a formula for tensors of these shapes; None where it cannot be compiled."""
    made = parsed(text)
    formula = dataclasses.replace(made, contributions=(), text=serialise(made.slots, made.writes, ()))
    order = [*formula.tensor_slots, *formula.scalar_slots]
    leaves = []
    for i, slot in enumerate(s for s in order for _ in range(members)):
        shape = shapes[i] if formula.slots[slot].tensor else ()
        leaves.append(Leaf("input", f"slot_{slot}", i, dtype=formula.slots[slot].dtype, shape=shape))
    rank = {slot: r for r, slot in enumerate(order)}
    places = [tuple(rank[s] * members + m for s in range(len(order))) for m in range(members)]
    group = Group(group_name(text), formula, places, [()] * members, tuple("" for _ in order))
    try:
        return cpu.Program(leaves, [group])
    except PlatformError as e:
        warn(f"npu_fused: fused nodes are interpreted: {e}")
        return None


_library.impl("multi_tensor_kernel", _run, "CPU")
torch.library.register_fake("npu_fused::multi_tensor_kernel", fake_update, lib=_library)
