"""Which dtypes an input of a GE operation takes: the REG_OP prototypes in the docstrings of torchair's own wrappers."""

from __future__ import annotations

import functools
import inspect
import re


@functools.cache
def inputs_of(operation: str) -> tuple[frozenset[str] | None, ...]:
    """Per input, the names of the dtypes listed ("DT_FLOAT"); None where the prototype names a category or T1."""
    from torchair._ge_concrete_graph import ge_apis

    prototype = inspect.getdoc(getattr(ge_apis, operation, None)) or ""
    found: list[frozenset[str] | None] = []
    for kind in re.findall(r"INPUT\(\w+, (.*)\)", prototype):
        listed = frozenset(re.findall(r"DT_\w+", kind))
        found.append(None if "Type()" in kind or "ALL()" in kind or not listed else listed)
    return tuple(found)
