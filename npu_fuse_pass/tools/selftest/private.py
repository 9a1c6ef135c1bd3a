"""Removal of private data from texts of a report."""

from __future__ import annotations

import getpass
import pathlib
import platform
import re

_PATH = re.compile(r"(?<![\w.)\]/:}])/(?:[\w.+@~-]+/)+(?=[\w.+@~-])")


def anonymous(text: str) -> str:
    """The text without folders, host name and user name: a path keeps its last part.

    For text that was written elsewhere: errors, and reasons that quote them.
    """
    text = _PATH.sub("", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = ""
    for name, instead in ((platform.node(), "HOST"), (user, "USER"), (pathlib.Path.home().name, "USER")):
        if len(name) > 1:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message, anonymous."""
    lines = str(error).strip().splitlines()
    return anonymous(f"{type(error).__name__}: {lines[0]}") if lines else type(error).__name__
