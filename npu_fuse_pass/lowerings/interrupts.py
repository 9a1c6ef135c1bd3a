"""What a signal's handler raises while a step is written (KeyboardInterrupt) is held until all of it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

INTERRUPTS = 100  # after so many the user does not want to wait for the end of the step


def to_the_end(write: Callable[[], None], refused: Callable[[BaseException], bool] = lambda e: False) -> None:
    """Call a function that may begin anew at any point, and again whenever it is interrupted.

    Args:
        write: does the same when it is called again.
        refused: of what it has raised: nothing is written, and nothing will be.

    Raises:
        BaseException: the first interrupt, when all is written; a handler may raise an Exception, too.
    """
    try:
        write()
    except BaseException as e:
        if not refused(e):
            again(write)
        raise


def again(write: Callable[[], None]) -> None:
    """Go on with what was interrupted, whatever interrupts that."""
    for _ in range(INTERRUPTS):
        with contextlib.suppress(BaseException):
            write()
            return
