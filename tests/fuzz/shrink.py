"""Making a program that shows a difference as short as possible."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

Lines = tuple[str, ...]


def shrink(lines: Sequence[str], still: Callable[[Lines], bool], tries: int = 150) -> Lines:
    """A program from which no line can be left out, and which is as plain as these few simplifications make it.

    Args:
        still: whether a program still shows the same.
        tries: after so many questions, the best so far.
    """
    best, asked = tuple(lines), set[Lines]()

    def ask(candidate: Lines) -> bool:
        if candidate in asked or candidate == best or len(asked) >= tries:
            return False
        asked.add(candidate)
        return still(candidate)

    again = True
    while again and len(asked) < tries:
        again = False
        for candidate in _candidates(best):
            if ask(candidate):
                best, again = candidate, True
                break
    return best


def _candidates(lines: Lines) -> Iterator[Lines]:
    n = len(lines)
    size = n // 2
    while size:  # without some lines, many at first
        for start in range(n - size, -1, -size):
            yield lines[:start] + lines[start + size :]
        size //= 2
    for i, line in enumerate(lines):  # without a line inside of a function
        inner = line.split("\n")
        for k in range(1, len(inner)):
            yield (*lines[:i], "\n".join(inner[:k] + inner[k + 1 :]), *lines[i + 1 :])
    for i, line in enumerate(lines):
        for old, new in (
            (r"ps\[-?\d\]", "ps[0]"),
            (r"param\(.*\)", "param((3,))"),
            (r", kind=.*\)|, F32, \"\w+\", \d+\)|, seed=\d+\)", ")"),
            (r"\[param.* \+ 1\)\]", "[param((3,))]"),
            (r", (weight_decay|momentum)=[\d.]+", ""),
            (r"in_thread\(step, |in_thread\(step", "step("),
        ):
            changed = re.sub(old, new, line)
            if changed != line:
                yield (*lines[:i], changed, *lines[i + 1 :])
