"""The author's side: update rules and the optimizers made of them. Knows no compiler.

What authors import is here: `rule`, `zeros`, `ones`, `Init`, `total`, `Total`, `Rule`. `RuleOptimizer` is in
`optimizer`, which loads Dynamo.
"""

from __future__ import annotations

from npu_fuse_pass.rules.declaration import Init, Total, ones, total, zeros
from npu_fuse_pass.rules.decorator import Rule, rule

__all__ = ["Init", "Rule", "Total", "ones", "rule", "total", "zeros"]
