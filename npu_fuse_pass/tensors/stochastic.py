"""Stochastic rounding: float32 to half precision, up or down by chance, the more likely the nearer that is.

The random bits are those of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
function of a key and a counter without a state: an element gets the same bits in any order of elements and with any
number of threads. The key is (seed, parameter), the counter (block of 8 elements, step), both of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fuse_pass.tensors.memory import memory_order

LANES = 16
ROW = 128
"""Elements of LANES blocks, each of which makes 8 times 16 bits: element e gets those number e // LANES % 8 of block
e // ROW * LANES + e % LANES, so that LANES neighbours are computed alike."""

_WORD = 0xFFFFFFFF
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # as the bits of a float32
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 that a normal number loses
_NORMAL = 2.0**-14  # the least normal float16, whose subnormals are multiples of _UNIT
_UNIT = 2.0**-24

_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define(
    "stochastic_round(Tensor x, Tensor like, Tensor seed, Tensor parameter, Tensor first, Tensor step) -> Tensor"
)
stochastic_round = torch.ops.npu_fused.stochastic_round.default
"""Round `x` to the dtype of `like`; elements are counted in the memory order of `like`, from number `first` on.

A number's distance from the one next to it towards 0, in 65536ths of that to the next one away from 0, and 16 random
bits are added: away from 0 where that gives 65536 or more. So probabilities are exact, but those of subnormal float16
numbers, which are rounded to 65536ths. Values beyond the largest finite number are rounded to nearest; a dtype that is
not of half precision is cast to.
"""


def philox(counter: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape, of numbers below 2**32.
        key: two such numbers.

    Returns:
        Four tensors of that kind.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c  # modulo 2**64, of which the bits count
        a, b, c, d = q >> 32 & _WORD ^ b ^ k, q & _WORD, p >> 32 & _WORD ^ d ^ m, p & _WORD
        k, m = k + 0x9E3779B9 & _WORD, m + 0xBB67AE85 & _WORD
    return [a, b, c, d]


def random_bits(first: int, count: int, seed: int, parameter: int, step: int) -> Tensor:
    """16 random bits for each element from number `first` on, as int32."""
    rows = torch.arange(first // ROW, -(-(first + count) // ROW), dtype=torch.int64, device="cpu")
    block = LANES * rows[:, None] + torch.arange(LANES, dtype=torch.int64, device="cpu")
    counts = [torch.full_like(block, step >> shift & _WORD) for shift in (0, 32)]
    words = philox([block & _WORD, block >> 32, *counts], (seed, parameter))
    halves = torch.stack([word >> shift & 0xFFFF for word in words for shift in (0, 16)], dim=1)
    return halves.flatten()[first % ROW :][:count].to(torch.int32)


def rounded(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers in half precision, each by 16 random bits."""
    word = x.view(torch.int32)
    magnitude = word & 0x7FFFFFFF
    dropped = _DROPPED[dtype]
    chosen = (magnitude + (noise >> 16 - dropped) & -1 << dropped).view(torch.float32)
    if dtype == torch.float16:
        units = magnitude.view(torch.float32) / _UNIT
        low = units.floor()
        carry = noise + ((units - low) * 65536).round() >= 65536
        small = (low + carry.to(torch.float32)) * _UNIT
        chosen = torch.where(units * _UNIT < _NORMAL, small, chosen)
    return torch.where(magnitude <= _LARGEST[dtype], chosen.copysign(x), x).to(dtype)


def _stochastic_round(x: Tensor, like: Tensor, seed: Tensor, parameter: Tensor, first: Tensor, step: Tensor) -> Tensor:
    if like.dtype not in _DROPPED:
        return x.to(like.dtype, copy=True)
    strides, count = memory_order([like]), like.numel()
    given = torch.empty_strided(like.shape, strides, dtype=torch.float32, device=x.device).copy_(x)
    made = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=x.device)
    noise = random_bits(int(first), count, int(seed), int(parameter), int(step)).to(x.device)
    made.as_strided((count,), (1,)).copy_(rounded(given.as_strided((count,), (1,)), noise, like.dtype))
    return made


_library.impl("stochastic_round", _stochastic_round, "CompositeExplicitAutograd")
torch.library.register_fake(
    "npu_fused::stochastic_round",
    lambda x, like, seed, parameter, first, step: torch.empty_like(x, dtype=like.dtype),
    lib=_library,
)
