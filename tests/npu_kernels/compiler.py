"""The real middle-end of Ascend's compiler (bishengir-compile of the ascendnpu-ir wheel) without CANN.

Every pass of HFusion and HIVM runs on a CPU; only `hivmc`, the last step, belongs to CANN; the IR before it is what
tests read and run.
"""

from __future__ import annotations

import functools

from npu_fuse_pass.lowerings.npu.kernels import compiler
from npu_fuse_pass.lowerings.npu.kernels.compiler import PREVIEW_TARGET, TARGETS, Refused

__all__ = ["TARGETS", "Refused", "final_ir"]


@functools.cache
def final_ir(mlir: str, target: str = PREVIEW_TARGET) -> str:
    """The module before its HIVM operations become calls: all decisions of the schedule are in it.

    Raises:
        Refused: a pass before that fails; holds the compiler's errors.
    """
    return compiler.find(target).last_ir(mlir)
