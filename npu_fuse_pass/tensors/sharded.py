"""Parameters that are spread over processes: DTensors (FSDP2's fully_shard, tensor parallel) and FSDP1's flat shards.

A rule without norms updates the elements that this process holds; a DTensor shows where they are. Nothing here
communicates but `local_part`, where a tensor is laid out in another way than its parameter.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(t: object) -> TypeIs[DTensor]:
    """True for a torch.distributed.tensor.DTensor; does not import torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def sharding(param: Tensor) -> str | None:
    """How a parameter is spread: "flat shard" (FSDP1), "shard" or "replica" (DTensors); None: not at all."""
    if is_dtensor(param):
        return "replica" if all(p.is_replicate() for p in param.placements) else "shard"
    return "flat shard" if getattr(param, "_fsdp_flattened", False) and param.ndim < 2 else None


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """The elements that this process holds, in the same memory; a tensor that is no DTensor itself."""
    if not is_dtensor(t):
        return t
    held: Tensor | None = getattr(t, "_local_tensor", None)  # the object itself: to_local() makes one at each call
    if held is None:
        held = t.detach().to_local()  # type: ignore[attr-defined]
    return held.wait() if hasattr(held, "wait") else held


@torch.no_grad()
def local_part(param: Tensor, t: Tensor | None) -> Tensor | None:
    """Of a gradient or a state: the part that belongs to the elements of `param` that this process holds.

    Args:
        t: a DTensor if `param` is one; None stays None.
    """
    if t is None or not is_dtensor(param):
        return t
    given: Any = t
    if given.placements != param.placements:
        given = given.redistribute(placements=param.placements)
    return local(given)


def across(param: Tensor) -> tuple[Any, ...]:
    """The process groups over which a DTensor's elements are spread: one for each dimension of the mesh that shards."""
    if not is_dtensor(param):
        return ()
    return tuple(param.device_mesh.get_group(d) for d, p in enumerate(param.placements) if not p.is_replicate())


def first_element(param: Tensor) -> int:
    """The number of the first element that this process holds; replicas have the same.

    Of a tensor that is sharded by its first dimension alone that is its place in the whole; shards of other kinds are
    numbered far apart from each other.
    """
    if not is_dtensor(param) or (coordinate := param.device_mesh.get_coordinate()) is None:  # or nothing is held here
        return 0
    shards = [d for d, p in enumerate(param.placements) if not p.is_replicate()]
    if len(shards) == 1 and param.placements[shards[0]].is_shard(0):
        rows = -(-param.shape[0] // param.device_mesh.size(shards[0])) * int(coordinate[shards[0]])
        return int(min(rows, param.shape[0]) * math.prod(param.shape[1:]))
    place = 0
    for d in shards:
        place = place * int(param.device_mesh.size(d)) + int(coordinate[d])
    return place << 40


def holds_values(t: Any) -> bool:
    """True if a DTensor's local part holds elements of it, not partial sums."""
    return not any(p.is_partial() for p in t.placements)


def alike(param: Tensor, t: Tensor) -> bool:
    """True if a gradient or state is sharded as its parameter is, or neither is sharded."""
    if not is_dtensor(param) or not is_dtensor(t):
        return is_dtensor(param) == is_dtensor(t)
    return bool(t.device_mesh == param.device_mesh and t.placements == param.placements)


@torch.no_grad()
def as_dtensor(held: Tensor, param: Any) -> Tensor:
    """The DTensor of which this process holds these elements, laid out as `param`."""
    from torch.distributed.tensor import DTensor

    whole = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(_from_start(held), param.device_mesh, param.placements, run_check=False, **whole)


def _from_start(t: Tensor) -> Tensor:
    """The same memory in a storage that begins with the tensor.

    A DTensor takes over the offset of what it wraps, and with one its data_ptr() is not 0, by which copy.deepcopy knows
    a tensor without memory of its own.
    """
    if not t.storage_offset():
        return t
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    start = t.storage_offset() * t.itemsize
    piece: Any = t.untyped_storage()[start : start + extent * t.itemsize]
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(piece, 0, t.shape, t.stride())
