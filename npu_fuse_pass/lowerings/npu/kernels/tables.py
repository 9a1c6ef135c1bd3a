"""The tables that kernels go through: a row per chunk, and which of these are a member's."""

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
    starts = in_elements(addresses, itemsizes)
    size = torch.tensor(list(sizes), dtype=torch.int64, device="cpu")
    counts = -(-size // block)
    place = torch.arange(len(members), device="cpu").repeat_interleave(counts)
    start = (torch.arange(len(place), device="cpu") - (counts.cumsum(0) - counts)[place]) * block
    columns = [
        torch.tensor(list(members), dtype=torch.int64, device="cpu")[place],
        (size[place] - start).clamp(max=block),
    ]
    return torch.stack([*columns, *(starts[:, place] + start)], dim=1).contiguous()


def in_elements(addresses: Tensor, itemsizes: Sequence[int]) -> Tensor:
    """Addresses in bytes, (slots, members) int64, divided by the sizes of the slots' elements.

    Raises:
        Mismatch: one is no multiple of that.
    """
    each = torch.tensor(itemsizes, dtype=torch.int64, device="cpu").reshape(-1, 1)
    if bool((addresses % each).any()):
        raise Mismatch("a tensor's address is no multiple of the size of its elements")
    return addresses // each


def member_spans(count: int, members: Sequence[int], sizes: Sequence[int], block: int) -> Tensor:
    """A row for each of `count` members: its first chunk in `chunk_table`, and how many it has, int64."""
    found = torch.zeros(count, 2, dtype=torch.int64, device="cpu")
    size = torch.tensor(list(sizes), dtype=torch.int64, device="cpu")
    chunks = -(-size // block)
    found[list(members)] = torch.stack([chunks.cumsum(0) - chunks, chunks], dim=1)
    return found
