"""Files in the kernel cache that are not what was built there: never loaded, built anew."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import types
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.kernel_cache import GXX, Path, counting_compiler, digest, fused, put, record_loads


def other_owner(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    lstat = Path.lstat

    def other(path: Path) -> Any:
        status = lstat(path)
        if not path.name.endswith(suffix):
            return status
        return types.SimpleNamespace(st_mode=status.st_mode, st_uid=12345, st_size=status.st_size)

    monkeypatch.setattr(Path, "lstat", other)


CORRUPT: dict[str, Callable[[Path, Path], Any]] = {
    "garbage": lambda so, note: put(so, b"garbage"),
    "empty": lambda so, note: put(so, b""),
    "truncated": lambda so, note: put(so, so.read_bytes()[:5000]),
    "one bit": lambda so, note: put(so, so.read_bytes()[:-1] + bytes([so.read_bytes()[-1] ^ 1])),
    "gone": lambda so, note: so.unlink(),
    "a folder": lambda so, note: (so.unlink(), so.mkdir(), (so / "x").touch()),
    "a link": lambda so, note: (shutil.move(so, so.with_suffix(".moved")), so.symlink_to(so.with_suffix(".moved"))),
    "group-writable": lambda so, note: so.chmod(0o770),
    "note: garbage": lambda so, note: put(note, b"\xff\x00garbage"),
    "note: empty": lambda so, note: put(note, b""),
    "note: gone": lambda so, note: note.unlink(),
    "note: of something else": lambda so, note: put(note, b"0" * 64),
    "note: a path": lambda so, note: put(note, b"/../../../../../../etc/passwd"),
    "note: a folder": lambda so, note: (note.unlink(), note.mkdir(), (note / "x").touch()),
    "note: group-writable": lambda so, note: note.chmod(0o660),
}


@pytest.mark.parametrize("how", [*CORRUPT, "another owner", "note: another owner"])
def test_a_corrupt_file(how: str, kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never loaded; the kernel is built anew, once where the cache can be mended."""
    cxx, calls = counting_compiler(tmp_path / "cxx")
    monkeypatch.setenv("CXX", cxx)
    loads = record_loads(monkeypatch)
    assert fused() == []
    (library,), (note,) = kernel_cache.rglob("*.so"), kernel_cache.rglob("*.sha256")
    good = digest(library)
    if how in CORRUPT:
        CORRUPT[how](library, note)
    else:
        other_owner(monkeypatch, ".sha256" if "note" in how else ".so")
    bad = digest(library) if library.is_file() else None
    del loads[:]
    fused()
    assert calls() >= 2
    assert loads
    assert bad == good or bad not in loads
    if how != "a link":
        assert not library.is_file() or digest(library) == good
    if "folder" not in how and "owner" not in how:
        assert fused() == []
        assert calls() == 2


def test_a_planted_library(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code under the right name with a right note, but of another user, does not run."""
    source, library, marker = tmp_path / "evil.cpp", tmp_path / "evil.so", tmp_path / "it ran"
    source.write_text(
        f'#include <cstdio>\n__attribute__((constructor)) static void run() {{ fclose(fopen("{marker}", "w")); }}\n'
    )
    subprocess.run([GXX, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    fused()
    (note,) = kernel_cache.rglob("*.sha256")
    planted = note.parent / f"{note.name.split('.')[0]}-{digest(library)[:16]}.so"
    shutil.copy(library, planted)
    put(note, digest(library).encode())
    other_owner(monkeypatch, planted.name)
    fused()
    assert not marker.exists()
    ctypes.CDLL(str(library))
    assert marker.exists()  # it would have been seen
