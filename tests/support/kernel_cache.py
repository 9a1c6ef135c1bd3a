"""What tests of the kernel cache share: a cache of its own, compilers that count, and a new process's first step."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from npu_fuse_pass.lowerings.cpu import build as cpu_build
from npu_fuse_pass.lowerings.cpu import compiler as cpu_compiler
from optimizers import NpuFusedAdam
from tests.support.cases import BY_NAME
from tests.support.training import SHAPES, assert_close, assert_fused, compiled, last_report, parameters, train, warned

GXX = shutil.which("g++") or "g++"
Path = pathlib.Path


def forget() -> None:
    """What a new process does not know."""
    cpu_compiler.forget()
    cpu_build._loaded.clear()


@contextlib.contextmanager
def own_cache(tmp_path: Path) -> Iterator[Path]:
    """The folder that a test names for the cache (not made yet), in what is like a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPU_FUSE_CACHE_DIR", str(tmp_path / "cache"))
        patch.setattr(cpu_build, "_loaded", {})
        forget()
        yield tmp_path / "cache"
        forget()


def record_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The content hashes of all libraries that are loaded from here on."""
    found: list[str] = []
    load = ctypes.CDLL

    def recording(name: str, *args: Any, **kwargs: Any) -> ctypes.CDLL:
        found.append(digest(Path(name)))
        return load(name, *args, **kwargs)

    monkeypatch.setattr(ctypes, "CDLL", recording)
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def put(path: Path, content: bytes) -> None:
    """Replace a file; what may be loaded must not change in place under the process."""
    path.unlink()
    path.write_bytes(content)


def script(path: Path, body: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def counting_compiler(path: Path, before: str = ":") -> tuple[str, Callable[[], int]]:
    """A C++ compiler, and how often it has compiled something (being asked for its version does not count)."""
    log = path.with_suffix(".log")
    body = f'case "$*" in *--version*) ;; *) echo "$@" >> {log}; {before};; esac\nexec {GXX} "$@"'
    return script(path, body), lambda: len(log.read_text().splitlines()) if log.exists() else 0


def train_compiled() -> tuple[Any, list[str]]:
    """Train compiled in what is like a new process, with right results; the report and the warnings of ours."""
    forget()
    params = parameters()
    oracle, step = BY_NAME["adam"].oracle(params), compiled(NpuFusedAdam(params, lr=0.02, weight_decay=0.05))
    said = warned(lambda: train(params, step, oracle))
    assert_close(params, oracle.values)
    return last_report(), said


def fused() -> list[str]:
    """Train compiled and fused; returns the warnings."""
    report, messages = train_compiled()
    assert_fused(report, parameters=len(SHAPES))
    return messages
