"""The states of a torch.optim optimizer as objects, and the check that they are still the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

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
        self._unchanged: Callable[[], bool] | None = None

    def check_natively(self, check: InputCheck) -> None:
        """Check natively from now on, if the library is there."""
        if self._unchanged is None:
            self._unchanged = check.dict_check([self._state, *self._entries])

    def learn(self, state: States) -> None:
        """Remember these entries."""
        self._unchanged = None
        self._state, self._keys, self._entries = state, list(state), list(state.values())
        self._values = _values(self._entries)

    def same(self, state: States) -> bool:
        """True if no entry was added, removed or exchanged."""
        if self._unchanged is not None:
            return state is self._state and self._unchanged()
        return (
            state is self._state
            and same_objects(state, self._keys)
            and same_objects(state.values(), self._entries)
            and same_objects(_values(self._entries), self._values)
        )


def put_in_order(entries: Sequence[dict[str, Any]]) -> None:
    """Give new states that are small other memory, in the order in which a step goes through them.

    Each has memory of its own, which its owner may resize or release.
    """
    names = dict.fromkeys(name for entry in entries for name in entry)
    small = [(entry, name) for name in names for entry in entries if _is_small(entry.get(name))]
    # the tensors themselves, then what they hold: a step reads both; nothing goes into a gap that an old one has left
    new = [(entry, name, entry[name].new_empty(0)) for entry, name in small]
    for entry, name, value in new:
        value.resize_(entry[name].shape).copy_(entry[name])
    for entry, name, value in new:
        entry[name] = value


def _is_small(value: object) -> bool:
    return type(value) is Tensor and value.device.type == "cpu" and value.is_contiguous() and 0 < value.nbytes <= _SMALL


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
