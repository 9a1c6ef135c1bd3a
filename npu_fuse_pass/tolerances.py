"""How far two forms of a step may be apart: one row for each pair, and why it is not smaller.

Relative differences by the dtype of what is written; what they are relative to stands where a row is used.
"""

from __future__ import annotations

import torch


def _row(float64: float | None, float32: float, float16: float, bfloat16: float) -> dict[torch.dtype, float]:
    row = {torch.float64: float64, torch.float32: float32, torch.float16: float16, torch.bfloat16: bfloat16}
    return {dtype: value for dtype, value in row.items() if value is not None}


# A step beside the eager one: no FMA, other orders of sums; half precision may round to the neighbour, half a unit.
PROMISED = _row(1e-14, 1e-6, 2e-3, 1.6e-2)
# A known kernel beside the formula: equal in exact arithmetic, rounded in other places; in half precision four units.
MATCHED = _row(1e-14, 1e-6, 4e-3, 3e-2)
# check_numerics, a rule, which rounds once: ten times what is promised, so that what is reported is no rounding.
CHECKED_RULE = _row(1e-13, 1e-5, 2**-10, 2**-7)
# check_numerics, a captured step: the same; torch's optimizers round after every operation, about four units.
CHECKED_GRAPH = _row(1e-13, 1e-5, 4e-3, 3e-2)
# A captured step beside an uncompiled one of torch's: bias corrections from float32 counters, where 1 - 0.999 has an
# error of 1.3e-5; in half precision differences of rounded values are rounded again.
CHECKED_UNCOMPILED = _row(1e-4, 1e-4, 2e-2, 0.125)
# Some steps in a row beside eager, the goldens or the captured graph: what a step rounds, later ones enlarge.
TRAJECTORY = _row(1e-11, 2e-4, 4e-3, 3e-2)
# The self-test's five steps beside float64: an NPU may divide and take roots otherwise than IEEE does; half precision
# is rounded at every step, and an error of one unit stays. It has no float64.
SELF_TEST = _row(None, 1e-5, 5 * 2**-10, 5 * 2**-7)
