"""torch.optim's classes that run as rules, with options that use all of their states; their states beside eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.training import assert_close

STOCK: dict[str, Callable[..., Any]] = {
    "Adam": lambda p, **o: torch.optim.Adam(p, **{"lr": 0.02, "amsgrad": True, **o}),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, **{"lr": 0.02, **o}),
    "SGD": lambda p, **o: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, "dampening": 0.3, **o}),
    "RMSprop": lambda p, **o: torch.optim.RMSprop(
        p, **{"lr": 0.01, "eps": 0.1, "momentum": 0.9, "centered": True, **o}
    ),
    "Adagrad": lambda p, **o: torch.optim.Adagrad(p, **{"lr": 0.05, "lr_decay": 0.1, **o}),
    "Adadelta": lambda p, **o: torch.optim.Adadelta(p, **{"lr": 0.5, **o}),
    "Adamax": lambda p, **o: torch.optim.Adamax(p, **{"lr": 0.02, **o}),
    "RAdam": lambda p, **o: torch.optim.RAdam(p, **{"lr": 0.02, "betas": (0.9, 0.9), **o}),
    "Rprop": lambda p, **o: torch.optim.Rprop(p, **{"lr": 0.02, **o}),
    "NAdam": lambda p, **o: torch.optim.NAdam(p, **{"lr": 0.02, "momentum_decay": 0.1, **o}),
    "ASGD": lambda p, **o: torch.optim.ASGD(p, **{"lr": 0.05, "lambd": 0.01, "t0": 2, **o}),
    "SGD plain": lambda p, **o: torch.optim.SGD(p, **{"lr": 0.05, "weight_decay": 0.1, **o}),
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
