"""Numbers among the options of Paddle's classes."""

from __future__ import annotations

__all__ = ["as_float"]


def as_float(name: str, value: object) -> float:
    """A number as a float.

    Raises:
        TypeError: it is none, or none that a float holds; names the option.
    """
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise TypeError(f"{name} should be a number, got {value!r}")
