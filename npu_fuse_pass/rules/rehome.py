"""`flatten="params"`: parameters re-homed in one buffer, so that a kernel can take all of them as one tensor.

Only where an optimizer is asked to: a parameter becomes a view, and torch.save of a view stores the whole buffer.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from npu_fuse_pass.errors import OptionError
from npu_fuse_pass.tensors.buffers import views_of

_OWN = "give it memory of its own first: p.data = p.data.clone()"
_PLAIN_FORMATS = (0, 2, 30)  # ACL_FORMAT_NCHW, _ND and _NCDHW: elements lie as torch thinks


def check_option(flatten: object) -> None:
    """Refuse a value of the option `flatten` that is not allowed."""
    if flatten not in (None, "params"):
        raise OptionError(f'flatten={flatten!r}: allowed are None and "params"')


class Homes:
    """The buffers in which an optimizer's parameters live."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def settle(self, lists: Iterable[Sequence[Tensor]], everyone: Sequence[Tensor]) -> None:
        """Re-home the trainable parameters of each list: one buffer per dtype and device, where they are not adjacent.

        Args:
            lists: parameters that are updated together.
            everyone: all of the optimizer. Buffers in which none of them lives are dropped.

        Raises:
            OptionError: one of those that would move cannot; the message says which and why. Nothing is changed.
        """
        moving = [same for params in lists for same in _by_kind(params) if not _adjacent(same)]
        if not moving:
            return
        names = {id(p): f"parameter {i}" for i, p in enumerate(everyone)}
        for p in (p for same in moving for p in same):
            reason = _unusual(p) or self._foreign(p)
            if reason is not None:
                raise OptionError(f'flatten="params": {names[id(p)]} {reason}')
        _check_tied(everyone, names)
        for same in moving:
            self._move(same)
        inhabited = {_storage(p) for p in everyone}
        self._buffers = [b for b in self._buffers if _storage(b) in inhabited]

    def _move(self, params: Sequence[Tensor]) -> None:
        buffer = torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
        for p, view in zip(params, views_of(buffer, params), strict=True):
            p.data = view.copy_(p.detach())
        self._buffers.append(buffer)

    def _foreign(self, p: Tensor) -> str | None:
        if _storage(p) in map(_storage, self._buffers) or p.untyped_storage().nbytes() == p.nbytes:
            return None
        return f"is a view of another tensor; {_OWN}"


def npu_format(p: Tensor) -> int:
    """torch_npu's format number of a tensor: the order of its elements in memory; 2 on any other device."""
    return int(sys.modules["torch_npu"].get_npu_format(p)) if p.device.type == "npu" else 2


def _unusual(p: Tensor) -> str | None:
    if is_lazy(p):
        return "is not initialised yet"
    if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(p).__name__}, which does not hold its elements itself"
    if p.layout is not torch.strided or p.device.type == "meta":
        return f"has no elements to move: layout {p.layout}, device {p.device}"
    if any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
        return f"is expanded, so that several of its elements are one in memory; {_OWN}"
    if npu_format(p) not in _PLAIN_FORMATS:
        return f"has the private NPU format {npu_format(p)}; torch_npu.npu_format_cast(p, 2) makes it plain"
    return None


def _check_tied(everyone: Sequence[Tensor], names: dict[int, str]) -> None:
    distinct = [p for p in {id(p): p for p in everyone}.values() if _unusual(p) is None and p.numel()]
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, names[id(p)]) for p in distinct)
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            first, second = sorted((first, second))
            raise OptionError(f'flatten="params": {first} and {second} are tied: they share memory')


def _by_kind(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    kinds: dict[object, list[Tensor]] = {}
    for p in dict.fromkeys(params):  # once, however often it is listed
        if p.requires_grad and (is_lazy(p) or not p.is_inference()):  # which would lose its version counter
            kinds.setdefault((p.dtype, p.device), []).append(p)
    yield from kinds.values()


def _adjacent(params: Sequence[Tensor]) -> bool:
    """True if the parameters are adjacent in memory, in order; a single one always is."""
    if any(_unusual(p) is not None for p in params):
        return False
    pairs = itertools.pairwise(p for p in params if p.numel())
    return all(a.data_ptr() + a.nbytes == b.data_ptr() and _storage(a) == _storage(b) for a, b in pairs)


def _storage(p: Tensor) -> int:
    return p.untyped_storage().data_ptr()
