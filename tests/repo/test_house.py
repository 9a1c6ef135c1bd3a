"""What the project promises about its own files."""

from __future__ import annotations

import ast
import pathlib

import pytest

import npu_fuse_pass
from scripts import rooms

ROOT = pathlib.Path(__file__).parents[2]
RULES = ["adam", "adamw", "lamb", "rmsprop_tf", "sgd"]


@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_is_a_short_file(name: str) -> None:
    assert 20 <= rooms.code_lines(ROOT / "optimizers" / f"{name}.py") <= 65


def test_lines_of_rooms_are_counted(tmp_path: pathlib.Path) -> None:
    below = tmp_path / "house" / "below"
    below.mkdir(parents=True)
    (tmp_path / "house" / "a.py").write_text('"""One.\n\nThree.\n"""\n\n# no code\nx = 1\n', encoding="utf-8")
    (tmp_path / "house" / "b.py").write_text('def f():\n    """Says."""\n    return 1\n', encoding="utf-8")
    (below / "c.py").write_text("y = 2  # code\n\n\nz = '''\n# text\n'''\n", encoding="utf-8")
    rows = rooms.rooms(tmp_path, ["house"])
    assert rows == [("house", 2, 3, 5), ("house/below", 1, 3, 0)]
    assert rooms.table(rows) == [
        "room         files  code  docstrings",
        "house            2     3           5",
        "house/below      1     3           0",
        "together         3     6           5",
    ]


PUBLIC = {"npu_fuse_pass.reasons", "npu_fuse_pass.tolerances"}
NAMES = {*npu_fuse_pass.__all__, "optim"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "behaviour").glob("test_*.py")), ids=lambda p: p.stem)
def test_behaviour_is_tested_through_what_is_public(path: pathlib.Path) -> None:
    """Tests that know a room stand in tests/unit, below that room's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("npu_fuse_pass"):
            public = node.module == "npu_fuse_pass" and {alias.name for alias in node.names} <= NAMES
            assert public or node.module in PUBLIC, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.startswith("npu_fuse_pass.")], ast.unparse(node)
        elif isinstance(node, ast.Attribute):
            assert node.attr != "_prelude", ast.unparse(node)


def test_a_room_of_tests_has_the_name_of_a_room() -> None:
    rooms_of_tests = {path.name for path in (ROOT / "tests" / "unit").iterdir() if path.is_dir()} - {"__pycache__"}
    assert rooms_of_tests <= {path.name for path in (ROOT / "npu_fuse_pass").iterdir()}
