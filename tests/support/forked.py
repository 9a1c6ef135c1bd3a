"""Scripts as a user runs them, each in a process of its own that has torch imported already.

Importing torch and what Dynamo loads at a first compile takes longer than most scripts do: one clean server does it,
and every process is a fork of it. What has to be otherwise before torch is imported (a variable that torch reads while
it loads, the seed of hashes, a package that is missing) takes a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch._inductor.cudagraph_trees", "pytest", "hypothesis"])


def run_script(
    script: str | pathlib.Path,
    *arguments: str,
    cwd: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, ...)`."""
    command = [str(script), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        given = (command, str(cwd or os.getcwd()), dict(os.environ if environment is None else environment), folder)
        process = FORKS.Process(target=_run, args=given)
        process.start()
        process.join()
        assert process.exitcode is not None
        out, err = (pathlib.Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def enter(cwd: str, environment: Mapping[str, str], paths: Sequence[str], out: str, err: str) -> None:
    """Make this fork a process that begins: nothing of the project is imported, and its folder is not on the path."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this very module
    sys.path[:] = [*paths, *(p for p in sys.path if p and pathlib.Path(p).resolve() != ROOT)]


def _run(command: list[str], cwd: str, environment: dict[str, str], folder: str) -> None:
    named = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = [str(pathlib.Path(command[0]).resolve().parent), *named]
    enter(cwd, environment, paths, *(os.path.join(folder, name) for name in ("stdout", "stderr")))
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")
