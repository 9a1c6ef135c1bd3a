"""What the project promises about its own files."""

from __future__ import annotations

import pathlib

import pytest

from scripts import rooms

ROOT = pathlib.Path(__file__).parent.parent
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
