"""04_kernel.cpp: the generated source, every value with its name in the formula."""

from __future__ import annotations

import itertools
import re

from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.names import labels_of
from npu_fuse_pass.ir.expr import postorder
from npu_fuse_pass.ir.readable import named_values, readable
from npu_fuse_pass.ir.types import Group

_VALUE = re.compile(r"^\s*const \w+ v(\d+) = .*;$")
_TENSOR = re.compile(r"^\s*(?:const )?\w+\* __restrict__ t(\d+) = .*;$")
_LONG = 150


def kernels(contents: Contents) -> str | None:
    """The kernels of all groups; None where no C++ is generated."""
    made = {g.name: g for g in contents.grouped.all_groups}
    parts = [annotated(made[name], contents, text) for name, text in contents.sources.items() if name in made]
    return "\n\n".join(parts) + "\n" if parts else None


def annotated(group: Group, contents: Contents, source: str) -> str:
    """A kernel's source with comments, below the formula."""
    labels = labels_of(group, contents.grouped.leaves, group.members[0])
    names = named_values(group.formula, labels)
    values = [names[id(e)] for e in postorder(group.formula.roots)]  # v0, v1, … in generated code
    lines = [f"// {group.name}", *(f"//   {line}" for line in readable(group.formula, labels).splitlines())]
    for line in itertools.dropwhile(lambda x: x.startswith("// "), source.splitlines()):  # its identity: 02_groups.txt
        value, tensor = _VALUE.match(line), _TENSOR.match(line)
        if value:
            line += f"  // {_cut(values[int(value[1])])}"
        elif tensor:
            line += f"  // {labels[int(tensor[1])]}"
        lines.append(line)
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else text[:_LONG] + "…"
