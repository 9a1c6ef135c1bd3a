"""The options of the backend."""

from __future__ import annotations

import dataclasses
import os
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` may set, with the defaults.

    Attributes:
        platform: "auto" (by the tensors' device), "cpu", "npu" or "eager" (the original graph).
        strict: raise UnfusedError if anything is left unfused.
        kernels: on an NPU: "auto" (dedicated operations as exact as eager), "dedicated" (the fewest operations; the
            report says what is less exact) or "elementwise".
        check_numerics: run every step fused and as the original, and raise NumericsError at the first difference.
        torchair_config: a torchair.CompilerConfig, which torchair's compiler gets as it is; None is its default.
        layout: how an NPU graph takes a group's tensors: "auto" (flat where they are adjacent in memory), "flat" (the
            same, even where concatenating large gradients takes longer) or "list" (one by one).
        dump: a folder that gets one folder with files for every compile and rank; None: NPU_FUSE_DUMP, or nothing.
    """

    platform: str = "auto"
    strict: bool = False
    kernels: str = "auto"
    check_numerics: bool = False
    torchair_config: Any = None
    layout: str = "auto"
    dump: str | os.PathLike[str] | None = None
