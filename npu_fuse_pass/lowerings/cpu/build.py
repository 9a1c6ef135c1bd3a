"""Compile C++ once and keep it: an on-disk cache of shared libraries that is safe to share and hard to poison.

A library is found under a hash of everything that went into it: source, flags, compiler version, machine and processor
features. It is built under a temporary name and moved into place, so that two processes may build it at once. Before
loading, the folder must belong to us with mode 0700 and the file must hash to what was noted when it was built.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings

from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.reasons import Code

_FLAGS = [
    "-std=c++17",
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

_loaded: dict[str, ctypes.CDLL] = {}


def load(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library of this C++ source, from memory, from the cache, or compiled now.

    Args:
        source: C++.
        flags: for the compiler, after those that all have.

    Raises:
        PlatformError: there is no working C++ compiler, or it refuses the source.
    """
    key = hashlib.sha256("\0".join([source, *flags, *_identity()]).encode()).hexdigest()[:32]
    if key not in _loaded:
        _loaded[key] = _load(key, source, flags)
    return _loaded[key]


def clear_cache() -> None:
    """Remove every compiled kernel from disk; those already loaded stay usable."""
    folder = _folder()
    if folder is not None:
        for path in folder.glob("*.so*"):
            path.unlink(missing_ok=True)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of g++, c++, clang++ on PATH."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


@functools.cache
def _identity() -> tuple[str, ...]:
    """What a binary depends on beside its source."""
    cxx = compiler()
    if cxx is None:
        raise PlatformError("no C++ compiler found: install g++ or clang++, or set CXX", Code.COMPILER)
    version = _call([*cxx.split(), "--version"]).stdout
    return (cxx, version, " ".join(_flags()), platform.machine(), _processor_features())


def _flags() -> list[str]:
    return [*_FLAGS, *([_NATIVE[platform.machine()]] if platform.machine() in _NATIVE else [])]


def _processor_features() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _folder() -> pathlib.Path | None:
    """The cache folder, made with mode 0700; None, with a warning, where it cannot be used."""
    base = os.environ.get("NPU_FUSE_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(base) if base else pathlib.Path(cache).expanduser() / "npu_fuse_pass"
    try:
        if folder.is_dir() and not _private(folder):
            status = folder.stat()
            shared = status.st_uid == 0 and status.st_mode & stat.S_ISVTX  # /tmp: nobody else can replace what is ours
            if status.st_uid != os.getuid() and not shared:
                raise PermissionError(f"it belongs to user {status.st_uid}")
            folder = folder / "npu_fuse_pass"  # a folder of ours in one that others use; theirs stays as it is
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(folder):
            raise PermissionError("it is not ours alone (owner and mode 0700)")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except (OSError, RuntimeError) as e:
        warnings.warn(
            f"npu_fused: the kernel cache {folder} cannot be used ({e}); kernels are compiled anew in every process. "
            "Set NPU_FUSE_CACHE_DIR to a folder of your own.",
            stacklevel=2,
        )
        return None
    return folder


def _private(folder: pathlib.Path) -> bool:
    status = folder.lstat()
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077


def _load(key: str, source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    folder = _folder()
    if folder is not None:
        try:
            cached = _trusted(folder, key)
            return _open(cached) if cached else _build(source, flags, folder, key)
        except OSError as e:
            warnings.warn(f"npu_fused: cannot use the kernel cache {folder}: {e}", stacklevel=2)
    with tempfile.TemporaryDirectory() as temporary:
        return _open(_compile(source, flags, pathlib.Path(temporary) / f"{key}.so"))


def _build(source: str, flags: tuple[str, ...], folder: pathlib.Path, key: str) -> ctypes.CDLL:
    """Compile aside, load, and move into place under the content's hash; the note that points there comes last."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = _compile(source, flags, pathlib.Path(temporary) / "kernel.so")
        library = _open(made)
        digest = _digest(made)
        os.replace(made, folder / f"{key}-{digest[:16]}.so")
        note = pathlib.Path(temporary) / "note"
        note.write_text(digest)
        os.replace(note, folder / f"{key}.so.sha256")
    return library


def _open(library: pathlib.Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as e:
        raise PlatformError(f"the C++ compiler made a library that does not load: {e}", Code.COMPILER) from e


def _trusted(folder: pathlib.Path, key: str) -> pathlib.Path | None:
    """The cached library, if it and its note are ours and it holds what was once built."""
    note = folder / f"{key}.so.sha256"
    try:
        digest = note.read_text()
        library = folder / f"{key}-{digest[:16]}.so"
        for path in (library, note):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
        return library if digest == _digest(library) else None
    except (OSError, ValueError):
        return None


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(source: str, flags: tuple[str, ...], library: pathlib.Path) -> pathlib.Path:
    cxx = compiler()
    if cxx is None:
        raise PlatformError("no C++ compiler found: install g++ or clang++, or set CXX", Code.COMPILER)
    text = library.with_suffix(".cpp")
    text.write_text(source)
    command = [*cxx.split(), *_flags(), str(text), *flags, "-o", str(library)]
    done = _call(command)
    if done.returncode or not library.is_file():
        raise PlatformError(f"the C++ compiler failed ({' '.join(command)}):\n{done.stderr[-2000:]}", Code.COMPILER)
    library.chmod(0o700)
    text.unlink()
    return library


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise PlatformError(f"the C++ compiler {command[0]} cannot be run: {e}", Code.COMPILER) from e
