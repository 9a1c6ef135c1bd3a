"""The JSON schema of `CompileReport.to_json()`, made from its dataclasses: their fields, types and documentation.

`python -m npu_fuse_pass.report.schema` prints it.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from typing import Any

from npu_fuse_pass.reasons import Reason
from npu_fuse_pass.report.report import CompileReport, GroupReport, KernelMatch

# schema details that types do not express
_ALSO: dict[tuple[type, str], dict[str, Any]] = {
    (CompileReport, "platform"): {"enum": ["auto", "cpu", "npu", "eager", "graph", "graph cpu"]},
    (CompileReport, "seconds"): {"propertyNames": {"enum": ["capture", "group", "match", "lower"]}},
    (CompileReport, "bytes_per_element"): {
        "propertyNames": {"enum": ["before", "after"]},
        "dependentRequired": {"before": ["after"], "after": ["before"]},
    },
    (CompileReport, "unfused"): {"items": {"$ref": "#/$defs/Unfused"}},
    (GroupReport, "updates"): {"minimum": 1},
    (GroupReport, "lowering"): {"enum": ["cpu", "npu", "graph", "interpreter", "eager"]},
    (GroupReport, "writes"): {"enum": ["leaves", "temporaries"]},
}
_DERIVED = {CompileReport: ["bytes_per_element", "fallback", "reasons", "remedies"], GroupReport: ["match", "no_match"]}


@dataclasses.dataclass
class Unfused:
    """An operation that stays as it is; `reasons` has the details."""

    op: str
    reason: str


def schema() -> dict[str, Any]:
    """The schema, as draft 2020-12."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "CompileReport.to_json()"}
    parts = {cls.__name__: _object(cls) for cls in (GroupReport, KernelMatch, Reason, Unfused)}
    return {**head, **_object(CompileReport), "$defs": parts}


def _object(cls: type) -> dict[str, Any]:
    documented = dict(re.findall(r"^    (\w+): (.+(?:\n     .+)*)$", inspect.getdoc(cls) or "", re.MULTILINE))
    fields = {name: t for name, t in typing.get_type_hints(cls).items() if name[0] != "_" and name != "fallbacks"}
    fields |= {name: typing.get_type_hints(getattr(cls, name).fget)["return"] for name in _DERIVED.get(cls, ())}
    texts = documented | {n: inspect.getdoc(getattr(cls, n)) or "" for n in _DERIVED.get(cls, ())}
    properties = {name: _typed(t) | _ALSO.get((cls, name), {}) for name, t in fields.items()}
    for name, text in texts.items():
        if name in properties:
            properties[name]["description"] = re.sub(r"\s+", " ", text)
    return {"type": "object", "additionalProperties": False, "required": [*properties], "properties": properties}


def _typed(t: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(t), typing.get_args(t)
    if origin is types.UnionType:
        return {"anyOf": [_typed(a) for a in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _typed(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _typed(arguments[1])}
    if isinstance(t, type) and issubclass(t, enum.Enum):
        return {"enum": [member.name for member in t]}
    if dataclasses.is_dataclass(t):
        return {"$ref": f"#/$defs/{t.__name__}"}  # type: ignore[union-attr]
    plain: dict[Any, dict[str, Any]] = {str: {"type": "string"}, types.NoneType: {"type": "null"}}
    numbers: dict[Any, str] = {int: "integer", float: "number"}
    return dict(plain[t]) if t in plain else {"type": numbers[t], "minimum": 0}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
