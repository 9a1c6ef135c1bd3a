"""The states of a torch.optim optimizer as objects, and the check that they are still the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.rules.prelude import InputCheck
from npu_fuse_pass.tensors.buffers import views_of
from npu_fuse_pass.tensors.same import same_objects
from npu_fuse_pass.tensors.sharded import alike, local

States = Mapping[Tensor, dict[str, Any]]

_SMALL = 1 << 16  # bytes of a state
_JOINED = 1 << 18  # bytes in one memory


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


def join_small(entries: Sequence[dict[str, Any]]) -> None:
    """Put new states that are small side by side in memory, as a step goes through them.

    They stay tensors of their own. Not large ones, where nothing is gained, nor very many in one memory: what copies or
    saves one tensor of them alone takes the whole memory.
    """
    found: defaultdict[tuple[object, ...], list[tuple[dict[str, Any], str]]] = defaultdict(list)
    taken: Counter[object] = Counter()
    for entry in entries:
        for name, value in entry.items():
            if _joins(value):
                kind = name, value.dtype
                found[kind, taken[kind] // _JOINED].append((entry, name))
                taken[kind] += value.nbytes
    joined: list[tuple[tuple[dict[str, Any], str], Tensor]] = []
    for places in found.values():
        values = [entry[name] for entry, name in places]
        memory = values[0].new_empty(sum(v.numel() for v in values))
        joined += zip(places, views_of(memory, values), strict=True)
    for (entry, name), view in joined:  # all of them made first: their objects are then side by side as well
        entry[name] = view.copy_(entry[name]).data


def _joins(value: object) -> bool:
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
