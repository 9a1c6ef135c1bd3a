"""Running tests on a copy of the project with a bug planted in it, in a fork that has torch imported already."""

from __future__ import annotations

import ast
import functools
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence

from tests.support.forked import FORKS, ROOT, enter

OUTPUT = "output.txt"


def copy_of_the_project(folder: pathlib.Path) -> pathlib.Path:
    """With Python's bytecode, which counts for files that stay as they are; pytest's own would name the original's."""
    for name in ("npu_fuse_pass", "optimizers", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*-pytest-*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def plant(folder: pathlib.Path, place: str, old: str, new: str) -> None:
    """Replace the one `old` in the place of that name in a copy of the project.

    Raises:
        LookupError: there is no such text, or it is there more than once.
    """
    path, at = find(folder, place, old)
    text = path.read_text()
    path.write_text(text[:at] + new + text[at + len(old) :])


def find(folder: pathlib.Path, place: str, old: str) -> tuple[pathlib.Path, int]:
    """The file and the position there of a text in the place of that name; raises as `plant`."""
    found = []
    for path, (start, end) in _places(folder / "npu_fuse_pass", place):
        text = path.read_text()
        found += [(path, m.start()) for m in re.finditer(re.escape(old), text) if start <= m.start() < end]
    if len(found) != 1:
        raise LookupError(f"{place} holds the text {old!r} {len(found)} times: write the mutation anew")
    return found[0]


def _places(package: pathlib.Path, name: str) -> Iterator[tuple[pathlib.Path, tuple[int, int]]]:
    """Files, and from where to where in them a place of this name reaches."""
    if name == "C++":
        yield from ((path, (0, len(path.read_text()))) for path in (*package.rglob("*.h"), *package.rglob("*.cpp")))
    for path in package.rglob("*.py"):
        text = path.read_text()
        if name.partition(".")[0] not in text:
            continue
        starts = [0, *(m.end() for m in re.finditer("\n", text)), len(text)]
        for node in _named(_parsed(text).body, name):
            yield path, (starts[node.lineno - 1], starts[node.end_lineno or node.lineno])


_parsed = functools.cache(ast.parse)


def _named(body: Sequence[ast.stmt], name: str) -> Iterator[ast.stmt]:
    first, _, rest = name.partition(".")
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if first in (getattr(node, "name", None), *map(ast.unparse, targets)):
            yield from _named(getattr(node, "body", []), rest) if rest else [node]


def run_tests(
    folder: pathlib.Path, tests: Sequence[str], environment: Mapping[str, str], seconds: float = 300
) -> tuple[int | None, str]:
    """pytest's exit code (None: it did not end in so many seconds) and its output."""
    process = FORKS.Process(target=_run, args=(str(folder), list(tests), dict(environment)))
    process.start()
    process.join(timeout=seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None, (folder / OUTPUT).read_text()
    return process.exitcode, (folder / OUTPUT).read_text()


def _run(folder: str, tests: list[str], environment: dict[str, str]) -> None:
    output = os.path.join(folder, OUTPUT)
    pathlib.Path(output).unlink(missing_ok=True)
    enter(folder, {**os.environ, **environment}, [folder], output, output)

    import pytest

    options = ["-x", "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, *tests])
    import npu_fuse_pass

    if not str(npu_fuse_pass.__file__).startswith(folder):
        code = pytest.ExitCode.INTERNAL_ERROR
    sys.exit(int(code))
