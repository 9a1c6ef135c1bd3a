"""Stand-ins for CUDA's libraries, so that a CUDA build of torch imports where none of them is installed.

    python scripts/cuda_stubs.py VENV     # writes VENV/cuda-stubs; then LD_LIBRARY_PATH=VENV/cuda-stubs python ...

torch's index on many machines has CUDA builds alone, which pull gigabytes. Each library that torch asks the loader for
and that is not there is made here, with every function that torch's libraries lack returning 100 ("no device"). Nothing
runs on a device with these. Needs gcc, nm and readelf.
"""

from __future__ import annotations

import ctypes
import pathlib
import re
import subprocess
import sys

RUNTIMES = re.compile(r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux.*|libgomp|libutil)[.-]")
ELSEWHERE = ("Py", "_Py", "_Z")  # Python's and C++'s names


def output_of(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def symbols(file: pathlib.Path, which: str) -> set[str]:
    rows = (line.split() for line in output_of("nm", "-D", which, str(file)))
    return {row[-1].split("@")[0] for row in rows if row and row[-2] not in "wv"}


def versions(files: list[pathlib.Path]) -> dict[str, set[str]]:
    """What versions of the symbols of each library are asked for."""
    found: dict[str, set[str]] = {}
    for file in files:
        library = ""
        for line in output_of("readelf", "-V", str(file)):
            if m := re.search(r"File: (\S+)", line):
                library = m.group(1)
            elif library and (m := re.search(r"Name: (\S+)", line)):
                found.setdefault(library, set()).add(m.group(1))
    return found


def main() -> None:
    venv = pathlib.Path(sys.argv[1])
    out = venv / "cuda-stubs"
    out.mkdir(exist_ok=True)
    libraries = next(venv.glob("lib/python*/site-packages/torch/lib"))
    files = [*libraries.glob("*.so*"), *libraries.parent.glob("_C*.so")]
    rows = (line for file in files for line in output_of("readelf", "-d", str(file)) if "(NEEDED)" in line)
    needed = {line.split("[")[1].rstrip("]") for line in rows} - {file.name for file in files}
    runtimes = [ctypes.CDLL(None), *(ctypes.CDLL(name) for name in sorted(needed) if RUNTIMES.match(name))]
    missing = sorted(name for name in needed if not RUNTIMES.match(name))
    wanted = set[str]().union(*(symbols(file, "--undefined-only") for file in files))
    wanted -= set[str]().union(*(symbols(file, "--defined-only") for file in files))
    names = [n for n in sorted(wanted) if not n.startswith(ELSEWHERE) and not any(hasattr(r, n) for r in runtimes)]
    source = out / "stubs.c"
    source.write_text("\n".join(f"int {name}(void) {{ return 100; }}" for name in names), encoding="utf-8")
    asked = versions(files)
    for name in missing:
        script = out / f"{name}.map"
        first, *others = sorted(asked.get(name, {"STUB"}))
        script.write_text("\n".join([f"{first} {{ global: *; }};", *(f"{v} {{ }};" for v in others)]), encoding="utf-8")
        flags = ["-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(out / name)], check=True)
    print(f"{len(missing)} libraries with {len(names)} functions in {out}")


if __name__ == "__main__":
    main()
