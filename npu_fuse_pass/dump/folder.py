"""The folder of a compile's files."""

from __future__ import annotations

import itertools
import os
import pathlib

import torch

from npu_fuse_pass.private_torch import find


def wanted(given: str | os.PathLike[str] | None) -> pathlib.Path | None:
    """The folder for dumps: the option, else NPU_FUSE_DUMP, else torch's debug folder under TORCH_COMPILE_DEBUG=1."""
    folder = given if given is not None else os.environ.get("NPU_FUSE_DUMP")
    if folder:
        return pathlib.Path(folder)
    if os.environ.get("TORCH_COMPILE_DEBUG") == "1":
        asked = find("torch._dynamo.utils.get_debug_dir")
        usual = os.path.join(os.environ.get("TORCH_COMPILE_DEBUG_DIR", ""), "torch_compile_debug")
        return pathlib.Path(usual if asked is None else asked()) / "npu_fuse_pass"
    return None


def new(root: pathlib.Path) -> pathlib.Path:
    """Create a folder for one compile of this rank, `rank_0/compile_000`; nothing is overwritten."""
    for number in itertools.count():
        path = root / f"rank_{_rank()}" / f"compile_{number:03}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_rank())
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0
