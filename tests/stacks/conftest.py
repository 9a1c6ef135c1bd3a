"""tests/stacks runs in an environment of its own: `bash scripts/stacks.sh`. Elsewhere it is left out."""

from __future__ import annotations

import importlib.util
from typing import Any

LEFT_OUT = "tests/stacks was left out: no lightning in this environment. Run: bash scripts/stacks.sh"
AVAILABLE = importlib.util.find_spec("lightning") is not None

collect_ignore_glob = [] if AVAILABLE else ["*.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not AVAILABLE:
        terminalreporter.write_line(LEFT_OUT)
