"""Fused optimizers: `torch.compile(opt.step, backend="npu_fused")`. See README.md for a tour."""

from __future__ import annotations

import importlib
from typing import Any

from npu_fuse_pass.errors import (
    FuseError,
    GradientError,
    NotCapturedError,
    NumericsError,
    OptionError,
    PlatformError,
    RuleError,
    StepFailedError,
    UnfusedError,
)

__version__ = "0.2.0"

# name -> module: loaded when first used, so that importing this package needs torch alone and little time
_LAZY = {
    "rule": "rules",
    "zeros": "rules",
    "ones": "rules",
    "total": "rules",
    "Rule": "rules",
    "Init": "rules",
    "RuleOptimizer": "rules.optimizer",
    "compact": "rules.checkpoint",
    "npu_fused": "backend",
    "compile_step": "tools.compile_step",
    "compile_optimizer_": "tools.compile_optimizer",
    "restore_optimizer_": "tools.compile_optimizer",
    "explain": "tools.explain",
    "fuse_pass": "hook",
    "FusePass": "hook",
    "CompileReport": "report.report",
    "reports": "report.report",
    "clear_reports": "report.report",
    "clear_cache": "lowerings.kernels.cache",
}

__all__ = [
    "FuseError",
    "GradientError",
    "NotCapturedError",
    "NumericsError",
    "OptionError",
    "PlatformError",
    "RuleError",
    "StepFailedError",
    "UnfusedError",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("optimizers")
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # also what was not used yet: completion and "Did you mean" look here
