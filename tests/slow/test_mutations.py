"""Planted bugs (mutations*.py) are noticed: a copy of the package with one bug in it fails the tests named there."""

from __future__ import annotations

import pathlib

import pytest

from tests.support.mutations import MUTATIONS, Mutation
from tests.support.mutations_passes import PASSES
from tests.support.mutations_rules import RULES
from tests.support.planted import ROOT, copy_of_the_project, find, plant, run_tests
from tests.support.training import tier

ROOMS = {"aten", "capture", "passes", "cpu", "rules"}
EVERY = [*MUTATIONS, *PASSES, *RULES]
FAILED, PASSED = 1, 0  # pytest's exit codes; others are errors of the run itself

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kernels of wrong programs stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    return {"NPU_FUSE_CACHE_DIR": str(folder), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("mutation", tier(EVERY), ids=lambda m: m.name.replace(" ", "_"))
def test_a_planted_bug_is_noticed(mutation: Mutation, tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    plant(copy_of_the_project(tmp_path), mutation.place, mutation.old, mutation.new)
    code, output = run_tests(tmp_path, mutation.tests, environment)
    assert code == FAILED, f"not noticed, or not run (exit code {code}):\n{output[-3000:]}"
    assert "failed" in output.splitlines()[-1] and "error" not in output.splitlines()[-1], output[-3000:]


def test_without_a_bug_the_same_tests_pass(tmp_path: pathlib.Path, environment: dict[str, str]) -> None:
    """Otherwise their failures above would mean nothing."""
    tests = sorted({test for mutation in tier(EVERY) for test in mutation.tests})
    code, output = run_tests(copy_of_the_project(tmp_path), tests, environment)
    assert code == PASSED, output[-3000:]
    assert "skipped" not in output.splitlines()[-1], output[-3000:]


def test_there_are_enough() -> None:
    assert len(EVERY) >= 20
    assert len({m.name for m in EVERY}) == len(EVERY)
    rooms = {find(ROOT, m.place, m.old)[0].parent.name for m in EVERY}  # each text is still there, once
    assert rooms >= ROOMS
