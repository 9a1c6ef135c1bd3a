"""tests/stacks runs in an environment of its own: `bash scripts/stacks.sh`. Elsewhere it is left out.

Its last lines are the table of docs/compatibility.md: what a user of each stack writes, and what ran.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest

LEFT_OUT = "tests/stacks was left out: no lightning in this environment. Run: bash scripts/stacks.sh"
AVAILABLE = importlib.util.find_spec("lightning") is not None

collect_ignore_glob = [] if AVAILABLE else ["*.py"]

MODULES = pytest.StashKey[dict[str, Any]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    config.stash[MODULES] = {item.nodeid: item.module for item in items}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not AVAILABLE:
        terminalreporter.write_line(LEFT_OUT)
        return
    rows: dict[str, dict[str, list[str]]] = {}
    modules: dict[str, Any] = config.stash.get(MODULES, {})
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            module = modules.get(report.nodeid)
            if hasattr(module, "STACK"):
                rows.setdefault(module.__name__, {}).setdefault(outcome, []).append(report.nodeid.partition("::")[2])
    if rows:
        terminalreporter.section("docs/compatibility.md")
        for line in table({name: next(m for m in modules.values() if m.__name__ == name) for name in rows}, rows):
            terminalreporter.write_line(line)


def table(modules: dict[str, Any], rows: dict[str, dict[str, list[str]]]) -> list[str]:
    """The table as Markdown: a module names its stack, the packages, and what a user writes."""
    lines = ["| stack | version | what to write | what ran |", "| --- | --- | --- | --- |"]
    for name, outcomes in rows.items():
        stack, packages, write = modules[name].STACK
        versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        counts = ", ".join(f"{len(tests)} {outcome}" for outcome, tests in outcomes.items())
        lines.append(f"| {stack} | {versions} | {write} | {modules[name].RAN}: {counts} |")
    return lines
