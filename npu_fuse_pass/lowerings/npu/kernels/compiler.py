"""Ascend's compiler of kernels: bishengir-compile, and hivmc, which it calls last.

CANN has both. The wheel `ascendnpu-ir` has the first one only, which is enough to look at a kernel without an NPU: all
decisions of the schedule are in the IR before the last pass. A stand-in answers for hivmc then, and no binary comes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from npu_fuse_pass.errors import PlatformError
from npu_fuse_pass.lowerings.kernels import cache
from npu_fuse_pass.reasons import Code

TARGETS = (
    *("Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1"),  # A2
    *("Ascend910_9362", "Ascend910_9372", "Ascend910_9381", "Ascend910_9382", "Ascend910_9391", "Ascend910_9392"),  # A3
    *("Ascend910_9599", "Ascend950PR_9599"),  # 950: another binary
)
"""What the compiler can compile for: the chips' names."""
PREVIEW_TARGET = "Ascend910B3"
"""The target for which kernels are shown where there is no chip."""
_FLAGS = (
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
    "--enable-auto-multi-buffer=true",
)
_NEWER = ("--enable-vf-fusion=false",)
"""Tried for 950 where it does not compile otherwise: its fusion of vector operations crashes where sums over elements
follow from a value with several uses that was computed first (LAMB behind a clip by a total)."""
_PRINT = ("--mlir-print-ir-before=convert-hivm-to-std", "--mlir-print-ir-module-scope", "--mlir-disable-threading")
_DUMP = re.compile(
    r"^.*IR Dump Before ConvertHIVMToStandard.*\n((?:(?!\[ERROR\]|loc\(|// -----//).*\n)*)", re.MULTILINE
)
_STAND_IN = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'hivmc stand-in 1.2.0' && exit 0\nexit 1\n"
_BELOW = ("bin", "tools/bishengir/bin", "compiler/bishengir/bin", "bisheng_toolkit/bishengir/bin")
_LONGEST = 300  # seconds


class Refused(PlatformError):  # noqa: N818 - stages pass it on: another form computes the group
    """A kernel cannot be compiled, loaded or launched here; says why."""

    def __init__(self, text: str) -> None:
        super().__init__(text, Code.PLATFORM, "nothing has to be done: GE operations or the original compute the group")


@dataclasses.dataclass(frozen=True)
class Compiler:
    """One compiler and what it compiles for.

    Attributes:
        program: bishengir-compile.
        target: one of `TARGETS`.
        last: hivmc; "" where there is none, so that no binary can be made.
        also: versions of what the binary depends on besides, for the cache.
    """

    program: str
    target: str
    last: str = ""
    also: str = ""

    @property
    def identity(self) -> str:
        """Whatever a binary or an IR depends on beside the source."""
        versions = [_version(tool) for tool in (self.program, self.last) if tool]
        return "; ".join([self.target, *versions, self.also, *_FLAGS, *(_NEWER if _newer(self.target) else ())])

    def last_ir(self, source: str) -> str:
        """The module before its operations become calls: what it moves, its buffers, its flags.

        Raises:
            Refused: the compiler does not take the source; holds its errors.
        """
        key = cache.key_of(source, self.identity)
        kept = cache.kept(key, "ir")
        return kept.decode() if kept is not None else self._compiled(source, key)[0]

    def binary(self, source: str) -> bytes:
        """What is loaded on the device.

        Raises:
            Refused: the compiler does not take the source, or there is no hivmc.
        """
        self.check_last()
        key = cache.key_of(source, self.identity)
        kept = cache.kept(key, "o")
        made = kept if kept is not None else self._compiled(source, key)[1]
        if made is None:
            raise Refused("bishengir-compile made no binary, and no error either")
        return made

    def check_last(self) -> None:
        """Raises:
        Refused: there is no hivmc.
        """
        if not self.last:
            raise Refused(f"there is no hivmc beside {self.program}: CANN has it, the wheel ascendnpu-ir has not")

    def _compiled(self, source: str, key: str) -> tuple[str, bytes | None]:
        """The last IR and the binary; both are kept in the cache."""
        try:
            text, binary = self._run_once(source, ())
        except Refused:
            if not _newer(self.target):
                raise
            text, binary = self._run_once(source, _NEWER)
        cache.keep(key, "ir", text.encode())
        if binary is not None:
            cache.keep(key, "o", binary)
        return text, binary

    def _run_once(self, source: str, more: tuple[str, ...]) -> tuple[str, bytes | None]:
        """The last IR and the binary, with these flags besides."""
        newer = "-a5" if _newer(self.target) else ""
        with tempfile.TemporaryDirectory(prefix="npu_fuse_kernel_") as made_in:
            folder = pathlib.Path(made_in)
            (folder / "kernel.mlir").write_text(source, encoding="utf-8")
            if not self.last:
                stand_in = folder / f"hivmc{newer}"
                stand_in.write_text(_STAND_IN, encoding="utf-8")
                stand_in.chmod(0o755)
            first = os.path.dirname(self.last) if self.last else made_in
            path = os.pathsep.join([first, os.environ.get("PATH", "")])
            given = [f"--target={self.target}", *_FLAGS, *more, *_PRINT]
            command = [self.program, "kernel.mlir", *given, "-o", "kernel.o"]
            done = _run(command, made_in, {**os.environ, "PATH": path})
            dump, output = _DUMP.search(done.stderr), folder / "kernel.o"
            failed = bool(self.last) and (done.returncode != 0 or not output.is_file())
            if dump is None or failed:
                errors = "\n".join(line for line in done.stderr.splitlines() if "error" in line.lower())
                raise Refused(
                    "bishengir-compile does not take this kernel: "
                    + (errors[:2000] or done.stderr[-2000:].strip() or f"exit status {done.returncode}")
                )
            return dump[1], output.read_bytes() if self.last else None


def find(target: str, also: str = "") -> Compiler:
    """The compiler of this machine: of CANN where its environment names it, else the wheel's.

    `BISHENG_INSTALL_PATH`, `PATH`, then folders below `ASCEND_HOME_PATH` and `ASCEND_TOOLKIT_HOME`.

    Args:
        target: of `TARGETS`.
        also: versions for the cache.

    Raises:
        Refused: there is none, or it compiles for no such chip.
    """
    if target not in TARGETS:
        raise Refused(f"the compiler has no target of the name {target or 'that torch_npu cannot tell'}")
    newer = "-a5" if _newer(target) else ""
    program = _tool(f"bishengir-compile{newer}", [_wheel()])
    if program is None:
        raise Refused(
            "bishengir-compile was not found: source CANN's set_env.sh, set BISHENG_INSTALL_PATH to its folder, or "
            "pip install ascendnpu-ir to look at kernels without CANN"
        )
    last = _tool(f"hivmc{newer}", [os.path.dirname(program)])
    return Compiler(program, target, last or "", also)


def _newer(target: str) -> bool:
    return "950" in target or "_95" in target


def _tool(name: str, more: list[str]) -> str | None:
    roots = [os.environ.get(name, "") for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    below = [os.path.join(root, *part.split("/")) for root in roots if root for part in _BELOW]
    places = [os.environ.get("BISHENG_INSTALL_PATH", ""), *os.environ.get("PATH", "").split(os.pathsep), *below, *more]
    return shutil.which(name, path=os.pathsep.join(p for p in places if p))


def _wheel() -> str:
    """The folder with programs of the wheel `ascendnpu-ir`, found without importing it; "" without the wheel."""
    found = importlib.util.find_spec("ascendnpuir")
    return "" if found is None or found.origin is None else str(pathlib.Path(found.origin).parent / "bin")


@functools.cache
def _version(program: str) -> str:
    try:
        done = _run([program, "--version"], None, dict(os.environ))
    except Refused as e:
        return str(e)
    return " ".join(done.stdout.split())


def _run(command: list[str], folder: str | None, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=folder, timeout=_LONGEST, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Refused(f"{os.path.basename(command[0])} cannot be run: {type(e).__name__}: {e}") from e
