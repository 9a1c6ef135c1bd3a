"""Python's own numbers in a step that Dynamo traces: symbolic where they change, instead of a compile for each value.

Dynamo makes an integer that changed symbolic, but fixes it again where `math.pow`, `math.log` or `math.exp` takes it:
it looks for torch._sym_pow and its like, which torch lacks (it has _sym_sqrt and others). They are there while a step
that `compile_step` made is called, and only then: other compiles do not meet them. So is a context in the place of one
that Dynamo does not look into.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock = threading.Lock()
_entered = 0


def _sym_pow(x: Any, y: Any) -> Any:
    """math.pow of symbolic numbers."""
    return torch.sym_float(x) ** torch.sym_float(y)


def _sym_log(x: Any, base: float = math.e) -> Any:
    """math.log of a symbolic number."""
    return torch._sym_log2(x) / math.log2(base)  # type: ignore[attr-defined]


def _sym_exp(x: Any) -> Any:
    """math.exp of a symbolic number."""
    return math.e ** torch.sym_float(x)


_MISSING = {"_sym_pow": _sym_pow, "_sym_log": _sym_log, "_sym_exp": _sym_exp}
# Libraries that compile parts of their steps themselves lift torch's limit of compiles meanwhile, in a context that
# Dynamo does not look into; a step that is compiled as a whole has a limit of its own.
_MEANWHILE: list[tuple[Any, str, Any]] = [
    *((torch, name, function) for name, function in _MISSING.items() if not hasattr(torch, name)),
    (torch._dynamo.utils, "disable_cache_limit", contextlib.nullcontext),
]
_BEFORE = [getattr(module, name, None) for module, name, _ in _MEANWHILE]


@contextlib.contextmanager
def symbolic_numbers() -> Iterator[None]:
    """While inside, a compile keeps `math`'s functions of changing numbers in the graph."""
    global _entered
    with _lock:
        _entered += 1
        if _entered == 1:
            for module, name, function in _MEANWHILE:
                setattr(module, name, function)
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                for (module, name, _), before in zip(_MEANWHILE, _BEFORE, strict=True):
                    if before is None:
                        delattr(module, name)
                    else:
                        setattr(module, name, before)


def reading_numbers() -> contextlib.AbstractContextManager[None]:
    """While inside, a compile of this thread keeps numbers that `item()` reads in the graph, instead of ending it.

    Dynamo's own check of what it assumes of such numbers is off: it cannot write a quotient of two of them, and fails.
    `torch._check` of a number is a node of the graph, and stays.
    """
    return torch._dynamo.config.patch(capture_scalar_outputs=True, do_not_emit_runtime_asserts=True)  # type: ignore[no-any-return]
