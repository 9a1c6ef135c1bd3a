"""GE operations that move elements: array_ops.h, split_combination_ops.h, selection_ops.h, for `kernels`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from training_kernels import one_dtype

if TYPE_CHECKING:
    from interpreter import Node


def axes_of(tensor: Tensor) -> list[int]:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError("axes must be int32 or int64")
    return [int(axis) for axis in tensor.reshape(-1)]


def concat(node: Node, tensors: Sequence[Tensor], axis: int) -> list[Tensor]:
    if node.integer("N", 1) != len(tensors):
        raise ValueError(f"N is {node.integer('N', 1)}, {len(tensors)} tensors were given")
    one_dtype(tensors)
    return [torch.cat(list(tensors), dim=axis)]


def pack(node: Node) -> list[Tensor]:
    tensors = node.tensors()
    one_dtype(tensors)
    if node.integer("N") != len(tensors):
        raise ValueError(f"N is {node.integer('N')}, {len(tensors)} tensors were given")
    return [torch.stack(tensors, dim=node.integer("axis", 0))]


def unpack(node: Node) -> list[Tensor]:
    (x,) = node.tensors()
    parts = list(torch.unbind(x, dim=node.integer("axis", 0)))
    if len(parts) != node.integer("num"):
        raise ValueError(f"num is {node.integer('num')}, the axis has {len(parts)}")
    return parts


def split_equally(node: Node, x: Tensor, axis: int) -> list[Tensor]:
    count = node.integer("num_split")
    if x.shape[axis] % count:
        raise ValueError(f"an axis of {x.shape[axis]} does not split in {count}")
    return list(torch.tensor_split(x, count, dim=axis))


def split_sizes(node: Node, x: Tensor, sizes: list[int], axis: int) -> list[Tensor]:
    """One size may be -1: what is left."""
    if len(sizes) != node.integer("num_split"):
        raise ValueError(f"num_split is {node.integer('num_split')}, {len(sizes)} sizes were given")
    rest = x.shape[axis] - sum(size for size in sizes if size != -1)
    return list(torch.split(x, [rest if size == -1 else size for size in sizes], dim=axis))


def slice_(x: Tensor, offsets: list[int], sizes: list[int]) -> list[Tensor]:
    """TensorFlow's slice: size -1 means up to the end."""
    if not len(offsets) == len(sizes) == x.dim():
        raise ValueError("offsets and size must have one entry per axis")
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        length = x.shape[axis] - offset if size == -1 else size
        x = x.narrow(axis, offset, length)
    return [x.contiguous()]


def strided_slice(node: Node) -> list[Tensor]:
    """Without masks: negative places count from the end, and those beyond it are the end."""
    x, begin, end, axes, strides = node.tensors()
    for mask in ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask"):
        if node.integer(mask, 0):
            raise ValueError(f"{mask} is not implemented")
    index = [slice(None)] * x.dim()
    for axis, *ends in zip(*map(axes_of, (axes, begin, end, strides)), strict=True):
        index[axis] = slice(*ends)
    return [x[tuple(index)].contiguous()]


def reshape(node: Node) -> list[Tensor]:
    x, shape = node.tensors()
    return [x.reshape(axes_of(shape))]


KERNELS: dict[str, Callable[[Node], Sequence[Tensor]]] = {
    "Reshape": reshape,
    "Transpose": lambda node: [node.tensors()[0].permute(axes_of(node.tensors()[1])).contiguous()],
    "BroadcastTo": lambda node: [node.tensors()[0].expand(axes_of(node.tensors()[1])).contiguous()],
    "Fill": lambda node: [node.tensors()[1].expand(axes_of(node.tensors()[0])).contiguous()],
    "Concat": lambda node: concat(node, node.tensors()[1:], axes_of(node.tensors()[0])[0]),
    "ConcatV2": lambda node: concat(node, node.tensors()[:-1], axes_of(node.tensors()[-1])[0]),
    "ConcatD": lambda node: concat(node, node.tensors(), node.integer("concat_dim")),
    "ConcatV2D": lambda node: concat(node, node.tensors(), node.integer("concat_dim")),
    "Pack": pack,
    "Unpack": unpack,
    "Split": lambda node: split_equally(node, node.tensors()[1], axes_of(node.tensors()[0])[0]),
    "SplitD": lambda node: split_equally(node, node.tensors()[0], node.integer("split_dim")),
    "SplitV": lambda node: split_sizes(
        node, node.tensors()[0], axes_of(node.tensors()[1]), axes_of(node.tensors()[2])[0]
    ),
    "SplitVD": lambda node: split_sizes(
        node, node.tensors()[0], node.integers("size_splits"), node.integer("split_dim")
    ),
    "Slice": lambda node: slice_(node.tensors()[0], axes_of(node.tensors()[1]), axes_of(node.tensors()[2])),
    "StridedSliceV2": strided_slice,
    "SliceD": lambda node: slice_(node.tensors()[0], node.integers("offsets"), node.integers("size")),
}
