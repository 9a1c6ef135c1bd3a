"""What the peers do in a step on an NPU: the operations of their own code, counted while it runs on meta tensors.

torch_npu.optim's classes are the installed wheel's; only what re-homes tensors on an NPU is replaced. torch.optim's
foreach form is torch's; torch_npu splits its lists. Its fused forms are C++: what they launch is written down here.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from npu_model import Work, eager
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")
_LIST_TENSORS = 48  # op-plugin, ForeachConstants.h: 48, 24, 16, 12 tensors per launch for one to four lists


class Counting(TorchDispatchMode):
    """Notes every launch: name, bytes read and written. A tensor that is given twice is read once.

    Tensors without dimensions that are not on the meta device belong to the host, and so do operations on them alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[tuple[str, int]] = []
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in given):
            return func(*args, **(kwargs or {}))
        if name == "aten::_local_scalar_dense":  # a norm that is not 0, for whoever asks
            self.syncs += 1
            return False
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if name.startswith("aten::_foreach"):
                lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
                self._note_lists(name, [*lists, *([out] if out is not None else [])], in_place=out is None)
            else:
                self._note(name, given[1:] if name in _OVERWRITES else given, results)
        return out

    def _note(self, name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        size = sum(_bytes(t) for t in {id(t): t for t in read}.values()) + sum(map(_bytes, written))
        self.launches.append((name.removeprefix("aten::"), size))

    def _note_lists(self, name: str, lists: Sequence[Sequence[Tensor]], in_place: bool) -> None:
        at_once = _LIST_TENSORS // len(lists)
        for begin in range(0, len(lists[0]), at_once):
            chunk = [t[begin : begin + at_once] for t in lists]
            self._note(name, [t for ts in chunk for t in ts], chunk[0] if in_place else [])


def _bytes(t: Tensor) -> int:
    return t.numel() * t.itemsize


def counted(optimizer: Any) -> Counting:
    """The third step of an optimizer, whose first two make its states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            found = Counting()
            with found:
                optimizer.step()
    return found


def meta_parameters(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """With gradients."""
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def torch_npu_optim(name: str, shapes: Sequence[tuple[int, ...]], **options: Any) -> Work:
    """A class of torch_npu.optim; needs torch_npu to be importable."""
    with _on_meta():
        optimizer = getattr(importlib.import_module("torch_npu.optim"), name)(meta_parameters(shapes), **options)
        found = counted(optimizer)
    return eager([size for _, size in found.launches], found.syncs)


def foreach(name: str, shapes: Sequence[tuple[int, ...]], **options: Any) -> Work:
    """torch.optim's class with foreach=True, eager."""
    found = counted(getattr(torch.optim, name)(meta_parameters(shapes), foreach=True, **options))
    return eager([size for _, size in found.launches], found.syncs)


def _one_by_one(shapes: Sequence[tuple[int, ...]]) -> Work:
    return eager([28 * torch.Size(s).numel() for s in shapes])


def _all_at_once(shapes: Sequence[tuple[int, ...]]) -> Work:
    return eager([20 * sum(torch.Size(s).numel() for s in shapes)])


# torch.optim's class -> what fused=True launches with float32, or why there is nothing to model, and the source.
# The launches that advance the step counters (one or two per tensor) are left out, in the peer's favour.
FUSED: dict[str, tuple[Callable[[Sequence[tuple[int, ...]]], Work] | None, str]] = {
    "Adam": (
        None,
        "torch_npu 2.13 moves everything to the host and back below Ascend950: op-plugin, FusedAdamKernelNpuOpApi.cpp",
    ),
    "AdamW": (_one_by_one, "one aclnnApplyAdamWV2 per tensor: op-plugin, FusedAdamWKernelNpuOpApi.cpp"),
    "SGD": (
        _all_at_once,
        "one aclnnFusedSgd for all tensors, with momentum: op-plugin; ops-nn, aclnnFusedSgd (A2, A3)",
    ),
}


class _WithoutNpu(TorchFunctionMode):
    """`.to("npu")` stays where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.to and "npu" in args[1:] else func(*args, **(kwargs or {}))


@contextmanager
def _on_meta() -> Iterator[None]:
    """torch_npu.optim's classes take meta tensors inside the block; one large tensor stands for many, as on an NPU."""
    torch_npu = importlib.import_module("torch_npu")
    importlib.import_module("torch_npu.optim")

    def combined(tensors: Sequence[Tensor], require_copy_value: bool = True) -> Tensor | None:
        return torch.empty(sum(t.numel() for t in tensors), device="meta") if tensors else None

    def part(whole: Tensor | None, begin: int, size: int) -> Tensor | None:
        return None if whole is None or size == 0 else torch.empty(size, device="meta")

    instead = {"npu_combine_tensors": combined, "get_part_combined_tensor": part}
    modules = [m for n, m in sys.modules.items() if n.startswith("torch_npu.optim.")]
    found = [(m, n) for m in modules for n in instead if hasattr(m, n)]
    with _WithoutNpu(), mock.patch.object(torch_npu, "get_npu_format", return_value=2):
        patches = [mock.patch.object(m, n, instead[n]) for m, n in found]
        for p in patches:
            p.start()
        try:
            yield
        finally:
            for p in patches:
                p.stop()
