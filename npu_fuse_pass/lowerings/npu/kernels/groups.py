"""Which groups of a step get generated kernels, and why the others do not."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from npu_fuse_pass.errors import FuseError
from npu_fuse_pass.ir.totals import depths
from npu_fuse_pass.ir.types import Group, Leaf
from npu_fuse_pass.lowerings.kernels import cache
from npu_fuse_pass.lowerings.npu.emit.split import states_from_tensors
from npu_fuse_pass.lowerings.npu.kernels import block
from npu_fuse_pass.lowerings.npu.kernels.final_ir import facts
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernels
from npu_fuse_pass.lowerings.npu.kernels.hardware import Hardware
from npu_fuse_pass.lowerings.npu.kernels.launch import Generated, generate_group


def generate_groups(
    leaves: Sequence[Leaf], groups: Sequence[Group], hardware: Hardware
) -> Mapping[str, Generated | str]:
    """For every group, by its name, its kernels, compiled and loaded; or why GE operations compute it.

    Args:
        leaves: of the step.
        groups: all of them.
        hardware: what compiles and loads.
    """
    used = collections.Counter(m[s] for g in groups for m in g.members for s in g.formula.tensor_slots)
    deep = depths(groups, leaves)
    found = {g.name: _generated(g, leaves, used, deep, hardware) for g in groups}
    # a total is added up over all that contribute, before anybody reads it: by kernels or by GE operations
    coupled = [g.name for g in groups if with_totals(g)]
    refused = _refused(found, coupled)
    for name in coupled if refused else ():
        if not isinstance(found[name], str):
            found[name] = f"it shares a total with {refused[0]}: {found[refused[0]]}"
    left = _refused(found, found)
    if left and not hardware.calls_back:
        why = f"this CANN calls no kernels from a graph, so all of a step's groups have to be kernels, and {left[0]}"
        found = {n: made if isinstance(made, str) else f"{why} is not: {found[left[0]]}" for n, made in found.items()}
    return found


def _refused(found: Mapping[str, Generated | str], names: Iterable[str]) -> list[str]:
    """Those that have a reason; one without, and without kernels, has nothing to compute."""
    return [name for name in names if isinstance(found[name], str) and found[name]]


def with_totals(group: Group) -> bool:
    """Whether a group adds to a total or reads one."""
    return bool(group.formula.contributions or group.formula.total_slots)


def _generated(
    group: Group, leaves: Sequence[Leaf], used: Mapping[int, int], deep: Mapping[int, int], hardware: Hardware
) -> Generated | str:
    slots, written = group.formula.tensor_slots, set(group.formula.written)
    idle = not slots or all(0 in leaves[m[slots[0]]].shape for m in group.members)
    numbers = group.formula.contributions or states_from_tensors(group.formula, group.formula.total_slots)
    if idle and not numbers:
        return ""  # nothing is computed on a device
    if any(used[m[s]] > 1 for m in group.members for s in slots if s in written):
        return "a tensor that it writes has a part in two updates, and kernels write in place"
    try:
        made = generate_group(group, leaves, lambda kernels: hardware.chunk or _block(kernels, hardware), deep)
        for kernel in made.kernels.launches:
            hardware.load(kernel)
        return dataclasses.replace(made, note=_note(made.kernels, hardware))
    except FuseError as e:
        return str(e)
    except Exception as e:  # of CANN's libraries, or a fault of ours: GE operations compute the group as well
        return f"its kernels cannot be made: {type(e).__name__}: {e}"


def _note(kernels: Kernels, hardware: Hardware) -> str:
    """How far a group's kernels are proven before they run, for the report."""
    if not hardware.identity:
        return f"chunks of {kernels.block} elements, a guess; not compiled"
    found = [(k, facts(hardware.last_ir(k))) for k in kernels.launches if k.over == "chunks"]
    if not found:
        return f"accepted by the compiler for {hardware.target}, 0-dim states alone"
    used, limit = max(f.buffer_bytes for _, f in found), found[0][1].buffer_limit
    as_asked = all(f.bytes_per_element == k.bytes_per_element for k, f in found)
    moved = sum(f.bytes_per_element for _, f in found)
    counted = f"{moved} bytes per element counted in its last IR" + ("" if as_asked else ", more than asked for")
    return (
        f"accepted by the compiler for {hardware.target}, {counted}, chunks of {kernels.block} elements, two buffers "
        f"for every copy, {used} of {limit} bytes of a core's memory"
    )


def _block(kernels: Callable[[int], Kernels], hardware: Hardware) -> int:
    """The elements of a chunk; the search compiles a kernel some ten times, so its result is kept."""
    sources = [k.text for k in kernels(block.STEP).launches]
    key = cache.key_of(*sources, hardware.identity)
    kept = cache.kept(key, "block")
    if kept is not None and kept.isdigit():
        return int(kept)
    found = block.largest(kernels, hardware.last_ir)
    cache.keep(key, "block", str(found).encode())
    return found
