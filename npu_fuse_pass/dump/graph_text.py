"""00_dynamo_graph.py: the graph as Dynamo captured it."""

from __future__ import annotations

import re

from .contents import Contents

_PACKAGES = re.compile(r"# File: \S*/site-packages/")


def original(contents: Contents) -> str:
    """The captured graph."""
    if contents.original is None:
        return "# the step of an optimizer of ours by itself\n"
    text: str = contents.original.print_readable(print_output=False)
    return _PACKAGES.sub("# File: ", text)
