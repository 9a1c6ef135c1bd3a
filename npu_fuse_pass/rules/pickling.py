"""Functions in pickles: by name where their module can be imported, else by value (notebook cells, scripts)."""

from __future__ import annotations

import builtins
import dis
import importlib
import marshal
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any


def lookup(module: str, qualname: str) -> Any:
    """The object of this name in a loaded module; None if there is none."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def pack(function: Callable[..., Any] | None) -> Any:
    """A picklable form of a plain function: its code, its defaults, and the globals and closure that it reads."""
    if function is None:
        return None
    if not isinstance(function, types.FunctionType):
        return ("pickle", function)
    if function.__module__ != "__main__" and lookup(function.__module__, function.__qualname__) is function:
        return ("pickle", function)
    used = {n: _value(function.__globals__[n]) for n in _names(function.__code__) if n in function.__globals__}
    cells = tuple(_value(c.cell_contents) for c in function.__closure__ or ())
    defaults = (function.__defaults__, function.__kwdefaults__)
    return ("code", marshal.dumps(function.__code__), function.__name__, function.__module__, used, cells, defaults)


def unpack(packed: Any) -> Any:
    """The function that `pack` packed."""
    if packed is None or packed[0] == "pickle":
        return packed and packed[1]
    _, code, name, module, used, cells, (defaults, kwdefaults) = packed
    scope = {n: _restore(v) for n, v in used.items()}
    closure = tuple(types.CellType(_restore(v)) for v in cells)
    made = types.FunctionType(
        marshal.loads(code), {**scope, "__name__": module, "__builtins__": builtins}, name, defaults, closure
    )
    made.__kwdefaults__ = kwdefaults
    return made


def _value(value: object) -> Any:
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if isinstance(value, types.FunctionType):
        return ("function", pack(value))
    try:
        pickle.dumps(value)
    except Exception as e:
        raise pickle.PicklingError(f"the rule reads {value!r}, which cannot be pickled; pass it as a default") from e
    return ("value", value)


def _restore(packed: tuple[str, Any]) -> Any:
    kind, value = packed
    if kind == "module":
        return importlib.import_module(value)
    return unpack(value) if kind == "function" else value


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(c) for c in inner))
