"""Where flat buffers begin, so that a CPU's first-level cache can hold the lines of all of them at once.

A step walks through the buffers of one batch side by side. AMD's cores look a line up by a hash of its address: bits 12
to 19, each with one of the bits 20 to 27 (Lipp et al., "Take A Way", 2020). Lines of one set whose hashes agree evict
each other, and buffers of a power of two of bytes, which the allocator puts a page apart, agree in half of their pages:
a step of 8 x 2048x2048 Adam took a fifth longer. Other processors do not mind where a buffer begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_PAGE = 4096
_LARGE = 1 << 20  # bytes, from which on a step is long enough to notice
_HASHED = ((12, 27), (13, 26), (14, 25), (15, 20), (16, 21), (17, 22), (18, 23), (19, 24))


def flat_buffer(numel: int, dtype: torch.dtype, device: torch.device, others: Sequence[Tensor]) -> Tensor:
    """An uninitialised 1-D tensor that is used side by side with `others`."""
    if device.type != "cpu" or numel * dtype.itemsize < _LARGE:
        return torch.empty((numel,), dtype=dtype, device=device)
    page = _PAGE // dtype.itemsize
    choices = 1 + 4 * len(others)
    memory = torch.empty((numel + (choices - 1) * page,), dtype=dtype, device=device)
    starts = [memory[k * page :][:numel] for k in range(choices)]
    return min(starts, key=lambda start: sum(conflicts(start, other) for other in others))


def _reference_strides(param: Tensor) -> tuple[int, ...]:
    """Strides in which the elements of a parameter's states lie: its own where it is dense, else contiguous."""
    if param.is_contiguous():
        return param.stride()
    return torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()


def views_of(flat: Tensor, params: Iterable[Tensor]) -> Iterator[Tensor]:
    """A view of a buffer for each parameter, one behind the other."""
    offset = 0
    for p in params:
        yield flat.as_strided(p.shape, _reference_strides(p), offset)
        offset += p.numel()


def conflicts(a: Tensor, b: Tensor) -> int:
    """The number of pages, of 256, in which the lines of two tensors evict each other."""
    pages = range(0, 256 * _PAGE, _PAGE)
    return sum(_hash(a.data_ptr() + p) == _hash(b.data_ptr() + p) for p in pages)


def _hash(address: int) -> int:
    return sum(((address >> low ^ address >> high) & 1) << i for i, (low, high) in enumerate(_HASHED))
