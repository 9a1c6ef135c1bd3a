"""Faults of the machine while a kernel is built: a way around each, or a fallback that says why."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types
from typing import Any

import pytest
import torch

import optimizers
from npu_fuse_pass.lowerings.cpu import compiler as cpu_compiler
from tests.support.forked import run_script
from tests.support.kernel_cache import GXX, Path, counting_compiler, fused, record_loads, script, train_compiled
from tests.support.training import at_once, last_report

ROOT = pathlib.Path(__file__).resolve().parents[3]


def interpreted() -> str:
    """Train with right results without a kernel; returns why there is none."""
    report, messages = train_compiled()
    assert {g.lowering for g in report.groups} == {"interpreter"}
    assert report.fallback is not None
    assert any(report.fallback in m for m in messages)
    assert f"not fused: {report.fallback}" in str(report) and "original" not in str(report)
    return str(report.fallback)


# What a compiler says and makes --------------------------------------------------------------------------------------


def wrapper(path: Path, body: str) -> str:
    """A C++ compiler that does something else when it is asked to compile; it knows "$out"."""
    return script(path, f'for x; do out="$x"; done\ncase "$*" in *--version*) ;; *) {body};; esac\nexec {GXX} "$@"')


def test_a_compiler_that_fails_without_a_word(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", wrapper(tmp_path / "cxx", "exit 1"))
    assert interpreted().endswith(") and said nothing")


def test_output_that_is_not_utf8(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "printf 'warning: caf\\351\\n'; printf 'caf\\351\\n' >&2"
    cxx = wrapper(tmp_path / "cxx", says)
    Path(cxx).write_text(Path(cxx).read_text().replace("case", f"{says}\ncase", 1))  # when asked for its version, too
    monkeypatch.setenv("CXX", cxx)
    assert fused() == []


def test_output_that_is_not_utf8_when_it_fails(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", wrapper(tmp_path / "cxx", "printf 'no \\351 here\\n' >&2; exit 1"))
    assert "here" in interpreted()


def test_a_path_that_is_not_utf8(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    cxx = wrapper(Path(os.fsdecode(folder)) / "cxx", ":")
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", os.fsdecode(folder) + "/cache")
    assert fused() == []


def test_a_library_without_its_function(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = f'{GXX} -shared -fPIC -x c++ /dev/null -o "$out"; exit 0'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "cxx", empty))
    assert "without the function" in interpreted()
    assert not list(kernel_cache.rglob("*.so"))  # a later process does not find it


def test_an_unusable_cxx_is_named(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    messages = fused()
    assert len(messages) == 1
    assert "CXX='no-such-compiler -O1'" in messages[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "CXX='no-such-compiler -O1'" in interpreted()


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_cxx_is_none(blank: str, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", blank)
    assert fused() == []


# Compilers that hang -------------------------------------------------------------------------------------------------


def ended(pid: Path) -> bool:
    """Whether the process whose number is in a file is gone, or gone before long."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid.read_text().strip()}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # nobody has asked how it ended
            return True
        time.sleep(0.1)
    return False


def hanging(tmp_path: Path) -> str:
    """A compiler that waits for a child of its own."""
    return wrapper(tmp_path / "cxx", f"echo called >> {tmp_path}/calls; sleep 1000 & echo $! > {tmp_path}/pid; wait")


def test_a_compiler_that_hangs(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", hanging(tmp_path))
    monkeypatch.setattr(cpu_compiler, "LIMIT", 2.0)
    assert "did not end within 2 s" in interpreted()
    assert ended(tmp_path / "pid")
    params = [torch.nn.Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    torch.compile(optimizers.NpuFusedLamb(params).step, backend="npu_fused")()  # another kernel
    assert (tmp_path / "calls").read_text() == "called\n"


LOOK = """
from npu_fuse_pass.lowerings.cpu import input_check
import pathlib, time
input_check._start()
while not pathlib.Path({pid!r}).exists():
    time.sleep(0.05)
print("ends", flush=True)
"""


def test_nobody_waits_for_a_compiler_at_the_end(kernel_cache: Path, tmp_path: Path) -> None:
    """The native check's is compiled in the background; that no step of an ended process has it is no news."""
    environment = {**os.environ, "CXX": hanging(tmp_path), "PYTHONPATH": str(ROOT)}
    code = LOOK.format(pid=str(tmp_path / "pid"))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, stdout=-1, stderr=-1) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "ends\n"
            assert process.wait(timeout=30) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert ended(tmp_path / "pid")
    assert not list(kernel_cache.rglob("build-*"))


# Places that cannot be written or run from ---------------------------------------------------------------------------


def test_no_folder_to_build_in(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError(2, "No usable temporary directory found")

    kernel_cache.write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    reason = interpreted()
    assert "No usable temporary directory" in reason
    assert "NPU_FUSE_CACHE_DIR or TMPDIR" in str(last_report().remedies)


def test_a_read_only_folder_for_temporary_files(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own temporary files lie in the cache, too."""
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    assert fused() == []


def test_a_full_disk_under_the_cache(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = f'case "$out" in {kernel_cache}/*) echo "ld: No space left on device" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", wrapper(tmp_path / "cxx", full))
    messages = fused()
    assert len(messages) == 1
    assert "No space left on device" in messages[0]
    assert str(kernel_cache) in messages[0]
    assert not list(kernel_cache.rglob("build-*"))


def test_no_space_for_the_source(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.suffix == ".cpp":
            raise OSError(28, os.strerror(28), str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in interpreted()


LIMITED = """
import resource, torch, optimizers, npu_fuse_pass
p = torch.nn.Parameter(torch.ones(3))
step = torch.compile(optimizers.NpuFusedSGD([p], lr=0.1).step, backend="npu_fused")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
p.grad = torch.ones(3)
step()
print(torch.allclose(p, torch.full((3,), 0.9)), npu_fuse_pass.reports()[-1].fallback)
"""


def test_a_limit_on_the_size_of_files(kernel_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(LIMITED)
    done = run_script(tmp_path / "limited.py", environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True the fused graph is interpreted:"), done.stdout
    assert "File too large" in done.stdout or "SIGXFSZ" in done.stdout


def test_a_cache_that_code_must_not_be_run_from(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statvfs, loads = os.statvfs, record_loads(monkeypatch)

    def mounted(path: Any) -> Any:
        flags = statvfs(path).f_flag
        return types.SimpleNamespace(f_flag=flags | os.ST_NOEXEC if str(path).startswith(str(kernel_cache)) else flags)

    monkeypatch.setattr(os, "statvfs", mounted)
    messages = fused()
    assert len(loads) == 1
    assert len(messages) == 1
    assert "noexec" in messages[0]


# Threads -------------------------------------------------------------------------------------------------------------


def test_threads_ask_for_the_backend_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that torch does not know yet, and that takes a moment to load, as in a new process."""
    registry = torch._dynamo.backends.registry

    class Slow:
        def load(self) -> Any:
            time.sleep(0.5)
            from npu_fuse_pass.backend import npu_fused

            return npu_fused

    torch._dynamo.list_backends()
    monkeypatch.setitem(registry._BACKENDS, "npu_fused", Slow())
    monkeypatch.delitem(registry._COMPILER_FNS, "npu_fused", raising=False)
    from npu_fuse_pass.rules import registration

    registration._register.cache_clear()

    def work() -> None:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        torch.compile(optimizers.NpuFusedSGD([p], lr=0.1).step, backend="npu_fused")()
        assert torch.allclose(p, torch.full((3,), 0.9))

    at_once(*[work] * 4)


def test_threads_build_at_once(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with the same kernel, first compiled at the same moment."""
    cxx, calls = counting_compiler(tmp_path / "cxx", "sleep 1")
    monkeypatch.setenv("CXX", cxx)
    from npu_fuse_pass.lowerings.cpu import build

    source = 'extern "C" int seven() { return 7; }'
    assert at_once(*[lambda: build.load(source, ["seven"]).seven()] * 3) == [7, 7, 7]
    assert calls() == 1
