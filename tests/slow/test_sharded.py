"""Parameters that are spread over processes: FSDP2's and tensor parallel DTensors, FSDP1's flat shards (gloo)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support import sharded_stacks
from tests.support.forked import FORKS
from tests.support.training import FULL


def _rank(rank: int, environment: dict[str, str], world: int, store: str) -> None:
    os.environ.update(environment)  # a fork has its server's
    sharded_stacks.run(rank, world, store)


@pytest.mark.parametrize("world", [2, 4] if FULL else [2])
def test_ranks(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario of sharded_ranks.py and sharded_stacks.py, in processes of their own."""
    monkeypatch.setenv("SHARDED_FOLDER", str(tmp_path / "checkpoint"))
    sharded_stacks.save_alone()
    given = (dict(os.environ), world, str(tmp_path / "store"))
    torch.multiprocessing.start_processes(_rank, given, nprocs=world, start_method=FORKS.get_start_method())
    sharded_stacks.load_alone()
