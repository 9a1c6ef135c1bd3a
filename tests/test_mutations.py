"""Planted bugs (mutations.py) are noticed: a copy of the package with one bug in it fails the tests named there."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from .mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).parent.parent
FAILED, PASSED = 1, 0  # pytest's exit codes; others are errors of the run itself

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Kernels of wrong programs stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    return folder


def copy_of_the_project(folder: pathlib.Path) -> None:
    for name in ("npu_fuse_pass", "optimizers", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run(folder: pathlib.Path, tests: Sequence[str], cache: pathlib.Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "NPU_FUSE_CACHE_DIR": str(cache), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "--show-capture=no", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *tests], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_a_planted_bug_is_noticed(mutation: Mutation, tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    copy_of_the_project(tmp_path)
    path = tmp_path / "npu_fuse_pass" / mutation.file
    text = path.read_text()
    found = text.count(mutation.old)
    assert found == 1, f"{mutation.file} holds the text of {mutation.name!r} {found} times: write the mutation anew"
    path.write_text(text.replace(mutation.old, mutation.new))
    done = run(tmp_path, mutation.tests, cache)
    assert done.returncode == FAILED, f"not noticed (or not run):\n{done.stdout[-3000:]}{done.stderr[-2000:]}"


def test_without_a_bug_the_same_tests_pass(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    """Otherwise their failures above would mean nothing. All selections in as few runs as there are files."""
    copy_of_the_project(tmp_path)
    selections: dict[str, list[str]] = {}
    for mutation in MUTATIONS:
        file, chosen = mutation.tests[0], mutation.tests[2] if len(mutation.tests) > 1 else ""
        selections.setdefault(file, []).append(f"({chosen})" if chosen else "")
    for file, chosen in selections.items():
        keyword = [] if "" in chosen else ["-k", " or ".join(dict.fromkeys(chosen))]
        done = run(tmp_path, [file, *keyword], cache)
        assert done.returncode == PASSED, f"{file}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"


def test_there_are_enough() -> None:
    assert len(MUTATIONS) >= 20
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    assert {m.file.partition("/")[0] for m in MUTATIONS} >= {"aten.py", "capture.py", "group.py", "lowerings"}
