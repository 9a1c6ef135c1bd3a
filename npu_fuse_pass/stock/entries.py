"""The states of a torch.optim optimizer as objects, and the check that they are still the same."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.private_torch import find
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.rules.prelude import InputCheck
from npu_fuse_pass.tensors.same import same_objects
from npu_fuse_pass.tensors.sharded import alike, local

States = Mapping[Tensor, dict[str, Any]]

_SMALL = 1 << 16  # bytes of a state


class Entries:
    """Remembers `opt.state`: the dict, its entries, and what is in each, by identity."""

    def __init__(self) -> None:
        self._state: Any = None
        self._keys: list[Tensor] = []
        self._entries: list[dict[str, Any]] = []
        self._values: list[Any] = []
        self._watched: object = None

    def watched(self, state: States) -> object:
        """What native checks compare in the place of `same`; None: nothing, or this is another dict.

        Kept here, not by the checks: those outlive what was learned, and it holds all states.
        """
        return self._watched if state is self._state else None

    def watch(self, check: InputCheck) -> None:
        """Have native checks compare what was learned."""
        if self._watched is None:
            self._watched = check.watched([self._state, *self._entries])

    def learn(self, state: States) -> None:
        """Remember these entries."""
        self._watched = None
        self._state, self._keys, self._entries = state, list(state), list(state.values())
        self._values = _values(self._entries)

    def same(self, state: States) -> bool:
        """True if no entry was added, removed or exchanged."""
        return (
            state is self._state
            and same_objects(state, self._keys)
            and same_objects(state.values(), self._entries)
            and same_objects(_values(self._entries), self._values)
        )


def put_in_order(entries: Sequence[dict[str, Any]]) -> None:
    """Give small states that nothing else holds other memory, in the order in which a step goes through them.

    Each has memory of its own, which its owner may resize or release.
    """
    if _tensor_owners is None or _memory_owners is None or torch.is_inference_mode_enabled():
        return  # in that mode copies would be tensors that nothing outside of it may write
    names = dict.fromkeys(name for entry in entries for name in entry)
    alone = _owners({"": torch.empty(0, device="cpu")}, "")
    pairs = [(entry, name) for name in names for entry in entries if _can_be_copied(entry.get(name))]
    # the tensors themselves, then what they hold: a step reads both; nothing goes into a gap that an old one has left
    new = [(entry, name, entry[name].new_empty(0)) for entry, name in pairs if _owners(entry, name) == alone]
    for entry, name, value in new:
        value.resize_(entry[name].shape).copy_(entry[name])
    for entry, name, value in new:
        entry[name] = value


def _can_be_copied(value: object) -> bool:
    """True for a small tensor of which a copy has all that it has."""
    if type(value) is not Tensor or value.device.type != "cpu" or value.requires_grad or value.is_inference():
        return False
    return value.is_contiguous() and 0 < value.nbytes <= _SMALL and not value.is_shared() and not vars(value)


def _owners(entry: dict[str, Any], name: str) -> object:
    """How often a state is held: as an object, weakly, as a tensor, as memory; and whether that is torch's own memory.

    That of a NumPy array or a buffer has owners that torch does not count. What torch.load reads looks the same.
    """
    value = entry[name]
    memory = value.untyped_storage()
    objects = sys.getrefcount(value), weakref.getweakrefcount(value), sys.getrefcount(memory)
    return *objects, _tensor_owners(value), _memory_owners(memory._cdata), memory.resizable()


_tensor_owners = find("torch.Tensor._use_count")
_memory_owners = find("torch._C._storage_Use_Count")


def _values(entries: Iterable[dict[str, Any]]) -> list[Any]:
    return [value for entry in entries for value in dict.values(entry)]


def refused_state(param: Tensor, name: str, value: object, label: str) -> Reason | None:
    """Why a state is not of the kind that torch makes."""
    wanted = f"a {param.dtype} tensor of shape {tuple(param.shape)}"
    if not isinstance(value, Tensor) or not alike(param, value) or type(local(value)) is not Tensor:
        return Code.NO_RULE(f"the state {name!r} of {label} is not {wanted}, distributed as its parameter is")
    if value.layout != param.layout or value.device != param.device:
        return Code.NO_RULE(f"the state {name!r} of {label} is not {wanted}")
    if value.dtype != param.dtype or value.shape != param.shape:
        return Code.NO_RULE(f"the state {name!r} of {label} is {value.dtype} of shape {tuple(value.shape)}")
    return None
