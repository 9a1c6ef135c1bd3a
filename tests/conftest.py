"""Every test steps with the native input check, however few tensors there are, and sees internal errors; the last lines
of a run say how much of torch's database of optimizers was met, and where the time went.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pytest

from tests.support.stages import Clock, Totals

os.environ.setdefault("NPU_FUSE_VERIFY", "1")  # in processes that tests start, too


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is loaded by now, torch and the tests, stays: the garbage collector need not look at it again and again.

    Nor as often as usual at what a compile makes, nearly all of which goes without it: it took a tenth of a compile.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.set_threshold(20_000, 20, 20)
        gc.freeze()
        unheard_traces()


def unheard_traces() -> None:
    """pytest listens to every logger that passes nothing on; Dynamo would write a trace of all that it does for it."""
    logging.getLogger("torch.__trace").propagate = True  # to nobody: without a handler nothing is written


CLOCK, TOTALS = Clock(), Totals()


@pytest.fixture(autouse=True, scope="session")
def counted_compilers() -> Iterator[None]:
    from npu_fuse_pass.lowerings.cpu import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_library", CLOCK.compiling(build.compile_library))
        yield


def pytest_runtest_logstart() -> None:
    CLOCK.read()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    report.spent = CLOCK.read()  # goes with the report to the process that prints
    return report


def pytest_runtest_logreport(report: Any) -> None:
    TOTALS.add(report.nodeid, getattr(report, "spent", []))  # none of a test that ended its process


@dataclasses.dataclass(frozen=True)
class Loads:
    """Two ways of `build.load`: kernels as users have them, and quickly compiled ones."""

    shipped: Callable[..., Any]
    quick: Callable[..., Any]


@pytest.fixture(autouse=True, scope="session")
def kernels(counted_compilers: None) -> Iterator[Loads]:
    """With -Og the compiler takes a quarter of its time, and kernels give the same bits (test_bits.py).

    Kernels are as users have them in the slow tier, in processes that tests start, and in files that use
    `shipped_kernels`.
    """
    from npu_fuse_pass.lowerings.cpu import build
    from tests.support.training import FULL

    shipped = build.load

    def quick(source: str, functions: Sequence[str], flags: tuple[str, ...] = ()) -> Any:
        return shipped(source, functions, flags or ("-Og",))

    loads = Loads(shipped, quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load", shipped if FULL else quick)
        yield loads


@pytest.fixture
def shipped_kernels(kernels: Loads, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels with the flags that users have, for tests of numbers and of operations."""
    import npu_fuse_pass
    from npu_fuse_pass.lowerings.cpu import build

    monkeypatch.setattr(build, "load", kernels.shipped)
    npu_fuse_pass.clear_reports()  # a compile serves optimizers that are alike for as long as its report is listed
    yield
    npu_fuse_pass.clear_reports()


@pytest.fixture(autouse=True, scope="session")
def unmeasured_compiles() -> Iterator[None]:
    """Without what only Dynamo's logs tell. It measures the guards of everything that it compiles, and empties the
    processor's caches before, which is half of the compile of a small step; it writes all settings of torch into a
    record of the compile. And without its own collection of garbage after each (see `pytest_collection`).
    """
    import torch._dynamo.guards

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(run_gc_after_compile=False):
        patch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *given: 0.0, raising=False)
        patch.setattr(torch._dynamo.utils.get_metrics_context(), "_on_exit", lambda *given: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def native_input_check() -> int:
    """Without it, most tests have too few parameters for the native check; returns how many it takes otherwise."""
    from npu_fuse_pass.lowerings.cpu import input_check

    usual, input_check.WORTH = input_check.WORTH, 1
    input_check.wait()
    return usual


@pytest.fixture
def usual_input_check(native_input_check: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """As users have it: few tensors are checked in Python. Returns from how many on the check is native."""
    from npu_fuse_pass.lowerings.cpu import input_check

    monkeypatch.setattr(input_check, "WORTH", native_input_check)
    return native_input_check


@pytest.fixture(autouse=True, scope="module")
def limits_of_a_file() -> Iterator[None]:
    """Files do not share torch's limit of compiles for a class: which of them run in one process is by chance.

    Nor do tests that collect garbage look through what the files before them have left behind, several seconds long.
    """
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    gc.freeze()


@pytest.fixture
def afresh() -> Iterator[None]:
    """Nothing is compiled or reported yet: instances of one class share torch's limit of 8 compiles."""
    import torch

    import npu_fuse_pass

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    npu_fuse_pass.clear_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture
def same_numbers() -> None:
    """Random numbers are the same at every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def kernel_cache(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty kernel cache, for as long as the test runs."""
    from tests.support.kernel_cache import own_cache

    with own_cache(tmp_path) as folder:
        yield folder


@pytest.fixture
def on_meta() -> Iterator[None]:
    """Another default device than the CPU, under which a tensor that nobody places has no values."""
    import torch

    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where the time went; the database's cases by outcome, and what no backend is shown."""
    terminalreporter.section("processor seconds of the tests")
    for line in TOTALS.lines():
        terminalreporter.line(line)
    outcomes: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        names = [getattr(report, "nodeid", "") for report in terminalreporter.stats.get(outcome, [])]
        outcomes[outcome] = [name for name in names if "test_optim_db.py::" in name]
    if any(outcomes.values()):
        from tests.support.optim_cases import summary

        terminalreporter.section("torch's database of optimizers")
        for line in summary(outcomes):
            terminalreporter.line(line)
