"""Stand-ins for the shared libraries of CANN, so that the real torch_npu wheel imports on a machine without an NPU.

    python tests/npu/cann_stubs.py FOLDER        # then LD_LIBRARY_PATH=FOLDER python ...

The wheel's libraries name libraries of CANN (libhccl.so, libascendcl.so, ...) and take functions from them. One
library here defines each of those functions as "return 0"; the others are empty. torchair's conversion from FX to GE
is Python and calls none of them. Nothing can be executed on a device with these.

Needs gcc, nm and readelf (gcc and binutils). A second call with the same wheel builds nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

RETURN_ZERO = {"x86_64": "xorl %eax, %eax; ret", "aarch64": "mov w0, #0; ret"}
PYTHON_API = ("Py", "_Py")
DEFINER = "libascendcl.so"


def wheel_libraries(site: Path) -> list[Path]:
    """The shared libraries of torch_npu, torchair's included."""
    return sorted((site / "torch_npu").rglob("*.so"))


def output_of(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def wanted_symbols(library: Path) -> set[str]:
    """Functions that the library takes from elsewhere, without Python's. Weak ones ("w") may stay undefined."""
    rows = (line.split() for line in output_of("nm", "-D", "--undefined-only", str(library)))
    return {row[1].split("@")[0] for row in rows if row[0] == "U" and not row[1].startswith(PYTHON_API)}


def defined_symbols(library: Path) -> set[str]:
    rows = (line.split() for line in output_of("nm", "-D", "--defined-only", str(library)))
    return {row[-1].split("@")[0] for row in rows if row}


def needed_libraries(library: Path) -> set[str]:
    """File names that the library asks the loader for."""
    return {line.split("[")[1].rstrip("]") for line in output_of("readelf", "-d", str(library)) if "(NEEDED)" in line}


def missing(site: Path) -> tuple[set[str], set[str]]:
    """(library names, function names) that the wheel wants and that neither it, torch nor the system has."""
    wheel = wheel_libraries(site)
    torch = sorted((site / "torch" / "lib").glob("*.so*"))
    present = {path.name for path in [*wheel, *torch, *(site / "torch_npu.libs").glob("*.so*")]}
    needed = set().union(*(needed_libraries(library) for library in wheel)) - present
    # The C and C++ runtimes' names carry a version (libc.so.6), CANN's do not. A stub must never hide a runtime's
    # function (dlopen, pthread_create), so the loader is asked for each.
    names = {name for name in needed if name.endswith(".so")}
    runtimes = [ctypes.CDLL(None), *(ctypes.CDLL(name) for name in sorted(needed - names))]
    defined = set().union(*(defined_symbols(library) for library in [*wheel, *torch]))
    wanted = set().union(*(wanted_symbols(library) for library in wheel)) - defined
    return names | {DEFINER}, {s for s in wanted if not any(hasattr(runtime, s) for runtime in runtimes)}


def assembler(symbols: set[str]) -> str:
    body = RETURN_ZERO[platform.machine()]
    lines = [f".globl {s}\n.type {s}, %function\n{s}: {body}\n.size {s}, .-{s}" for s in sorted(symbols)]
    return "\n".join([".text", *lines, '.section .note.GNU-stack, "", %progbits', ""])


def fingerprint(site: Path) -> str:
    sizes = [(str(path.relative_to(site)), path.stat().st_size) for path in wheel_libraries(site)]
    return hashlib.sha256(repr((sizes, Path(__file__).read_text())).encode()).hexdigest()


def build(folder: Path, site: Path) -> str:
    """Fill the folder unless it is up to date; a sentence that says which."""
    stamp = folder / "stamp"
    key = fingerprint(site)
    if stamp.exists() and stamp.read_text() == key:
        return "CANN stubs are up to date"
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    names, symbols = missing(site)
    (folder / "functions.S").write_text(assembler(symbols))
    (folder / "empty.S").write_text(assembler(set()))
    for name in sorted(names):
        source = folder / ("functions.S" if name == DEFINER else "empty.S")
        subprocess.run(["gcc", "-shared", "-fPIC", "-nostdlib", "-o", str(folder / name), str(source)], check=True)
    stamp.write_text(key)
    seconds = time.perf_counter() - start
    return f"built {len(names)} CANN stub libraries with {len(symbols)} functions in {seconds:.1f} s"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {Path(__file__).name} FOLDER")
    print(build(Path(sys.argv[1]), Path(sysconfig.get_paths()["platlib"])))
