"""The author's side: update rules and the optimizers made of them. Knows no compiler.

What authors import is here: `rule`, `zeros`, `ones`, `Init`, `total`, `Total`, `Rule`, `RuleOptimizer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_fuse_pass.rules.declaration import Init, Total, ones, total, zeros
from npu_fuse_pass.rules.decorator import Rule, rule

if TYPE_CHECKING:
    from npu_fuse_pass.rules.optimizer import RuleOptimizer

__all__ = ["Init", "Rule", "RuleOptimizer", "Total", "ones", "rule", "total", "zeros"]


def __getattr__(name: str) -> Any:  # loading the optimizer loads Dynamo
    if name == "RuleOptimizer":
        from npu_fuse_pass.rules.optimizer import RuleOptimizer

        return RuleOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
