"""`opt.state`: parameter -> name -> value, to read and to change as torch.optim's.

Whatever is put in or taken out, or given other memory (`.data =`, `resize_`), counts at the next step, which brings it
into the flat buffers. Dynamo leaves all of it to Python: the graph of a compiled function ends where it uses a state.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from npu_fuse_pass.tensors.memory import place

F = TypeVar("F", bound=Callable[..., Any])


def _in_python(method: F) -> F:
    reason = "npu_fused: opt.state is read or changed here, which Python has to do: states are kept outside of graphs"
    takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8
    made: F = torch.compiler.disable(method, reason=reason) if takes_reason else torch.compiler.disable(method)
    return made


class Changes:
    """What happens to an optimizer's states outside of its steps.

    Attributes:
        made: something was put in or taken out since this was last False.
        reader: who has called `forget` last; optimizers may share their states (`other.state = opt.state`).
        joined: what notes the same for both, once an entry of one optimizer is another's, too.
    """

    def __init__(self) -> None:
        self.made = True
        self.reader: object = None
        self.joined: Changes | None = None
        self._handed_out: dict[int, tuple[Tensor, tuple[object, ...]]] = {}

    def hand_out(self, value: object) -> None:
        """Record the memory of a tensor that the caller may keep."""
        if isinstance(value, Tensor) and id(value) not in self._handed_out:
            self._handed_out[id(value)] = (value, place(value))

    def forget(self, reader: object) -> None:
        """Forget all records; nothing counts as changed any more to `reader`."""
        self.reader = reader
        self._handed_out.clear()
        self.made = False

    @property
    def moved(self) -> bool:
        """True if a tensor that was handed out has other memory now."""
        return any(place(value) != memory for value, memory in self._handed_out.values())


class _Noting(dict[Any, Any]):
    """A dict that notes when it is changed."""

    _changes: Changes

    @property
    def changes(self) -> Changes:
        while self._changes.joined is not None:
            self._changes = self._changes.joined
        return self._changes

    def _note_change(self) -> None:
        self.changes.made = True

    @_in_python
    def update(self, *args: Any, **named: Any) -> None:
        for key, value in dict(*args, **named).items():
            self[key] = value

    @_in_python
    def setdefault(self, key: Any, default: Any = None) -> Any:
        if not dict.__contains__(self, key):
            self[key] = default
        return self[key]

    @_in_python
    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self


def _as_dict(cls: type[Any], names: str, then: Callable[[Any], None] = lambda self: None) -> None:
    """Give a class dict's methods of these names, in Python; `then`: what follows each call."""

    def made(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            result = method(self, *args)
            then(self)
            return result

        return _in_python(call)

    for name in names.split():
        setattr(cls, name, made(getattr(dict, name)))


_as_dict(_Noting, "__setitem__ __delitem__ clear pop popitem", _Noting._note_change)
# what only looks: a graph that holds a step would be asked for what was there before it
_as_dict(_Noting, "__contains__ __iter__ __len__ __getitem__ get keys values items")


class ParamState(_Noting):
    """State of one parameter. Tensors are views of flat buffers; what is assigned is copied there by the next step.

    Attributes:
        read: its values were handed out.
    """

    def __init__(self, entry: Mapping[str, Any], changes: Changes) -> None:
        dict.__init__(self, entry)
        self._changes = changes
        self.read = False

    def take(self, entry: Mapping[str, Any]) -> None:
        """What the optimizer itself puts in."""
        dict.update(self, entry)
        if self.read:
            self._hand_out()

    def present(self) -> dict[str, Any]:
        """The values that are not None, for the optimizer itself."""
        return {name: value for name, value in dict.items(self) if value is not None}

    def _hand_out(self) -> None:
        self.read = True
        for value in dict.values(self):
            self.changes.hand_out(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


# dict(entry) and {**entry} ask for every value, because __iter__ is not dict's own
_as_dict(ParamState, "__getitem__ get values items copy", ParamState._hand_out)


class States(_Noting, defaultdict[Tensor, Any]):
    """All of them; an entry that is not there is made when it is asked for, as in torch.optim.

    What stands at other keys than parameters (`opt.state["epoch"] = 3`) is the user's, and stays what it is.
    """

    def __init__(self, entries: Mapping[Tensor, Mapping[str, Any]] | None = None) -> None:
        super().__init__()
        self.default_factory = dict
        self._changes = Changes()
        for param, entry in (entries or {}).items():
            self[param] = entry

    @_in_python
    def __setitem__(self, param: Tensor, entry: Mapping[str, Any]) -> None:
        """Put in an entry: the object itself if it is an optimizer's and stands for no other parameter here.

        Where it is another optimizer's, what either writes counts for both, as in torch.optim.
        """
        if not isinstance(param, Tensor):
            super().__setitem__(param, entry)
            return
        others = (other for key, other in dict.items(self) if key is not param)
        if not isinstance(entry, ParamState) or any(entry is other for other in others):
            entry = ParamState(entry, self.changes)
        elif entry.changes is not self.changes:
            self.changes.joined = entry.changes
        super().__setitem__(param, entry)

    @_in_python
    def __missing__(self, param: Tensor) -> Any:
        return self.entry(param) if isinstance(param, Tensor) else super().__missing__(param)

    def entry(self, param: Tensor) -> ParamState:
        """A parameter's entry; an empty one changes nothing."""
        if not dict.__contains__(self, param):
            dict.__setitem__(self, param, ParamState({}, self.changes))
        made: ParamState = dict.__getitem__(self, param)
        return made

    def copy(self) -> Any:
        return defaultdict(dict, self)

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))
