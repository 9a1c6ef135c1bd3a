"""The real middle-end of Ascend's compiler (bishengir-compile of the ascendnpu-ir wheel) without CANN.

Every pass of HFusion and HIVM runs on a CPU; only `hivmc`, the last step, belongs to CANN. A stand-in for it is on
PATH, so the compiler always fails in the end; the IR before its last pass is what tests read and run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile

from npu_fuse_pass.errors import FuseError

TARGETS = (
    *("Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1"),  # A2
    *("Ascend910_9362", "Ascend910_9372", "Ascend910_9381", "Ascend910_9382", "Ascend910_9391", "Ascend910_9392"),  # A3
    *("Ascend910_9599", "Ascend950PR_9599"),  # 950: another binary
)
_STAND_IN = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'hivmc stand-in 1.2.0' && exit 0\nexit 1\n"
_FLAGS = (
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
    "--enable-auto-multi-buffer=true",
    "--mlir-print-ir-before=convert-hivm-to-std",
    "--mlir-print-ir-module-scope",
    "--mlir-disable-threading",
)
_DUMP = re.compile(
    r"^.*IR Dump Before ConvertHIVMToStandard.*\n((?:(?!\[ERROR\]|loc\(|// -----//).*\n)*)", re.MULTILINE
)


class Refused(FuseError):  # noqa: N818 - the search for a block passes it on
    """The compiler does not take a kernel."""


@functools.cache
def _tool(name: str) -> str:
    """A program of the wheel, found without importing it."""
    found = importlib.util.find_spec("ascendnpuir")
    assert found is not None and found.origin is not None
    return str(pathlib.Path(found.origin).parent / "bin" / name)


@functools.cache
def final_ir(mlir: str, target: str = "Ascend910B3") -> str:
    """The module before its HIVM operations become calls: all decisions of the schedule are in it.

    Raises:
        Refused: a pass before that fails; holds the compiler's errors.
    """
    newer = "-a5" if "950" in target or "_95" in target else ""
    with tempfile.TemporaryDirectory() as folder:
        source, stand_in = pathlib.Path(folder, "in.mlir"), pathlib.Path(folder, "hivmc" + newer)
        source.write_text(mlir)
        stand_in.write_text(_STAND_IN)
        stand_in.chmod(0o755)
        command = [_tool("bishengir-compile" + newer), str(source), f"--target={target}", *_FLAGS]
        command += ["-o", f"{folder}/kernel.o"]
        path = os.pathsep.join([folder, os.environ["PATH"]])
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": path}, cwd=folder, timeout=300
        )
    dump = _DUMP.search(done.stderr)
    if dump is None:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Refused("\n".join(errors)[:2000] or done.stderr[-2000:] or f"exit status {done.returncode}")
    return dump[1]
