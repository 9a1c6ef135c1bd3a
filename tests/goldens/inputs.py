"""Inputs of the golden trajectories: closed formulas, no random numbers."""

import numpy as np

SHAPES = [(2, 3), (4, 3), (5,), (1,), (3, 2, 2), (7,), (8, 4)]
STEPS = 20
TWO_GROUPS = [[0, 2, 4, 6], [1, 3, 5]]


def init_param(i: int) -> np.ndarray:
    """Initial value of parameter `i`: float64, exactly representable in float32."""
    n = int(np.prod(SHAPES[i]))
    k = np.arange(n)
    v = np.sin(0.37 * (k + 1) + i) * (0.5 + 0.25 * i)
    if i == 2:
        v = np.zeros(n)
    if i == 6:
        v = v * 8.0
    return v.astype(np.float32).astype(np.float64).reshape(SHAPES[i])


def grad_at(i: int, t: int, scale: float = 1.0) -> np.ndarray:
    """Gradient of parameter `i` at step `t` (0-based): float64, exactly representable in float32."""
    n = int(np.prod(SHAPES[i]))
    k = np.arange(n)
    g = np.cos(0.11 * (k + 1) * (i + 1) + 0.5 * t) * (0.3 + 0.1 * i) + 0.05 * ((k + t) % 3 - 1)
    if i == 5:
        g = g * (0.0 if t < 3 else 1.0)
    if i == 6:
        g = np.where(k % 2 == 0, g * 1e-4, g)
    return (g * scale).astype(np.float32).astype(np.float64).reshape(SHAPES[i])


def mask(name: str, i: int, t: int) -> bool:
    """False where parameter `i` has no gradient (None) at step `t`."""
    if name == "none_some":
        return not ((i == 1 and t % 3 == 1) or (i == 4 and t < 5))
    if name == "none_always":
        return i != 3
    return True
