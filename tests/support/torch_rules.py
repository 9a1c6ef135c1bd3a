"""torch.optim's classes that run as rules, with options that use all of their states; their states beside eager's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.training import assert_close

STOCK: dict[str, Callable[..., Any]] = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.02, amsgrad=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.02),
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.3),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01, eps=0.1, momentum=0.9, centered=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.05, lr_decay=0.1),
    "Adadelta": functools.partial(torch.optim.Adadelta, lr=0.5),
    "Adamax": functools.partial(torch.optim.Adamax, lr=0.02),
    "RAdam": functools.partial(torch.optim.RAdam, lr=0.02, betas=(0.9, 0.9)),
    "Rprop": functools.partial(torch.optim.Rprop, lr=0.02),
    "NAdam": functools.partial(torch.optim.NAdam, lr=0.02, momentum_decay=0.1),
    "ASGD": functools.partial(torch.optim.ASGD, lr=0.05, lambd=0.01, t0=2),
    "SGD plain": functools.partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
}


def assert_same_states(opt: Any, eager: Any, limit: float = 1e-5) -> None:
    """The same keys in the same order, tensors of the same kinds, and about the same values; also as a checkpoint."""
    got, want = opt.state_dict(), eager.state_dict()
    assert got.keys() == want.keys() and list(got["state"]) == list(want["state"])
    for index, entry in want["state"].items():
        mine = got["state"][index]
        assert list(mine) == list(entry)
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                assert mine[name] == value
                continue
            a = mine[name]
            assert (a.dtype, a.shape, a.stride(), a.device) == (value.dtype, value.shape, value.stride(), value.device)
            assert_close([a], [value], limit)
