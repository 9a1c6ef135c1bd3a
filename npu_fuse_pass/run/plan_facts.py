"""The facts that the plan of a rule optimizer's step depends on, kept to say later which of them changed."""

from __future__ import annotations

from collections.abc import Sequence

from npu_fuse_pass.report.causes import Cause
from npu_fuse_pass.rules.batch import Batch

Facts = dict[str, object]


def plan_facts(batches: Sequence[Batch]) -> Facts:
    """The facts by name, in the order in which they are compared."""
    return {
        "the number of parameters": sum(len(b.params) for b in batches),
        "the rules": [b.rule.name for b in batches],
        "the parameters' dtypes": [str(b.dtype) for b in batches],
        "the gradients' dtypes": [str(b.grad_dtype) for b in batches],
        "the devices": [str(b.device) for b in batches],
        "the shapes": [list(p.shape) for b in batches for p in b.params],
    }


def changed(before: Facts, now: Facts) -> Cause:
    """Name the first fact that is different now."""
    for name, value in before.items():
        if now[name] != value:
            shown = "" if name == "the shapes" else f" from {value} to {now[name]}"
            return Cause(f"the optimizer's parameters were planned anew: {name} changed{shown}")
    return Cause("the optimizer's parameters were planned anew: storage, strides or options changed")
