"""Pickle a rule: by name where its module can be imported, else by value (notebook cells, scripts run as __main__)."""

from __future__ import annotations

import builtins
import dis
import importlib
import marshal
import pickle
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_fuse_pass.rules.declaration import Rule


def reduce_rule(rule: Rule) -> tuple[Any, ...]:
    """The `__reduce__` value of a rule."""
    module, qualname = rule.function.__module__, rule.function.__qualname__
    if module != "__main__" and _lookup(module, qualname) is rule:
        return _by_name, (module, qualname)
    fields = (
        _pack(rule.function),
        {n: (i.value, _pack(i.condition)) for n, i in rule.states.items()},
        dict(rule.defaults),
        {n: (_pack(t.function), t.over, _pack(t.condition)) for n, t in rule.totals.items()},
        rule.writes_grad,
    )
    return _from_value, fields


def _by_name(module: str, qualname: str) -> Any:
    importlib.import_module(module)
    return _lookup(module, qualname)


def _lookup(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _from_value(function: Any, states: Any, defaults: Any, totals: Any, writes_grad: bool) -> Rule:
    from npu_fuse_pass.rules.declaration import Init, Total, rule

    return rule(
        states={n: Init(value, _unpack(c)) for n, (value, c) in states.items()},
        defaults=defaults,
        totals={n: Total(_unpack(f), over, _unpack(c)) for n, (f, over, c) in totals.items()},
        writes_grad=writes_grad,
    )(_unpack(function))


def _pack(function: Callable[..., Any] | None) -> Any:
    """A picklable form of a plain function: its code, its defaults, and the globals and closure that it reads."""
    if function is None:
        return None
    if not isinstance(function, types.FunctionType):
        return ("pickle", function)
    if function.__module__ != "__main__" and _lookup(function.__module__, function.__qualname__) is function:
        return ("pickle", function)
    used = {n: _value(function.__globals__[n]) for n in _names(function.__code__) if n in function.__globals__}
    cells = tuple(_value(c.cell_contents) for c in function.__closure__ or ())
    defaults = (function.__defaults__, function.__kwdefaults__)
    return ("code", marshal.dumps(function.__code__), function.__name__, function.__module__, used, cells, defaults)


def _unpack(packed: Any) -> Any:
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
        return ("function", _pack(value))
    try:
        pickle.dumps(value)
    except Exception as e:
        raise pickle.PicklingError(f"the rule reads {value!r}, which cannot be pickled; pass it as a default") from e
    return ("value", value)


def _restore(packed: tuple[str, Any]) -> Any:
    kind, value = packed
    if kind == "module":
        return importlib.import_module(value)
    return _unpack(value) if kind == "function" else value


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(c) for c in inner))
