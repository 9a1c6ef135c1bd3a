"""In which order the elements of a member's tensors lie in memory, and whether they agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.reasons import Code

SHARED = "two tensors of the step share memory, and one of them is written"
NOWHERE = "a tensor has no memory of its own: it wraps other tensors, or its storage was freed"


def check_apart(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Refuse tensors that share memory where at least one of them is written.

    Raises:
        Mismatch: two of them overlap, or one holds no memory.
    """
    if not all(t.data_ptr() for t in (*written, *read) if t.numel()):
        raise Mismatch(NOWHERE, Code.NO_MEMORY)
    blocks = sorted((t.data_ptr(), t.data_ptr() + _extent(t), 1) for t in written if t.numel())
    blocks += [(t.data_ptr(), t.data_ptr() + _extent(t), 0) for t in read if t.numel()]
    end = end_written = 0
    for start, stop, is_written in sorted(blocks):
        if start < end_written or (is_written and start < end):
            raise Mismatch(SHARED, Code.SHARED_MEMORY)
        end = max(end, stop)
        end_written = max(end_written, stop) if is_written else end_written


def lie_apart(tensors: Sequence[Tensor]) -> bool:
    """True if each of these has memory of its own, which no other one overlaps."""
    try:
        check_apart(tensors, [])
    except Mismatch:
        return False
    return True


def apart(starts: Tensor, sizes: Tensor, written: Tensor) -> bool:
    """True if no written block of memory overlaps another one; blocks are given as tensors.

    Args:
        starts: where the blocks begin, int64.
        sizes: of the blocks in bytes, int64; blocks of none are nowhere.
        written: which of them are written, bool.
    """
    order = starts.argsort()
    order = order[sizes[order] > 0]
    begin, end, is_written = starts[order], starts[order] + sizes[order], written[order]
    reached, reached_by_written = end.cummax(0).values[:-1], (end * is_written).cummax(0).values[:-1]
    overlaps = (begin[1:] < reached_by_written) | (is_written[1:] & (begin[1:] < reached))
    return not bool(overlaps.any())


def _extent(t: Tensor) -> int:
    """Bytes from the start of a tensor's first element to the end of its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def memory_order(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Strides of the first tensor without gaps and overlaps, in which a member is processed; contiguous without one."""
    for t in tensors:
        expected = 1
        for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
            if size != 1 and stride != expected:
                break
            expected *= size
        else:
            return t.stride()
    return torch.empty(tensors[0].shape, device="meta").stride() if tensors else ()


def materialised(t: Tensor) -> bool:
    """True if memory holds the values: not their negatives (imaginary parts of conjugates), and not a zero tensor's."""
    return not (t.is_neg() or getattr(t, "_is_zerotensor", bool)())  # without it their address, 0, is refused


def in_order(t: Tensor, strides: tuple[int, ...]) -> bool:
    """True if the tensor's elements lie in memory with these strides, unchanged."""
    if not materialised(t):
        return False
    agree = all(size <= 1 or a == b for size, a, b in zip(t.shape, t.stride(), strides, strict=True))
    return agree or t.numel() == 0


def aligned(t: Tensor) -> bool:
    """True if the address is a multiple of an element's size, as an NPU's kernels read it."""
    return t.data_ptr() % t.element_size() == 0


def copy_each(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """`copy_` of every value to its target, in one call where torch has one."""
    copy_all = find("torch._foreach_copy_")
    if copy_all is not None:
        copy_all(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def place(t: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same elements of the same memory."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype
