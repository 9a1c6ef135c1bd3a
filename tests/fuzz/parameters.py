"""The parameters of random programs, by what is unusual about them: a line of Python for each kind."""

from __future__ import annotations

# {s}: a seed
PARAMETERS = {
    "plain": "ps.append(param((3, 4), seed={s}))",
    "equal shapes": "ps += [param((3, 4), seed={s}), param((3, 4), seed={s} + 1)]",
    "0-dim": "ps.append(param((), seed={s}))",
    "one element": "ps.append(param((1,), seed={s}))",
    "empty": "ps.append(param((0, 3), seed={s}))",
    "strided": 'ps.append(param((3, 4), F32, "strided", {s}))',
    "transposed": 'ps.append(param((3, 4), F32, "transposed", {s}))',
    "channels_last": 'ps.append(param((2, 3, 2, 2), F32, "channels_last", {s}))',
    "expanded": 'ps.append(param((4, 3), F32, "expanded", {s}))',
    "overlapping": "ps += overlapping(5, 2)",
    "tied": "ps += overlapping(5, 0)",
    "frozen": 'ps.append(param((3,), F32, "frozen", {s}))',
    "float64": "ps.append(param((5,), F64, seed={s}))",
    "float16": "ps.append(param((4, 32), F16, seed={s}))",
    "bfloat16": "ps.append(param((4, 32), BF16, seed={s}))",
    "numpy": 'ps.append(param((3, 4), F32, "numpy", {s}))',
    "offset": 'ps.append(param((7,), F32, "offset", {s}))',
    "inference": 'ps.append(param((3,), F32, "inference", {s}))',
    "twice": "ps += [param((3,), seed={s})] * 2",
}
# kinds that eager refuses or that are not fused end a program early, or hide what else it does: drawn less often
RARE = ("expanded", "overlapping", "tied", "inference", "twice")
