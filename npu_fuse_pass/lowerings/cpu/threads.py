"""How many threads share a step: one in a fork of a process in which threads have shared steps.

OpenMP's threads do not exist in a fork, which would wait for them for good. An eager step of tensors that are small one
by one shares no work; a kernel takes them together.
"""

from __future__ import annotations

import os

import torch

_shared = False  # threads may have shared a step
_alone = False


def threads() -> int:
    """The number of threads for what comes."""
    global _shared
    if _alone:
        return 1
    number = torch.get_num_threads()
    _shared = _shared or number > 1
    return number


def _forked() -> None:
    global _alone
    _alone = _shared


os.register_at_fork(after_in_child=_forked)
