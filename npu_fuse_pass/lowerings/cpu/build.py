"""Compile C++ once and keep it: libraries in memory, then in the cache on disk, then from the compiler.

A library is found under a hash of everything that went into it: source, flags, compiler version, machine and processor
features. It is built under a temporary name and moved into place, so that two processes may build it at once. Where the
cache cannot be used, kernels are built in a temporary folder: slower to start, and said so.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pathlib
import threading
from collections.abc import Sequence

from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.lowerings.cpu.compiler import CompilerTimeoutError, compile_library, identity
from npu_fuse_pass.lowerings.kernels import cache
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.user_warnings import warn

BESIDE = "npu_fuse_pass: compiling beside a step"
"""The name of a thread that loads what a step does not wait for."""

_log = logging.getLogger(__name__)
_OWN_FOLDER = "set NPU_FUSE_CACHE_DIR or TMPDIR to a folder of your own"

_said: set[str] = set()  # Python forgets that it was, where torch catches warnings
_loaded: dict[str, ctypes.CDLL] = {}
_locks: dict[str, threading.Lock] = {}
os.register_at_fork(after_in_child=_locks.clear)


def load(source: str, functions: Sequence[str], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library of this C++ source, from memory, from the cache, or compiled now.

    Args:
        source: C++.
        functions: the names that it has to export.
        flags: for the compiler, after those that all have.

    Raises:
        PlatformError: there is no working C++ compiler, it refuses the source, or there is no folder to build in.
    """
    key = cache.key_of(source, *flags, *identity())
    if key not in _loaded:
        with _locks.setdefault(key, threading.Lock()):  # threads that want the same
            if key not in _loaded:
                _loaded[key] = _load(key, source, functions, flags)
    return _loaded[key]


def _load(key: str, source: str, functions: Sequence[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    folder = _usable_cache()
    reason: Exception | None = None
    if folder is not None:
        try:
            return _cached(folder, key, functions) or _build(source, functions, flags, folder, key)
        except CompilerTimeoutError:
            raise
        except (OSError, PlatformError) as e:  # the folder may be to blame: a full disk, a quota
            reason = e
    try:
        library = _build(source, functions, flags, None, key)
    except OSError as e:
        before = f"; in the cache {folder}: {reason}" if reason else ""
        text = f"there is no folder to compile kernels in: {e}{before}"
        raise PlatformError(text, Code.COMPILER, _OWN_FOLDER) from e
    if reason is not None:
        _warn(folder, reason)
    return library


def _usable_cache() -> pathlib.Path | None:
    folder: pathlib.Path | None = None
    try:
        folder = cache.cache_folder()
        return cache.usable(folder)
    except (OSError, RuntimeError) as e:
        _warn(folder, e)
    return None


def _warn(folder: pathlib.Path | None, reason: Exception) -> None:
    text = (
        f"npu_fused: the kernel cache {folder or ''} cannot be used ({reason}); kernels are compiled anew in every "
        "process. Set NPU_FUSE_CACHE_DIR to a folder of your own where that is otherwise."
    )
    if threading.current_thread().name == BESIDE:
        _log.info("%s", text)  # no line of the user's is here, and the step's own kernels say it
    elif text not in _said:
        _said.add(text)
        warn(text)


def _cached(folder: pathlib.Path, key: str, functions: Sequence[str]) -> ctypes.CDLL | None:
    path = cache.trusted(folder, key)
    try:
        return _open(path, functions) if path is not None else None
    except PlatformError:
        return None


def _build(
    source: str, functions: Sequence[str], flags: tuple[str, ...], folder: pathlib.Path | None, key: str
) -> ctypes.CDLL:
    """Compile, load, and keep it if it is the cache that it was compiled in."""
    with cache.build_folder(folder) as temporary:
        path = compile_library(source, flags, pathlib.Path(temporary))
        library = _open(path, functions)
        if folder is not None:
            try:
                cache.publish(path, folder, key)
            except OSError as e:
                _warn(folder, e)
    return library


def _open(path: pathlib.Path, functions: Sequence[str]) -> ctypes.CDLL:
    """Load a library.

    Raises:
        PlatformError: it does not load, or lacks one of these functions.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        if cache.noexec(path.parent):
            text = f"no library can be loaded from {path.parent.parent}, which is mounted noexec"
            raise PlatformError(text, Code.COMPILER, f"{_OWN_FOLDER} elsewhere") from e
        raise PlatformError(f"the C++ compiler made a library that does not load: {e}", Code.COMPILER) from e
    missing = next((name for name in functions if not hasattr(library, name)), None)
    if missing is not None:
        raise PlatformError(f"the C++ compiler made a library without the function {missing}", Code.COMPILER)
    return library
