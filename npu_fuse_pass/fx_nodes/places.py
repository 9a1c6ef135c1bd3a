"""The place in the source that a node of a graph, or an error, comes from."""

from __future__ import annotations

import functools
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import fx

_FRAME = re.compile(r'File "(.*)", line (\d+), in (\S+)')
_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (*torch.__path__, pathlib.Path(__file__).parents[1]))


def source_of(node: fx.Node) -> str | None:
    """The innermost line of the user's source, or of torch's where there is none, as "train.py:12, in step"."""
    return _innermost(_FRAME.findall(node.meta.get("stack_trace") or ""))


def source_of_error(error: BaseException) -> str | None:
    """The same for where an error was raised."""
    return _innermost([(f.filename, str(f.lineno), f.name) for f in traceback.extract_tb(error.__traceback__)])


def source_of_function(function: Callable[..., object]) -> str | None:
    """Where a function begins; None if it is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{_importable(code.co_filename)}:{code.co_firstlineno}, in {code.co_name}" if code is not None else None


def _innermost(frames: Sequence[tuple[str, str, str]]) -> str | None:
    users = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    if not frames:
        return None
    path, line, function = (users or frames)[-1]
    return f"{_importable(path)}:{line}, in {function}"


@functools.cache
def _importable(path: str) -> str:
    """A file's path as Python finds it: from the folder in which imports look."""
    roots = [os.path.join(os.path.abspath(folder), "") for folder in sys.path]
    return path.removeprefix(max((root for root in roots if path.startswith(root)), key=len, default=""))
