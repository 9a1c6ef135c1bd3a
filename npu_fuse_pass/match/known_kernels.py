"""Kernels that a lowering may have as one dedicated operation, each declared once by its mathematics.

A kernel is a plain function. Positional arguments are tensors, keyword-only ones are numbers (0-dim), named as in
TensorFlow's and GE's operations; the results begin with the parameter. Arithmetic operators, `.sqrt()` and `.maximum()`
are all that it may use, so that tensors and symbols can both run it. `find` decides which kernel computes a group's
formula. Reports name it; a lowering with an operation for it (`dedicated_operations` has GE's) reads the roles of the
slots and the scalars from the `Match`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class KnownKernel:
    """One kernel.

    Attributes:
        name: what reports call it.
        function: the mathematics.
        outputs: tensors that the function returns, in order; the parameter first.
        inputs: tensor arguments.
        scalars: number arguments.
        powers: a scalar that is another one to the power of the step number plus this.
        scaled: scalars into which a bias correction may be folded.
        prepared: inputs that may be computed from the formula's tensors first, by elementwise operations: of `var`
            a multiple only.
        nonnegative: tensors that hold means of squares.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    powers: Mapping[str, tuple[str, int]]
    scaled: tuple[str, ...]
    prepared: tuple[str, ...]
    nonnegative: tuple[str, ...]


# The table ------------------------------------------------------------------------------------------------------------

KERNELS: tuple[KnownKernel, ...] = ()
"""The best first."""


def _kernel(
    outputs: str,
    powers: Mapping[str, tuple[str, int]] | None = None,
    scaled: str = "",
    prepared: str = "grad",
    nonnegative: str = "",
) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:
    """Decorator: a row of the table. Names in one string, separated by spaces."""

    def add(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        global KERNELS
        parameters = inspect.signature(function).parameters.values()
        row = KnownKernel(
            function.__name__,
            function,
            tuple(outputs.split()),
            tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
            tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
            powers or {},
            tuple(scaled.split()),
            tuple(prepared.split()),
            tuple(nonnegative.split()),
        )
        KERNELS = (*KERNELS, row)
        return function

    return add


@_kernel("var m v", powers={"beta1_power": ("beta1", -1), "beta2_power": ("beta2", -1)}, nonnegative="v")
def adamw(
    var: Any,
    m: Any,
    v: Any,
    grad: Any,
    *,
    beta1_power: Any,
    beta2_power: Any,
    lr: Any,
    weight_decay: Any,
    beta1: Any,
    beta2: Any,
    epsilon: Any,
) -> tuple[Any, ...]:
    """AdamW; with weight_decay 0 Adam."""
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    m_hat = m / (1 - beta1_power * beta1)
    v_hat = v / (1 - beta2_power * beta2)
    return var - lr * weight_decay * var - lr * m_hat / (v_hat.sqrt() + epsilon), m, v


@_kernel(
    "var m v", powers={"beta1_power": ("beta1", 0), "beta2_power": ("beta2", 0)}, scaled="epsilon", nonnegative="v"
)
def adam(
    var: Any,
    m: Any,
    v: Any,
    grad: Any,
    *,
    beta1_power: Any,
    beta2_power: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    epsilon: Any,
) -> tuple[Any, ...]:
    """Adam as TensorFlow has it; torch's with epsilon·sqrt(1 - beta2^t)."""
    m = m + (1 - beta1) * (grad - m)
    v = v + (1 - beta2) * (grad * grad - v)
    step_size = lr * (1 - beta2_power).sqrt() / (1 - beta1_power)
    return var - step_size * m / (epsilon + v.sqrt()), m, v


@_kernel(
    "var m v vhat",
    powers={"beta1_power": ("beta1", 0), "beta2_power": ("beta2", 0)},
    scaled="epsilon",
    prepared="grad var",
    nonnegative="v vhat",
)
def adam_amsgrad(
    var: Any,
    m: Any,
    v: Any,
    vhat: Any,
    grad: Any,
    *,
    beta1_power: Any,
    beta2_power: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    epsilon: Any,
) -> tuple[Any, ...]:
    """Adam that divides by the largest second moment so far; torch's with epsilon·sqrt(1 - beta2^t)."""
    m = m + (1 - beta1) * (grad - m)
    v = v + (1 - beta2) * (grad * grad - v)
    vhat = vhat.maximum(v)
    step_size = lr * (1 - beta2_power).sqrt() / (1 - beta1_power)
    return var - step_size * m / (vhat.sqrt() + epsilon), m, v, vhat


@_kernel("var accum")
def momentum(var: Any, accum: Any, grad: Any, *, lr: Any, momentum: Any) -> tuple[Any, ...]:
    """Gradient descent with momentum."""
    accum = accum * momentum + grad
    return var - lr * accum, accum


@_kernel("var accum")
def nesterov(var: Any, accum: Any, grad: Any, *, lr: Any, momentum: Any) -> tuple[Any, ...]:
    """Gradient descent that looks ahead along the momentum."""
    accum = accum * momentum + grad
    return var - (grad * lr + accum * momentum * lr), accum


@_kernel("var ms mom", prepared="grad var", nonnegative="ms")
def rmsprop(
    var: Any, ms: Any, mom: Any, grad: Any, *, lr: Any, rho: Any, momentum: Any, epsilon: Any
) -> tuple[Any, ...]:
    """RMSProp as TensorFlow has it: epsilon inside the root, the learning rate inside the momentum."""
    ms = rho * ms + (1 - rho) * grad * grad
    mom = momentum * mom + lr * grad / (ms + epsilon).sqrt()
    return var - mom, ms, mom


@_kernel("var mg ms mom", prepared="grad var", nonnegative="ms")
def centered_rmsprop(
    var: Any, mg: Any, ms: Any, mom: Any, grad: Any, *, lr: Any, rho: Any, momentum: Any, epsilon: Any
) -> tuple[Any, ...]:
    """RMSProp that divides by the estimated variance."""
    mg = rho * mg + (1 - rho) * grad
    ms = rho * ms + (1 - rho) * grad * grad
    mom = momentum * mom + lr * grad / (ms - mg * mg + epsilon).sqrt()
    return var - mom, mg, ms, mom
