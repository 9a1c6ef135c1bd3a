"""Run every Python code block of Markdown files, each as its own script from an empty folder.

    python scripts/readme_blocks.py README.md docs/from_torch_npu.md

The blocks run with the interpreter that runs this file, so that an empty environment with only the wheel
shows what a newcomer gets. A block is left out only where the line before it says why:
`<!-- not-run: reason -->`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

FENCE = re.compile(r"^(?P<indent> {0,3})(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+.-]*)")
NOT_RUN = re.compile(r"^\s*<!--\s*not-run:\s*(?P<reason>\S.*?)\s*-->\s*$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A Python code block: its first line's number in the file, its text, and why it is not run, if so."""

    line: int
    code: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """The Python blocks of a Markdown text, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    reason: str | None = None
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if opening is None:
            remark = NOT_RUN.match(lines[at])
            if remark or lines[at].strip():
                reason = remark["reason"] if remark else None
            at += 1
            continue
        start = at = at + 1
        closing = re.compile(rf"^ {{0,3}}{opening['fence'][0]}{{{len(opening['fence'])},}}\s*$")
        while at < len(lines) and not closing.match(lines[at]):
            at += 1
        if at == len(lines):
            raise SystemExit(f"line {start}: this code block is never closed")
        if opening["language"].lower() in ("python", "py", "python3"):
            indent = len(opening["indent"])
            code = "\n".join(line.removeprefix(" " * indent) for line in lines[start:at])
            found.append(Block(start + 1, code + "\n", reason))
        reason = None
        at += 1
    return found


def run(block: Block, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run one block as a script, from an empty folder and with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "work", "block.py")
        script.parent.mkdir()
        script.write_text(block.code, encoding="utf-8")
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env |= {"NPU_FUSE_CACHE_DIR": str(pathlib.Path(folder, "cache")), "PYTHONUTF8": "1"}
        try:
            return subprocess.run(
                [sys.executable, script.name],
                cwd=script.parent,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as e:
            output = e.stdout.decode() if isinstance(e.stdout, bytes) else (e.stdout or "")
            return subprocess.CompletedProcess(e.cmd, 124, f"{output}\nstopped after {timeout} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE")
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="per block")
    args = parser.parse_args()
    found = [(file, block) for file in args.files for block in blocks(file.read_text(encoding="utf-8"))]
    failed = ran = 0
    for number, (file, block) in enumerate(found, 1):
        where = f"  [{number}/{len(found)}] {file.name}:{block.line}"
        if block.not_run is not None:
            print(f"{where}: not run: {block.not_run}", flush=True)
            continue
        start = time.perf_counter()
        result = run(block, args.timeout)
        ran += 1
        failed += result.returncode != 0
        outcome = f"FAILED (exit status {result.returncode})" if result.returncode else "ok"
        print(f"{where}: {outcome}, {time.perf_counter() - start:.1f} s", flush=True)
        if result.returncode:
            print(block.code, result.stdout, sep="--- output\n", flush=True)
    print(f"{ran} of {len(found)} blocks ran, {failed} failed")
    if not ran:
        print("no block ran: that cannot be right")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
