"""05_ge*: GE graphs as torchair writes them, and as lists of operations to read."""

from __future__ import annotations

import ast
import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from npu_fuse_pass.dump.names import runs

_WHAT = {
    "original": "the GE graph that torchair's converters made, before torchair's own passes",
    "optimized": "the GE graph after torchair's own passes, as GE got it at the first run. What GE makes of that "
    "exists on the device only: DUMP_GE_GRAPH=2 writes it",
}
_LONGEST = 64  # operations that repeat together, at most
_INPUTS = 12  # of an operation that are listed
_NODE = re.compile(r"^node \{\n(.*?)^\}\n", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r'^    (name|op|input): "(.*)"$', re.MULTILINE)
_ATTRIBUTE = re.compile(r'^        key: "(.*)"\n        value \{\n            s: (.*)$', re.MULTILINE)
_DIMENSION = re.compile(r"^  dim: (-?\d+)$", re.MULTILINE)
_VALUE = re.compile(r'^s: "(.*)"$', re.MULTILINE)
_TYPE = re.compile(r"dtype: DT_(\w+)")


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One GE operation: its line, and a key that it shares with the same operation on other tensors."""

    line: str
    kind: tuple[str, str, int]
    type: str


def file(kind: str, graphs: Mapping[str, str]) -> str | None:
    """A graph as torchair writes it, under a heading; None if there is none."""
    return f"# {_WHAT[kind]}\n{graphs[kind]}" if kind in graphs else None


def listing(graphs: Mapping[str, str]) -> str | None:
    """One line per operation, repeated ones once; None without GE graphs."""
    lines: list[str] = []
    for kind in (k for k in _WHAT if k in graphs):
        operations = list(map(_operation, _NODE.findall(graphs[kind])))
        counts = collections.Counter(o.type for o in operations)
        total = ", ".join(f"{name} × {count}" for name, count in sorted(counts.items()))
        lines += [f"{kind}: {_WHAT[kind]}", f"  {len(operations)} operations: {total}", *_collapsed(operations), ""]
    return "\n".join(lines) or None


def _operation(node: str) -> _Operation:
    fields = _FIELD.findall(node)
    attributes = {key: ast.literal_eval(f"b{text}").decode() for key, text in _ATTRIBUTE.findall(node)}
    name, op = (next(value for field, value in fields if field == wanted) for wanted in ("name", "op"))
    inputs = [value.removesuffix(":0") for field, value in fields if field == "input"]
    constant = _VALUE.search(attributes.get("_readable_value", ""))
    given = constant[1] if constant else ", ".join(inputs[:_INPUTS])
    given += f", and {len(inputs) - _INPUTS} more" if len(inputs) > _INPUTS else ""
    made = next((text for key, text in attributes.items() if key.startswith("[o]")), "")
    dtype = found[1].lower() if (found := _TYPE.search(made)) and found[1] != "UNDEFINED" else ""
    shape = f"[{', '.join(_DIMENSION.findall(made))}]" if "shape {" in made else ""
    line = f"{name} = {op}({given})  {dtype}{shape}".rstrip()
    return _Operation(line, (name.partition("/")[0] if "/" in name else "", op, len(inputs)), op)


def _collapsed(operations: Sequence[_Operation]) -> Iterator[str]:
    """Lines; of sequences that repeat with other tensors, the first."""
    at = 0
    for pattern, times in runs([o.kind for o in operations], _LONGEST):
        indent = "  "
        if times > 1:
            yield f"  × {times}, of which the first:"
            indent = "    "
        yield from (f"{indent}{o.line}" for o in operations[at : at + len(pattern)])
        at += len(pattern) * times
