"""The contents of a dump: what the stages made of one compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from npu_fuse_pass.ir.types import Captured, Grouped
from npu_fuse_pass.report.report import CompileReport


@dataclasses.dataclass(frozen=True)
class Contents:
    """One compile.

    Attributes:
        original: the graph that Dynamo captured; None for the step of a rule optimizer by itself, which is read
            from its rule.
        captured: leaves, updates and what is not fused.
        grouped: the same as groups, segment by segment.
        report: of this compile.
        sources: generated C++ of each group that has some, by the group's name; what all kernels begin with is an
            `#include`. `kernel_text.annotated` puts the names of the formula beside its values.
        ge_graphs: GE graphs in protobuf's text form, by what they are ("original", "optimized"); only on the NPU, and
            the optimized one not before the first run. "kernel": generated kernels, source and last IR.
    """

    original: fx.GraphModule | None
    captured: Captured
    grouped: Grouped
    report: CompileReport
    sources: Mapping[str, str]
    ge_graphs: Mapping[str, str]
