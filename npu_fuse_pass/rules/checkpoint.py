"""State dicts: what they show of the states, and what is refused when one is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules.batch import check_state
from npu_fuse_pass.rules.declaration import Declaration
from npu_fuse_pass.rules.state import ParamState


def compact(state_dict: Any) -> Any:
    """A copy of a state dict (or of any nest of dicts, lists and tuples) in which every tensor has memory of its own.

    `state_dict()` of an optimizer of this package gives views of buffers that many parameters share. torch.save writes
    such a buffer once, but whole, even for one state of it. Use this for saving one state alone, for keeping values
    that the next step changes, or for what refuses views (safetensors 0.8 takes those that do not overlap).

    Args:
        state_dict: what `opt.state_dict()` returned, or a part of it.

    Returns:
        The same nest, of plain dicts; tensors are clones with their shape, dtype, device and order in memory.
    """
    if isinstance(state_dict, Tensor):
        return state_dict.detach().clone()
    if isinstance(state_dict, dict):
        return {name: compact(value) for name, value in state_dict.items()}
    return type(state_dict)(map(compact, state_dict)) if type(state_dict) in (list, tuple) else state_dict


def aliases(entry: Any) -> Any:
    """A state entry as state dicts show it: tensors that share the states' memory; "step" is a float32 copy.

    An entry that is no parameter's is the user's, and is shown as it is.
    """
    return _with_float_step(entry, Tensor.detach)


def copied(entry: Any) -> Any:
    """The same with memory of its own; the user's entries are the user's to copy."""
    return _with_float_step(entry, lambda t: t.detach().clone())


def _with_float_step(entry: Any, shown: Callable[[Tensor], Tensor]) -> Any:
    if not isinstance(entry, ParamState):
        return entry
    found = {name: shown(v) if isinstance(v, Tensor) else v for name, v in dict.items(entry)}
    if isinstance(found.get("step"), Tensor):
        found["step"] = found["step"].float()
    return found


def torch_options(cls: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
    """The options that groups of a class of torch.optim hold, with its defaults.

    A state dict holds them beside our own, because torch.distributed.checkpoint reads into a torch optimizer only what
    has all of its options. Those that our classes lack have no effect at their defaults.
    """
    return dict(cls([torch.zeros(1, device="cpu")]).defaults)


@dataclasses.dataclass(frozen=True)
class Sealed:
    """A state on its way through torch's load_state_dict, which would round a tensor to the parameter's dtype."""

    tensor: Tensor


def sealed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose states torch's load_state_dict leaves alone."""

    def seal(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        return {name: Sealed(v) if isinstance(v, Tensor) else v for name, v in entry.items()}

    return {**state_dict, "state": {k: seal(entry) for k, entry in state_dict["state"].items()}}


def check_saved(rule: Declaration, settings: Mapping[str, Any], param: Tensor, entry: object, label: str) -> None:
    """Refuse the saved states of one parameter from which no step could go on.

    Args:
        rule: of the parameter's group.
        settings: the hyperparameters that the group will have.
        param: the parameter that they are for.
        entry: state name -> value.
        label: names the parameter in an error.

    Raises:
        ValueError: it is no mapping, is of another kind of optimizer, or `check_state` refuses it.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"the saved state of {label} is {entry!r}; allowed is a dict of states by name")
    present = {name: value for name, value in entry.items() if value is not None}
    names = rule.states_of(settings)
    if not present or not names:
        return
    held, expected = ", ".join(map(repr, present)), ", ".join(map(repr, names))
    if present.keys().isdisjoint({*names, "step"}):
        raise ValueError(f"the saved state of {label} has {held}, of another optimizer; {rule.name} keeps {expected}")
    check_state(rule, settings, param, present, label)
