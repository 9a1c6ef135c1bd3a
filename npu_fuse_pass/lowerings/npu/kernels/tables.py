"""The tables that kernels go through: a row per chunk, and a row per member for what combines chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.errors import Mismatch


def chunk_table(
    members: Sequence[int], sizes: Sequence[int], addresses: Tensor, itemsizes: Sequence[int], block: int
) -> Tensor:
    """Rows of (member, elements, address for each slot), int64, in the members' order.

    Addresses are absolute and count elements, so that kernels need no base.

    Args:
        members: those that take part.
        sizes: their elements.
        addresses: of their tensors in bytes, (slots, members) int64.
        itemsizes: of the slots' elements, in bytes.
        block: the elements of a chunk.

    Raises:
        Mismatch: an address is no multiple of an element's size.
    """
    each = torch.tensor(itemsizes, dtype=torch.int64, device="cpu").reshape(-1, 1)
    if bool((addresses % each).any()):
        raise Mismatch("a tensor's address is no multiple of the size of its elements")
    size = torch.tensor(list(sizes), dtype=torch.int64, device="cpu")
    counts = -(-size // block)
    place = torch.arange(len(members), device="cpu").repeat_interleave(counts)
    start = (torch.arange(len(place), device="cpu") - (counts.cumsum(0) - counts)[place]) * block
    columns = [
        torch.tensor(list(members), dtype=torch.int64, device="cpu")[place],
        (size[place] - start).clamp(max=block),
    ]
    return torch.stack([*columns, *((addresses // each)[:, place] + start)], dim=1).contiguous()


def member_table(members: Sequence[int], sizes: Sequence[int], block: int) -> Tensor:
    """Rows of (member, its first chunk in `chunk_table`, its chunks), int64."""
    size = torch.tensor(list(sizes), dtype=torch.int64, device="cpu")
    counts = -(-size // block)
    member = torch.tensor(list(members), dtype=torch.int64, device="cpu")
    return torch.stack([member, counts.cumsum(0) - counts, counts], dim=1).contiguous()
