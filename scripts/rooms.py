"""Print how large each room is: files, lines of code and lines of docstrings of every folder with modules."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("npu_fuse_pass", "optimizers")


def code_lines(path: pathlib.Path) -> int:
    """Lines that are neither empty, nor a comment, nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    documented = _documented(text)
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if i not in documented and line.strip() and not line.strip().startswith("#"))


def docstring_lines(path: pathlib.Path) -> int:
    """Lines of docstrings of the module, its classes and its functions."""
    return len(_documented(path.read_text(encoding="utf-8")))


def _documented(text: str) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def rooms(root: pathlib.Path, packages: Sequence[str] = PACKAGES) -> list[tuple[str, int, int, int]]:
    """Path, files, lines of code and of docstrings of every folder with modules; those below count for themselves."""
    folders = sorted({path.parent for package in packages for path in (root / package).rglob("*.py")})
    found = []
    for folder in folders:
        files = sorted(folder.glob("*.py"))
        name = folder.relative_to(root).as_posix()
        found.append((name, len(files), sum(map(code_lines, files)), sum(map(docstring_lines, files))))
    return found


def table(rows: Sequence[tuple[str, int, int, int]]) -> list[str]:
    """The rows under headings, and their sum."""
    total = ["together", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))]
    cells = [["room", "files", "code", "docstrings"], *([str(cell) for cell in row] for row in (*rows, total))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]


if __name__ == "__main__":
    print("\n".join(table(rooms(ROOT))))
