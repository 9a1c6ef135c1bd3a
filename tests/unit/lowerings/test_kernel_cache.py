"""The kernel cache and the compiler behind it: whatever fails, training goes on, with a warning."""

from __future__ import annotations

import errno
import functools
import json
import os
import pathlib
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import npu_fuse_pass
import optimizers
from npu_fuse_pass import clear_cache
from npu_fuse_pass.lowerings.cpu import input_check
from tests.support.forked import run_script
from tests.support.kernel_cache import Path, counting_compiler, digest, fused, put, record_loads, script, train_compiled
from tests.support.training import at_once

ROOT = pathlib.Path(__file__).resolve().parents[3]


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


def test_an_unusable_folder_is_said_once(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a thread compiles the input check beside the kernel, and Python's filters would show it each time."""
    kernel_cache.write_text("a file")
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(kernel_cache / "once"))
    input_check.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for made in (optimizers.NpuFusedAdam, optimizers.NpuFusedLamb):
            params = [torch.nn.Parameter(torch.ones(3)) for _ in range(20)]
            for p in params:
                p.grad = torch.ones_like(p)
            npu_fuse_pass.compile_step(made(params))()
        input_check.wait()
    said = [w for w in caught if "kernel cache" in str(w.message)]
    assert len(said) == 1 and not said[0].filename.endswith("threading.py"), [str(w.message) for w in said]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=os.strerror)
def test_a_folder_that_cannot_be_written(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def replace(source: Any, target: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "replace", replace)
    messages = fused()
    assert messages
    assert all(os.strerror(error) in m for m in messages)
    assert not list((kernel_cache / "npu_fuse_pass").iterdir())  # no rest is left behind


def test_a_folder_of_another_user(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = record_loads(monkeypatch)
    assert fused() == []
    theirs = {digest(p) for p in kernel_cache.rglob("*.so")}
    for path in kernel_cache.rglob("*.so"):
        put(path, path.read_bytes() + b"changed")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    messages = fused()
    assert any("belongs to user" in m for m in messages)
    assert loads[0] in theirs
    assert all((digest(p) not in loads[1:]) for p in kernel_cache.rglob("*.so"))


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


def test_clear_cache_removes_what_is_ours_and_nothing_else(kernel_cache: Path) -> None:
    """The folder that is named may hold anything, and so may a folder of our own."""
    kernel_cache.mkdir(mode=0o700)
    foreign = ["thesis.sources.tex", "notes.so", "build-mine/x.cpp", "a.solver/y.so", f"{'0' * 32}-{'0' * 16}.so"]
    foreign += ["npu_fuse_pass/notes.so", f"npu_fuse_pass/{'0' * 31}.so.sha256", "npu_fuse_pass/more/x.so"]
    for name in foreign:
        (kernel_cache / name).parent.mkdir(exist_ok=True, mode=0o700)
        (kernel_cache / name).write_text("precious")
    fused()
    killed = kernel_cache / "npu_fuse_pass" / "build-killed"
    killed.mkdir()
    (killed / "kernel.cpp").touch()
    assert len(files_below(kernel_cache)) > len(foreign) + 1
    clear_cache()
    assert files_below(kernel_cache) == sorted(foreign)
    assert not killed.exists()


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_clear_cache_where_there_is_none(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    assert not kernel_cache.exists()
    kernel_cache.write_text("a file")
    clear_cache()
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(kernel_cache / "below"))
    clear_cache()
    assert kernel_cache.read_text() == "a file"


def test_what_killed_builds_left_is_removed(kernel_cache: Path) -> None:
    own = kernel_cache / "npu_fuse_pass"
    for name in ("build-old", "build-new", "other-old"):
        (own / name).mkdir(parents=True)
        (own / name / "kernel.cpp").touch()
    own.chmod(0o700)
    for name in ("build-old", "other-old"):
        os.utime(own / name, (0, 0))
    assert fused() == []
    assert sorted(p.name for p in own.iterdir() if p.is_dir()) == ["build-new", "other-old"]


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everybody may write, with no closed one above it; pytest's are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("below", [".", "mine", "mine/deeper"])
def test_a_folder_that_others_may_replace(
    below: str, open_to_all: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others could put code of theirs there between the check and the load: nothing is kept or loaded from there."""
    named = open_to_all / below
    named.mkdir(parents=True, exist_ok=True)
    (named / "npu_fuse_pass").mkdir(mode=0o700)
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(named))
    messages = fused()
    assert messages
    assert all(f"others may write {open_to_all}" in m and "chmod" in m for m in messages)
    assert not files_below(open_to_all)


def test_a_closed_folder_in_one_that_others_may_write(
    open_to_all: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /tmp is: in a sticky folder nobody else can replace what is ours."""
    open_to_all.chmod(0o1777)
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(open_to_all))
    assert fused() == []
    assert files_below(open_to_all)


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


def result(program: Path, cxx: str) -> Any:
    """What the program prints in a process of its own."""
    environment = {**os.environ, "CXX": cxx, "PYTHONPATH": str(ROOT)}
    done = run_script(program, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "npu_fused" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_processes_share_kernels(kernel_cache: Path, tmp_path: Path) -> None:
    """Two build the same kernel at the same moment; a third compiles nothing."""
    wait = f"touch {tmp_path}/started.$$; for i in $(seq 600); do "
    wait += f"[ $(ls {tmp_path}/started.* | wc -l) -ge 2 ] && break; sleep 0.1; done"
    cxx, calls = counting_compiler(tmp_path / "cxx", wait)
    (program := tmp_path / "program.py").write_text(PROGRAM)
    one = functools.partial(result, program, cxx)
    first, second = at_once(one, one)
    assert calls() == 2
    assert first == second
    assert first[:2] == [None, ["cpu"]]
    assert sorted(p.suffix for p in kernel_cache.rglob("*.*") if not p.name.endswith(".so")) == [".sha256"]  # no rests
    third = one()
    assert calls() == 2
    assert third == first
