"""Running tests on a copy of the project with a bug planted in it, in a process that has torch imported already."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent
OUTPUT = "output.txt"

# Importing torch takes longer than most of these tests: one clean server does it, and every run is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "hypothesis"])


def copy_of_the_project(folder: pathlib.Path) -> pathlib.Path:
    for name in ("npu_fuse_pass", "optimizers", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(folder: pathlib.Path, tests: Sequence[str], environment: Mapping[str, str]) -> tuple[int | None, str]:
    """pytest's exit code (None: it did not end in five minutes) and its output."""
    process = _CONTEXT.Process(target=_run, args=(str(folder), list(tests), dict(environment)))
    process.start()
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        process.join()
        return None, (folder / OUTPUT).read_text()
    return process.exitcode, (folder / OUTPUT).read_text()


def _run(folder: str, tests: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this very module, of the original project
    sys.path[:] = [folder, *(p for p in sys.path if p and pathlib.Path(p).resolve() != ROOT)]

    import pytest

    options = ["-x", "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, *tests])
    import npu_fuse_pass

    if not str(npu_fuse_pass.__file__).startswith(folder):
        code = pytest.ExitCode.INTERNAL_ERROR
    sys.exit(int(code))
