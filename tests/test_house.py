"""What the project promises about its own files."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RULES = ["adam", "adamw", "lamb", "rmsprop_tf", "sgd"]


def code_lines(path: pathlib.Path) -> int:
    """Lines that are neither empty, nor a comment, nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if i not in documented and line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_is_a_short_file(name: str) -> None:
    assert 30 <= code_lines(ROOT / "optimizers" / f"{name}.py") <= 60
