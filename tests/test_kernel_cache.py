"""The kernel cache and the compiler behind it: whatever fails, training goes on, with a warning."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from npu_fuse_pass import clear_cache
from npu_fuse_pass.lowerings.cpu import build as cpu_build

from .kernel_cache import Path, counting_compiler, digest, fused, own_cache, put, record_loads, script, train_compiled

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(name="kernel_cache")
def _kernel_cache(tmp_path: Path) -> Iterator[Path]:
    with own_cache(tmp_path) as folder:
        yield folder


# Compilers that fail -------------------------------------------------------------------------------------------------

FAILING = {
    "status 1": 'case "$*" in *--version*) echo 1.0;; *) echo "cannot do that" >&2; exit 1;; esac',
    "always status 1": "exit 1",
    "killed": "kill -9 $$",
    "writes nothing": "exit 0",
    "writes no library": 'for x; do out="$x"; done; case "$*" in *--version*) ;; *) echo garbage > "$out";; esac',
    "not a program": "\x00\x01",
}


@pytest.mark.parametrize("how", FAILING)
def test_a_failing_compiler(how: str, kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx = script(tmp_path / "cxx", FAILING[how])
    if how == "not a program":
        Path(cxx).write_bytes(b"\x7fELF nothing")
    monkeypatch.setenv("CXX", cxx)
    report, messages = train_compiled()
    assert report.fallback is not None
    assert "compiler" in report.fallback
    assert {g.lowering for g in report.groups} == {"interpreter"}
    assert len(messages) == 1, messages
    assert "compiler" in messages[0]
    counted, calls = counting_compiler(tmp_path / "good")
    shutil.copy(counted, cxx)  # the same compiler works again
    assert fused() == []
    assert calls() == 1


def test_no_compiler(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    report, messages = train_compiled()
    assert {g.lowering for g in report.groups} == {"interpreter"}
    assert len(messages) == 1
    assert "no C++ compiler found: install" in messages[0]


# Folders that cannot be used -----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_cache.write_text("a file")
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(kernel_cache / "below"))
    messages = fused()
    assert messages
    assert all("NPU_FUSE_CACHE_DIR" in m and str(kernel_cache) in m for m in messages)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=os.strerror)
def test_a_folder_that_cannot_be_written(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def replace(source: Any, target: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(cpu_build.os, "replace", replace)
    messages = fused()
    assert messages
    assert all(os.strerror(error) in m for m in messages)
    assert not list(kernel_cache.iterdir())  # no rest is left behind


def test_a_folder_of_another_user(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = record_loads(monkeypatch)
    assert fused() == []
    theirs = {digest(p) for p in kernel_cache.glob("*.so")}
    for path in kernel_cache.glob("*.so"):
        put(path, path.read_bytes() + b"changed")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    messages = fused()
    assert any("belongs to user" in m for m in messages)
    assert loads[0] in theirs
    assert all((digest(p) not in loads[1:]) for p in kernel_cache.glob("*.so"))


def test_a_folder_that_others_may_write(kernel_cache: Path) -> None:
    """Others lose the right, or the kernels go elsewhere; a folder like /tmp, made for others, stays as it is."""
    kernel_cache.mkdir()
    kernel_cache.chmod(0o770)
    fused()
    made = list(kernel_cache.rglob("*.so"))
    assert made
    for path in made:
        assert not stat.S_IMODE(path.parent.stat().st_mode) & 0o077
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022


def test_a_folder_for_everybody_stays_one(kernel_cache: Path) -> None:
    kernel_cache.mkdir()
    kernel_cache.chmod(0o1777)
    fused()
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o1777
    assert all(not stat.S_IMODE(p.parent.stat().st_mode) & 0o077 for p in kernel_cache.rglob("*.so"))


def test_clear_cache(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx, calls = counting_compiler(tmp_path / "cxx")
    monkeypatch.setenv("CXX", cxx)
    fused()
    fused()
    assert calls() == 1
    clear_cache()
    assert not list(kernel_cache.rglob("*.so"))
    fused()
    assert calls() == 2


# Several processes ---------------------------------------------------------------------------------------------------

PROGRAM = """
import json, torch, npu_fuse_pass
from optimizers import NpuFusedAdam
p = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
step = torch.compile(NpuFusedAdam([p], lr=0.01).step, backend="npu_fused")
for _ in range(3):
    p.grad = p.detach().sin()
    step()
r = npu_fuse_pass.reports()[-1]
print(json.dumps([r.fallback, [g.lowering for g in r.groups], p.double().tolist()]))
"""


def start(cxx: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "CXX": cxx, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, text=True, stdout=-1, stderr=-1)


def result(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "npu_fused" not in err
    return json.loads(out.splitlines()[-1])


def test_processes_share_kernels(kernel_cache: Path, tmp_path: Path) -> None:
    """Two build the same kernel at the same moment; a third compiles nothing."""
    wait = f"touch {tmp_path}/started.$$; for i in $(seq 600); do "
    wait += f"[ $(ls {tmp_path}/started.* | wc -l) -ge 2 ] && break; sleep 0.1; done"
    cxx, calls = counting_compiler(tmp_path / "cxx", wait)
    first, second = [result(p) for p in [start(cxx), start(cxx)]]
    assert calls() == 2
    assert first == second
    assert first[:2] == [None, ["cpu"]]
    assert sorted(p.suffix for p in kernel_cache.iterdir() if not p.name.endswith(".so")) == [".sha256"]  # no rests
    third = result(start(cxx))
    assert calls() == 2
    assert third == first
