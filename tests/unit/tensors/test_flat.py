"""Flat buffers begin where a CPU's first-level cache can hold lines of all of them."""

from __future__ import annotations

import pytest
import torch

from npu_fuse_pass.tensors.buffers import conflicts, flat_buffer

CPU = torch.device("cpu")


@pytest.mark.parametrize("megabytes", [1, 4, 32, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_buffers_do_not_evict_each_other(megabytes: int, dtype: torch.dtype) -> None:
    numel = megabytes * 2**20 // dtype.itemsize
    made: list[torch.Tensor] = []
    for _ in range(4):
        made.append(flat_buffer(numel, dtype, CPU, made))
    assert max(conflicts(a, b) for a in made for b in made if a is not b) <= 32  # of 256 pages
    assert all(t.dtype == dtype and t.shape == (numel,) and t.is_contiguous() for t in made)


@pytest.mark.parametrize(
    ("distance", "pages"), [(2**28, 256), (2**27, 0), (2**27 + 2**12, 128), (2**25 + 2**14, 128), (2**25 + 2**15, 0)]
)
def test_a_conflict_is_a_pair_of_bits_that_both_flip(distance: int, pages: int) -> None:
    assert conflicts(_At(2**40), _At(2**40 + distance)) == pages  # type: ignore[arg-type]


class _At:
    """Only an address."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def test_small_buffers_have_no_slack() -> None:
    made = flat_buffer(1000, torch.float32, CPU, [torch.empty(1000)])
    assert made.untyped_storage().nbytes() == 4000
