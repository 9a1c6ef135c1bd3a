"""The options of the backend."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` may set, with the defaults.

    Attributes:
        platform: "auto" (by the tensors' device), "cpu", "npu" or "eager" (the original graph).
        strict: raise UnfusedError if anything is left unfused.
        torchair_config: a torchair.CompilerConfig, which torchair's compiler gets as it is; None is its default.
    """

    platform: str = "auto"
    strict: bool = False
    torchair_config: Any = None
