"""The folder in which compiled kernels are kept: safe to share between processes, hard to poison for other users.

It is a folder of our own below the one that the user names, so that whatever else is there is none of our business.
No other user may write it, nor anything above it: what was checked stays what it is until it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import stat
import tempfile
import time

_OWN = "npu_fuse_pass"
_LIBRARY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.(so|o|ir|block|proof|runs)")
_NOTE = re.compile(r"[0-9a-f]{32}\.(so|o|ir|block|proof|runs)\.sha256")
_BUILD = "build-"
_ABANDONED = 6 * 3600.0  # seconds after which no build is at work any more


def cache_folder() -> pathlib.Path:
    """The folder where kernels are kept; `usable` checks that it is there and can be used.

    Raises:
        RuntimeError: there is no home folder.
    """
    named = os.environ.get("NPU_FUSE_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(named).expanduser().absolute() / _OWN


def usable(folder: pathlib.Path) -> pathlib.Path:
    """Make the folder if need be; the folder without links on the way to it.

    Raises:
        OSError: it cannot be made or written, another user may write it, or nothing can be loaded from it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    _check_safe(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError("it is not writable")
    if noexec(folder):
        raise PermissionError("its file system is mounted noexec, so that no code on it can be run")
    return folder


def noexec(folder: pathlib.Path) -> bool:
    """True if a folder's file system is mounted so that libraries in it cannot be loaded."""
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def build_folder(folder: pathlib.Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder to compile in, which is removed at the end: in the cache, or where temporary files are."""
    if folder is not None:
        _remove_builds(folder, time.time() - _ABANDONED)
    return tempfile.TemporaryDirectory(prefix=_BUILD, dir=folder, ignore_cleanup_errors=True)


def publish(library: pathlib.Path, folder: pathlib.Path, key: str, kind: str = "so") -> None:
    """Move a library into the cache under its content's hash; the note that points there comes last."""
    digest = _digest(library)
    note = library.with_name("note")
    note.write_text(digest)
    os.replace(library, folder / f"{key}-{digest[:16]}.{kind}")
    os.replace(note, folder / f"{key}.{kind}.sha256")


def trusted(folder: pathlib.Path, key: str, kind: str = "so") -> pathlib.Path | None:
    """The cached library, if it and its note are this user's and it holds what was once built."""
    note = folder / f"{key}.{kind}.sha256"
    try:
        digest = note.read_text()
        library = folder / f"{key}-{digest[:16]}.{kind}"
        for path in (library, note):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
        return library if digest == _digest(library) else None
    except (OSError, ValueError):
        return None


def kept(key: str, kind: str) -> bytes | None:
    """The cached content of a kind under a key; None if there is none, or it cannot be trusted."""
    try:
        path = trusted(usable(cache_folder()), key, kind)
        return None if path is None else path.read_bytes()
    except (OSError, RuntimeError):
        return None


def keep(key: str, kind: str, content: bytes) -> str:
    """Put content into the cache, in place of what it holds there.

    Returns:
        Why that is not possible, or "".
    """
    try:
        folder = usable(cache_folder())
        before = trusted(folder, key, kind)
        with build_folder(folder) as temporary:
            path = pathlib.Path(temporary, "content")
            path.write_bytes(content)
            publish(path, folder, key, kind)
        if before is not None and before != trusted(folder, key, kind):
            before.unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def drop(key: str, kind: str) -> None:
    """Remove a key's content from the cache."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = usable(cache_folder())
        path = trusted(folder, key, kind)
        (folder / f"{key}.{kind}.sha256").unlink(missing_ok=True)
        if path is not None:
            path.unlink(missing_ok=True)


def key_of(*parts: str) -> str:
    """A key for all that a result depends on."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def clear_cache() -> None:
    """Remove every compiled kernel from disk, and nothing else; those already loaded stay usable.

    What is kept beside kernels for an NPU goes, too: whether the self-test has proved them here.
    """
    folder = cache_folder()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in list(folder.iterdir()):
            if (_LIBRARY.fullmatch(path.name) or _NOTE.fullmatch(path.name)) and not path.is_dir():
                path.unlink(missing_ok=True)
        _remove_builds(folder, time.time())


def _remove_builds(folder: pathlib.Path, before: float) -> None:
    """Remove what killed processes have left."""
    for path in folder.glob(f"{_BUILD}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime <= before:
                shutil.rmtree(path)


def _check_safe(folder: pathlib.Path) -> None:
    """Refuse a folder that others may write or replace. What is below a folder closed to them is out of their reach."""
    reachable = True
    for path in (*reversed(folder.parents), folder):
        status, last = path.stat(), path == folder
        own = status.st_uid == os.getuid()
        sticky = status.st_mode & stat.S_ISVTX and not last  # /tmp: no other user can replace what is in it
        if not own and (last or (reachable and status.st_uid != 0)):
            raise PermissionError(f"{path} belongs to user {status.st_uid}")
        if status.st_mode & 0o022 and not sticky and (last or reachable):
            raise PermissionError(f"others may write {path}; chmod go-w takes that from them")
        reachable = reachable and not (own and not status.st_mode & 0o077)


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
