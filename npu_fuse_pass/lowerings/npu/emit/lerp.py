"""Interpolations in a formula, which GE's Lerp computes as one operation.

torch's lerp is one function in two spellings, where(|w| < 0.5, w*(end-start)+start, -(end-start)*(1-w)+end), which
differ in rounding only; an NPU's Lerp rounds in its own way. Where the weight was known when the step was captured,
there is one of them. Constants are slots of a formula, so their values have to be looked at: with 2-w in place of 1-w
it would be another function.
"""

from __future__ import annotations

from collections.abc import Mapping

from npu_fuse_pass.ir.expr import Expr

Interpolation = tuple[Expr, Expr, Expr]
"""Start, end and weight."""


def interpolation(e: Expr, constants: Mapping[int, float]) -> Interpolation | None:
    """Start, end and weight of an interpolation; None for other expressions, or where constants are unknown.

    Args:
        e: an expression over slots.
        constants: values of scalar slots, as far as they are known.
    """
    if e.op != "where":
        return _one_sided(e)
    condition, low, high = e.args[0], _one_sided(e.args[1]), _one_sided(e.args[2])
    if low is None or high is None or low[:2] != (high[1], high[0]):
        return None
    rest = _narrowed(high[2], e)
    if rest.op != "sub" or not _is(rest.args[0], 1.0, constants):
        return None
    weight = rest.args[1]
    small = condition.op == "lt" and condition.args[0].op == "abs" and condition.args[0].args == (weight,)
    same = small and _is(condition.args[1], 0.5, constants) and _narrowed(low[2], e) is weight
    return low if same else None


def _narrowed(number: Expr, e: Expr) -> Expr:
    """A number without the cast to the dtype of `e`."""
    return number.args[0] if number.op == "cast" and number.dtype == e.dtype else number


def _is(e: Expr, value: float, constants: Mapping[int, float]) -> bool:
    return e.op == "leaf" and not e.tensor and isinstance(e.value, int) and constants.get(e.value) == value


def _one_sided(e: Expr) -> Interpolation | None:
    """The parts of weight*(end-start)+start, with the difference in either sign; None for others."""
    if e.op != "fma":
        return None
    (first, second, start) = e.args
    for weight, distance in ((first, second), (second, first)):
        signs = (distance.args[0], 1) if distance.op == "neg" else (distance, 0)
        if weight.tensor or signs[0].op != "sub" or not signs[0].tensor:
            continue
        end, away = signs[0].args[signs[1]], signs[0].args[1 - signs[1]]
        if away is start and end.tensor:
            return start, end, weight
    return None
