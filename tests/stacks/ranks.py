"""Two processes of one gloo group, for what tests run on every rank."""

from __future__ import annotations

import datetime
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def spawn(function: Callable[..., None], folder: pathlib.Path, *given: Any) -> None:
    """Calls `function(*given)` on every rank; an error in one is raised here."""
    torch.multiprocessing.spawn(_rank, (function, str(folder / "store"), given), nprocs=RANKS)


def _rank(rank: int, function: Callable[..., None], store: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
    function(*given)
    dist.destroy_process_group()
