"""tests/npu runs in an environment of its own: `bash scripts/npu_lane.sh`. Anywhere else its files are not collected.

They are left out, not skipped: the lane is a stage of scripts/test.sh, and there every one of them runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

LEFT_OUT = "tests/npu was left out: torch_npu is not installed in this environment. Run: bash scripts/npu_lane.sh"
AVAILABLE = importlib.util.find_spec("torch_npu") is not None

collect_ignore_glob = [] if AVAILABLE else ["*.py"]

if AVAILABLE and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
    raise pytest.UsageError("torch_npu is installed but CANN's stand-ins are not set up. Run: bash scripts/npu_lane.sh")


@pytest.fixture
def ge() -> Iterator[Any]:
    """A `harness.Recording` of the GE graphs of a test."""
    import harness
    import torch

    import npu_fuse_pass

    npu_fuse_pass.clear_reports()
    with harness.record() as graphs:
        yield graphs
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.npu)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not AVAILABLE:
        terminalreporter.write_line(LEFT_OUT)
