"""How many elements a chunk has: as many as leave room for two buffers of every tensor, and let copies overlap work."""

from __future__ import annotations

from collections.abc import Callable

from npu_fuse_pass.errors import FuseError
from npu_fuse_pass.lowerings.npu.kernels.final_ir import facts
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel, Kernels
from npu_fuse_pass.lowerings.npu.kernels.pipes import waiting_loads

BUFFER_BYTES = 192 * 1024
"""Of a vector core, on all chips so far."""
STEP = 256
_LARGEST = 8192


class NoBlock(FuseError):  # noqa: N818 - a value that stages pass on, not an accident
    """No size of a chunk gives every copy two buffers."""


def largest(kernels: Callable[[int], Kernels], compiled: Callable[[Kernel], str]) -> int:
    """The largest block, in steps of 256 elements, at which every copy has two buffers and waits for none.

    A copy that does either makes the vector unit wait for memory, which is worse than a smaller chunk.

    Args:
        kernels: makes a group's kernels for a block.
        compiled: gives the compiler's last IR of one, or raises `FuseError` where it refuses it.

    Raises:
        NoBlock: not even the smallest one does; holds the last refusal.
    """
    why = ""

    def fits(block: int) -> bool:
        nonlocal why
        for kernel in kernels(block).launches:
            try:
                text = compiled(kernel)
            except FuseError as e:
                why = str(e)
                return False
            found, waiting = facts(text), waiting_loads(text) if kernel.over == "chunks" else 0
            if not found.double_buffered or waiting:
                why = f"{kernel.name}: {found.single_buffered} copies have one buffer, {waiting} wait for those before"
                return False
        return True

    # how the compiler shares buffers is not known here, and a larger block than one that does may do again: so down
    # from what would fit if nothing but the tensors were in memory
    block = _first(kernels(STEP))
    while block >= STEP:
        if fits(block):
            return block
        block -= STEP
    raise NoBlock(f"no chunk of {STEP} elements or more has two buffers for every copy: {why}")


def _first(kernels: Kernels) -> int:
    """Two buffers for every tensor that a launch reads, and hardly one for what it computes."""
    reads = max(sum(2 * p.bytes_per_element for p in k.pointers if not p.written) for k in kernels.launches)
    return min(_LARGEST, BUFFER_BYTES // (reads + 4) // STEP * STEP)
