"""Parameters that are spread over processes: FSDP2's and tensor parallel DTensors, FSDP1's flat shards (gloo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import sharded_stacks
from .support import FULL


@pytest.mark.parametrize("world", [2, 4] if FULL else [2])
def test_ranks(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario of sharded_ranks.py and sharded_stacks.py, in processes of their own."""
    monkeypatch.setenv("SHARDED_FOLDER", str(tmp_path / "checkpoint"))
    sharded_stacks.save_alone()
    torch.multiprocessing.spawn(sharded_stacks.run, (world, str(tmp_path / "store")), nprocs=world)
    sharded_stacks.load_alone()
