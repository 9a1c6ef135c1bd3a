"""tests/npu_kernels runs in an environment of its own: `bash scripts/npu_kernels_lane.sh`. Elsewhere it is left out."""

from __future__ import annotations

import importlib.util
import os

import pytest

LEFT_OUT = (
    "tests/npu_kernels was left out: ascendnpu-ir is not installed in this environment. "
    "Run: bash scripts/npu_kernels_lane.sh"
)
AVAILABLE = importlib.util.find_spec("ascendnpuir") is not None

collect_ignore_glob = [] if AVAILABLE else ["*.py"]

if AVAILABLE and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
    raise pytest.UsageError("CANN's stand-ins are not set up. Run: bash scripts/npu_kernels_lane.sh")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not AVAILABLE:
        terminalreporter.write_line(LEFT_OUT)
