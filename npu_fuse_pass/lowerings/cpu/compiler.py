"""The C++ compiler as a program: which one, what it is called with, and what it does when it fails or hangs.

It runs in a process group of its own. A group that does not end in time, or is still at work when the interpreter ends,
is killed, without waiting for it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess

from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.user_warnings import warn

LIMIT = 300.0
"""Seconds that a compile may take."""

_FLAGS = [
    "-std=c++14",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-w",
]
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}

_running: dict[int, int] = {}  # compilers at work (which are process groups), and the processes that started them
_hung: set[tuple[str, ...]] = set()  # compilers with flags: another kernel would wait as long
_ending = False


class CompilerTimeoutError(PlatformError):
    """The compiler did not end in time."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of g++, c++, clang++ on PATH."""
    asked = os.environ.get("CXX", "").strip()
    found = next((name for name in (asked, "g++", "c++", "clang++") if name and _program(name)), None)
    if asked and found not in (None, asked):
        warn(f"npu_fused: CXX={asked!r} cannot be run: no such program; {found} is used instead")
    return found


def _program(name: str) -> str | None:
    try:
        return shutil.which(shlex.split(name)[0])
    except (ValueError, IndexError):  # an open quotation mark
        return None


@functools.cache
def identity() -> tuple[str, ...]:
    """What a binary depends on beside its source.

    Raises:
        PlatformError: there is no compiler, or it does not run.
    """
    command = _command()
    _, version, _ = _call([*command, "--version"], None)
    return (*command, version, " ".join(_flags()), platform.machine(), _processor_features())


def compile_library(source: str, flags: tuple[str, ...], folder: pathlib.Path) -> pathlib.Path:
    """Make a shared library in a folder.

    Args:
        source: C++.
        flags: for the compiler, after those that all have.
        folder: everything is written there, the compiler's own temporary files too.

    Raises:
        PlatformError: there is no working C++ compiler, or it refuses the source.
        OSError: the folder cannot be written.
    """
    command = _command()
    kind = (*command, *flags)
    if kind in _hung:
        raise CompilerTimeoutError(
            f"the C++ compiler {command[0]} did not end when it was called before", Code.COMPILER
        )
    text, library = folder / "kernel.cpp", folder / "kernel.so"
    text.write_text(source, encoding="utf-8")
    command = [*command, *_flags(), str(text), *flags, "-o", str(library)]
    try:
        code, _, errors = _call(command, folder)
    except CompilerTimeoutError:
        _hung.add(kind)
        raise
    if code or not library.is_file():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        said = f":\n{errors[-2000:]}" if errors.strip() else " and said nothing"
        raise PlatformError(f"the C++ compiler {how} ({' '.join(command)}){said}", Code.COMPILER)
    library.chmod(0o700)
    return library


def end_all() -> None:
    """Kill the compilers of this process and start none from now on."""
    global _ending
    _ending = True
    for group, parent in list(_running.items()):
        if parent == os.getpid():  # not in a fork
            _kill(group)


atexit.register(end_all)


def ending() -> bool:
    """Whether the interpreter ends, so that no compiler is started any more."""
    return _ending


def forget() -> None:
    """As in a new process."""
    compiler.cache_clear()
    identity.cache_clear()
    _hung.clear()


def _command() -> list[str]:
    name = compiler()
    if name is None:
        asked = os.environ.get("CXX", "").strip()
        unusable = f" (CXX={asked!r} is no program)" if asked else ""
        raise PlatformError(f"no C++ compiler found{unusable}: install g++ or clang++, or set CXX", Code.COMPILER)
    return shlex.split(name)


def _flags() -> list[str]:
    return [*_FLAGS, *([_NATIVE[platform.machine()]] if platform.machine() in _NATIVE else [])]


def _processor_features() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _call(command: list[str], temporary: pathlib.Path | None) -> tuple[int, str, str]:
    """Exit code and output, whatever bytes that is."""
    if _ending:
        raise PlatformError("the interpreter ends: the C++ compiler is not called any more", Code.COMPILER)
    environment = {**os.environ, "TMPDIR": str(temporary)} if temporary is not None else None
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, stdin=none, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
        )
    except OSError as e:
        raise PlatformError(f"the C++ compiler {command[0]} cannot be run: {e}", Code.COMPILER) from e
    _running[process.pid] = os.getpid()
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except BaseException as e:
        _kill(process.pid)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        if isinstance(e, subprocess.TimeoutExpired):
            text = f"the C++ compiler {command[0]} did not end within {LIMIT:g} s, and was killed"
            raise CompilerTimeoutError(text, Code.COMPILER) from e
        raise
    finally:
        del _running[process.pid]
    return process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
