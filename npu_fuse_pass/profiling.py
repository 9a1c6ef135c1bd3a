"""Ranges for profilers, at the cost of a step's other calls."""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse_pass.private_torch import find

named: Any = find("torch._C._profiler._RecordFunctionFast") or torch.profiler.record_function
"""A range under whose name profiles show what runs inside the block."""
_enabled = find("torch.autograd._profiler_enabled")


def profiling() -> bool:
    """True if a profiler may be active."""
    return _enabled is None or _enabled()
