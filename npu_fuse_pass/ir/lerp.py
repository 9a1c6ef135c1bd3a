"""torch's lerp among expressions: one function in two spellings, which differ in rounding only.

They are where(|w| < 0.5, w*(end-start)+start, -(end-start)*(1-w)+end), or one of them where the weight was known when
the step was captured. Constants have to be looked at: with 2-w in place of 1-w it would be another function.
"""

from __future__ import annotations

from collections.abc import Callable

from npu_fuse_pass.ir.expr import Expr

Interpolation = tuple[Expr, Expr, Expr]
"""Start, end and weight."""


def interpolation(e: Expr, is_number: Callable[[Expr, float], bool]) -> Interpolation | None:
    """Start, end and weight of an interpolation; None for other expressions.

    Args:
        e: any expression.
        is_number: whether an expression is known to be a number.
    """
    if e.op != "where":
        return _one_sided(e)
    condition, low, high = e.args[0], _one_sided(e.args[1]), _one_sided(e.args[2])
    if low is None or high is None or low[:2] != (high[1], high[0]):
        return None
    rest = _narrowed(high[2], e)
    if rest.op != "sub" or not is_number(rest.args[0], 1.0):
        return None
    weight = rest.args[1]
    small = condition.op == "lt" and condition.args[0].op == "abs" and condition.args[0].args == (weight,)
    same = small and is_number(condition.args[1], 0.5) and _narrowed(low[2], e) is weight
    return low if same else None


def _narrowed(number: Expr, e: Expr) -> Expr:
    """A number without the cast to the dtype of `e`."""
    return number.args[0] if number.op == "cast" and number.dtype == e.dtype else number


def _one_sided(e: Expr) -> Interpolation | None:
    """The parts of weight*(end-start)+start, with the difference in either sign; None for others."""
    if e.op != "fma":
        return None
    (first, second, start) = e.args
    for weight, distance in ((first, second), (second, first)):
        signs = (distance.args[0], 1) if distance.op == "neg" else (distance, 0)
        if weight.tensor or signs[0].op != "sub":
            continue
        end, away = signs[0].args[signs[1]], signs[0].args[1 - signs[1]]
        if away is start:
            return start, end, weight
    return None
