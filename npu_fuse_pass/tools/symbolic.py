"""Python numbers in a step that Dynamo traces: symbolic where they change, instead of a compile for each value.

Dynamo makes an integer that changed symbolic, but fixes it again where `math.pow`, `math.log` or `math.exp` takes it:
it looks for torch._sym_pow and its like, which torch lacks (it has _sym_sqrt and others). They exist only
while a step of `compile_step` is called; other compiles do not see them. The same holds for a traceable context in the
place of one that Dynamo skips. Numbers that are known to change are symbolic from the first compile on, and Dynamo does
not write `capturable`, an option of torch's classes, into the groups of others, where its guards then fail.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import re
import threading
from collections.abc import Collection, Iterator
from typing import Any

import torch

from npu_fuse_pass.private_torch import find

_lock = threading.Lock()
_entered = 0


def _sym_pow(x: Any, y: Any) -> Any:
    """math.pow of symbolic numbers."""
    return torch.sym_float(x) ** torch.sym_float(y)


def _sym_log(x: Any, base: float = math.e) -> Any:
    """math.log of a symbolic number."""
    return _sym_log2(x) / math.log2(base)


def _sym_exp(x: Any) -> Any:
    """math.exp of a symbolic number."""
    return math.e ** torch.sym_float(x)


_changing: contextvars.ContextVar[Collection[str]] = contextvars.ContextVar("changing", default=())
_sym_log2, _utils = find("torch._sym_log2"), find("torch._dynamo.utils")
_entry_of, _auto_dynamic = _ENTRIES = (
    find("torch._dynamo.variables.builder.process_automatic_dynamic"),
    find("torch._dynamo.pgo.auto_dynamic"),
)
_set_capturable, _attribute_source, _variable, _lazy = _CAPTURABLE = (
    find("torch._dynamo.variables.OptimizerVariable._set_capturable"),
    find("torch._dynamo.source.AttrSource"),
    find("torch._dynamo.variables.VariableTracker"),
    find("torch._dynamo.variables.LazyVariableTracker"),
)


def _entry_as_if_changed(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
    """Dynamo's entry of an input; a number that is known to change is marked as changed."""
    found = _entry_of(tx, name, entry, **kwargs)
    if isinstance(found.scalar, (int, float)) and _is_known_to_change(tx, name, found.scalar):
        return dataclasses.replace(found, scalar=_auto_dynamic)
    return found


def _is_known_to_change(tx: Any, name: str, value: float) -> bool:
    """Of an input by Dynamo's name for it. A float variable after a break was computed before it, of those that do."""
    key = re.search(r"(^L)?\['(\w+)'\]$", name)
    if key is None:
        return False
    resumed = key[1] and isinstance(value, float) and tx.f_code.co_name.startswith("torch_dynamo_resume_in_")
    return bool(resumed) or key[2] in _changing.get()


def _set_capturable_where_known(self: Any, tx: Any) -> None:
    """Set `capturable` as torch does, but only in groups that have the option."""
    if any("capturable" in group for group in self.value.param_groups):
        _set_capturable(self, tx)
        return
    source = self.source and _attribute_source(self.source, "param_groups")
    built = _variable.build(tx, self.value.param_groups, source)
    _lazy.realize_all(built)


_MISSING = {"_sym_pow": _sym_pow, "_sym_exp": _sym_exp, **({"_sym_log": _sym_log} if _sym_log2 is not None else {})}
# Libraries that compile parts of their steps themselves lift torch's limit of compiles meanwhile, in a context that
# Dynamo skips; a step that is compiled as a whole has its own limit.
_MEANWHILE: list[tuple[Any, str, Any]] = [
    *((torch, name, function) for name, function in _MISSING.items() if not hasattr(torch, name))
]
if _utils is not None:
    _MEANWHILE.append((_utils, "disable_cache_limit", contextlib.nullcontext))
if None not in _ENTRIES:
    _MEANWHILE.append((find("torch._dynamo.variables.builder"), "process_automatic_dynamic", _entry_as_if_changed))
if None not in _CAPTURABLE:
    _MEANWHILE.append(
        (find("torch._dynamo.variables.OptimizerVariable"), "_set_capturable", _set_capturable_where_known)
    )
_BEFORE = [getattr(module, name, None) for module, name, _ in _MEANWHILE]


@contextlib.contextmanager
def symbolic_numbers(changing: Collection[str] = ()) -> Iterator[None]:
    """Keep `math`'s functions of changing numbers in the graph: a context around compiles.

    Args:
        changing: keys in groups and states whose numbers are symbolic from the first compile on.
    """
    global _entered
    token = _changing.set(changing)
    with _lock:
        _entered += 1
        if _entered == 1:
            for module, name, function in _MEANWHILE:
                setattr(module, name, function)
    try:
        yield
    finally:
        _changing.reset(token)
        with _lock:
            _entered -= 1
            if not _entered:
                for (module, name, _), before in zip(_MEANWHILE, _BEFORE, strict=True):
                    if before is None:
                        delattr(module, name)
                    else:
                        setattr(module, name, before)


def reading_numbers() -> contextlib.AbstractContextManager[None]:
    """Keep numbers read by `item()` in the graph instead of breaking it: a context, for compiles of this thread.

    Dynamo's own check of what it assumes of such numbers is off: it cannot write a quotient of two of them, and fails.
    `torch._check` of a number is a node of the graph, and stays.
    """
    patch = find("torch._dynamo.config.patch")
    options = ("torch._dynamo.config.capture_scalar_outputs", "torch._dynamo.config.do_not_emit_runtime_asserts")
    known = {name.rpartition(".")[2]: True for name in options if find(name) is not None}
    return contextlib.nullcontext() if patch is None else patch(**known)
