"""The facts that the plan of a rule optimizer's step depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from npu_fuse_pass.report.causes import Cause
from npu_fuse_pass.rules.batch import Batch


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """The facts that a plan depends on, kept to say later which of them changed."""

    facts: dict[str, object]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> PlanFacts:
        return cls(
            {
                "the number of parameters": sum(len(b.params) for b in batches),
                "the rules": [b.rule.name for b in batches],
                "the parameters' dtypes": [str(b.dtype) for b in batches],
                "the gradients' dtypes": [str(b.grad_dtype) for b in batches],
                "the devices": [str(b.device) for b in batches],
                "the shapes": [list(p.shape) for b in batches for p in b.params],
            }
        )

    def changed(self, now: PlanFacts) -> Cause:
        """Name the first fact that is different now."""
        for name, value in self.facts.items():
            if now.facts[name] != value:
                shown = "" if name == "the shapes" else f" from {value} to {now.facts[name]}"
                return Cause(f"the optimizer's parameters were planned anew: {name} changed{shown}")
        return Cause("the optimizer's parameters were planned anew: storage, strides or options changed")


def forget(step: object, names: Sequence[str]) -> None:
    """Delete attributes of a step whose optimizer is gone."""
    for name in names:
        if hasattr(step, name):
            delattr(step, name)
