"""Why a step that Dynamo traces as part of a function must run in a graph of its own: the values at the call count.

Dynamo carries out what a function does to Python objects (a group's lr, `opt.state`, `p.grad`) when the graph has run,
and a step reads such objects at the graph's beginning. Where the function has changed one that the step may read, the
graph has to end before the step: then all is carried out, the step reads it, and a graph of its own holds it.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Set
from typing import Any, Protocol

import torch
from torch import Tensor

from npu_fuse_pass.private_torch import need, storage_key
from npu_fuse_pass.rules.prelude import Prepared
from npu_fuse_pass.tensors.same import share_a_gradient
from npu_fuse_pass.tensors.sharded import is_dtensor

_KNOWN = ("npu_fuse_pass", "torch")  # whose functions read nothing that a training function changes
_NPU = "npu"
_LEAVES = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


class Keeping(Protocol):
    """What a rule optimizer keeps between its steps."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def state(self) -> Any: ...
    @property
    def _prelude(self) -> Prepared: ...

    found_inf: Tensor | None

    @property
    def has_hooks(self) -> bool: ...


def why_apart(optimizer: Keeping, surface: object, operation: object, handle: str) -> str:
    """What the function that is being traced has done before the step; "" where the step can be part of its graph.

    Args:
        surface: the object in which the step finds the optimizer's parameters.
        operation: the step in a graph, with `handle` as its last argument.
    """
    try:
        if any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"]):
            return "the parameters are DTensors, whose local parts a kernel takes"
        if share_a_gradient(p for group in optimizer.param_groups for p in group["params"]):
            return "two parameters have one gradient tensor, which torch would give both at later steps, too"
        tracer = need("torch._dynamo.symbolic_convert.InstructionTranslator.current_tx")()
        output = tracer.output
        _guard_identity(output.side_effects[surface])
        changed = _changed(optimizer, output.side_effects)
        if changed:
            return f"{changed[0]} was changed before it in the same function"
        if _touched(optimizer, output.graphargs):
            return "a state or a tensor hyperparameter of the optimizer is used before it in the same function"
        if tracer.one_graph:
            return ""  # what follows may be in one graph, if not as well
        steps = (n for n in output.graph.nodes if n.target is operation and n.args[-1] == handle)
        if next(steps, None) is not None:
            return "the optimizer steps before it in the same function"
        if optimizer.has_hooks:
            return "the step has hooks, which are Python"
        if optimizer.found_inf is not None and optimizer.found_inf.device.type == _NPU:
            return "step counters are in host memory, and found_inf is on an NPU"  # the step asks for it first
    except Exception as e:  # another torch may keep its notes elsewhere
        return f"this torch does not say what the function has changed before it ({e})"
    return ""


def _guard_identity(surface: Any) -> None:
    """Have Dynamo guard that a parameter which the function uses by another name, too, is one tensor by both.

    It leaves that out for what it finds through an optimizer, which is quicker with torch's own. `tracing` puts
    such guards back where this backend compiles; a step of these optimizers is in graphs of other backends, too.

    Args:
        surface: Dynamo's variable of the attribute through which the step finds its parameters.
    """
    through = surface.source.base
    if isinstance(through, need("torch._dynamo.source.OptimizerSource")):
        surface.source = dataclasses.replace(surface.source, base=through.base)


def reads_changed(optimizer: torch.optim.Optimizer, output: Any) -> bool:
    """True if the function that is being traced has changed what the optimizer reads. `output`: Dynamo's."""
    try:
        return bool(_changed(optimizer, output.side_effects))
    except Exception:  # another torch may keep its notes elsewhere; Dynamo then does what it does without this package
        return False


def _changed(optimizer: Keeping | torch.optim.Optimizer, effects: Any) -> list[str]:
    """Names of the objects and globals that were changed and that the optimizer may read."""
    new_global = need("torch._dynamo.variables.NewGlobalVariable")
    known = {id(var): at for at, var in effects.id_to_variable.items()}
    changed: dict[int | str, str] = {}
    for var in [*effects._get_modified_vars(), *effects.store_attr_mutations]:
        if var.source is None:
            continue  # made by the function itself
        names = list(effects.store_attr_mutations.get(var, ()))
        value = vars(var).get("value") if id(var) in known else var.value  # elsewhere a property may fail
        if isinstance(var, new_global) or isinstance(value, types.ModuleType):
            changed |= {name: name for name in names}
        else:
            changed[known.get(id(var), id(value))] = ".".join([_readable(var.source.name), *names[:1]])
    return [changed[at] for at in _reachable(optimizer, changed.keys())] if changed else []


def _readable(source: str) -> str:
    return re.sub(r"[GL]\['(\w+)'\]", r"\1", source)


def _reachable(optimizer: Keeping | torch.optim.Optimizer, wanted: Set[int | str]) -> Iterator[int | str]:
    """The objects, by id, and globals, by name, that a step may read.

    Those are what the optimizer and the methods of its classes refer to, directly or through other objects.
    """
    classes = itertools.takewhile(lambda c: c is not torch.optim.Optimizer, type(optimizer).__mro__)
    waiting: list[object] = [optimizer, *(x for c in classes for x in (*vars(c).values(), c))]
    seen: set[int] = set()
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if id(x) in wanted:
            yield id(x)
        if isinstance(x, types.FunctionType):
            if (x.__module__ or "").partition(".")[0] not in _KNOWN:
                read, found = _globals_of(x)
                yield from (at for at in read if at in wanted)
                waiting += [*found, *(x.__closure__ or ()), *(x.__defaults__ or ())]
        elif not isinstance(x, _LEAVES):
            waiting += gc.get_referents(x)


def _globals_of(function: types.FunctionType) -> tuple[set[int | str], list[object]]:
    """The global names that a function uses and, by id, where they stand; and what is there now.

    Attributes of modules are among them.
    """
    codes = [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [vars(m) for m in found if isinstance(m, types.ModuleType)]
    found += [values[name] for values in modules for name in names if name in values]
    return {*names, *map(id, (function.__globals__, *modules))}, found


def _touched(optimizer: Keeping, arguments: Any) -> bool:
    """True if an argument of the graph shares memory with a state or number of the optimizer."""
    entries = (entry for entry in dict.values(optimizer.state) if isinstance(entry, dict))
    states = (value for entry in entries for value in dict.values(entry) if isinstance(value, Tensor))
    kept = [*kept_outside(optimizer), *states]
    given = {_storage(a.example) for a in arguments if a.is_tensor and isinstance(a.example, Tensor)}
    return not given.isdisjoint(map(_storage, kept))


def kept_outside(optimizer: Keeping) -> list[Tensor]:
    """Tensors that a step reads or writes and that its graph does not have: states, counters, hyperparameters."""
    kept = [t for batch in optimizer._prelude.batches for t in (*batch.flat.values(), batch.steps)]
    values = [v for group in optimizer.param_groups for name, v in group.items() if name != "params"]
    listed = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [*kept, *(v for v in listed if isinstance(v, Tensor))]


def uses_kept(optimizer: Keeping, tensors: Iterable[Tensor]) -> bool:
    """True if any of these tensors shares memory with a state or number of the optimizer."""
    given = set(map(_storage, tensors))
    return bool(given) and not given.isdisjoint(map(_storage, kept_outside(optimizer)))


def _storage(t: Tensor) -> int:
    try:
        return storage_key(t.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return 0
