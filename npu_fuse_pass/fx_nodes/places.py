"""Where in the source a node of a graph comes from."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import sys

import torch
from torch import fx

_FRAME = re.compile(r'File "(?P<path>.*)", line (?P<line>\d+), in (?P<function>\S+)')
_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (*torch.__path__, pathlib.Path(__file__).parents[1]))


def source_of(node: fx.Node) -> str | None:
    """The innermost line of the user's source, or of torch's where there is none, as "train.py:12, in step"."""
    frames = [match.groupdict() for match in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    if not frames:
        return None
    users = [frame for frame in frames if not frame["path"].startswith(_NOT_THE_USERS)]
    frame = (users or frames)[-1]
    return f"{_importable(frame['path'])}:{frame['line']}, in {frame['function']}"


@functools.cache
def _importable(path: str) -> str:
    """A file's path as Python finds it: from the folder in which imports look."""
    roots = [os.path.join(os.path.abspath(folder), "") for folder in sys.path]
    return path.removeprefix(max((root for root in roots if path.startswith(root)), key=len, default=""))
