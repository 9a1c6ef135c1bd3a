"""Warnings that name the user's line, not one of this package's or of torch's."""

from __future__ import annotations

import pathlib
import sys
import types
import warnings

import torch

_PACKAGE = pathlib.Path(__file__).parent
_FOLDERS = (_PACKAGE, _PACKAGE.parent / "optimizers", pathlib.Path(torch.__file__).parent)
_INSIDE = tuple(f"{folder}/" for folder in _FOLDERS)
_STANDARD = ("<", str(pathlib.Path(warnings.__file__).parent / "contextlib.py"))


def is_users(code: types.CodeType) -> bool:
    """True for code that is neither torch's nor this package's; context managers count as theirs."""
    return not code.co_filename.startswith((*_INSIDE, *_STANDARD))


def warn(text: str) -> None:
    """A UserWarning at the innermost line that is neither torch's nor ours: while compiling, Dynamo lies between."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and not is_users(frame.f_code):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level + 1)
