"""A check, bit by bit, that a refused call has changed nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Unchanged:
    """Checks, bit by bit, that parameters, gradients, states, counters and groups are what they were."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt
        self.before = self.look()

    def look(self) -> Any:
        params = [p for g in self.opt.param_groups for p in g["params"]]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        grads = [None if p.grad is None else (id(p.grad), p.grad._version) for p in params]
        pointers = [(id(p), p.data_ptr(), p._version) for p in params]
        states = [{k: v.clone() for k, v in self.opt.state.get(p, {}).items()} for p in params]
        return [p.detach().clone() for p in params], states, copy.deepcopy(groups), grads, pointers

    def __call__(self) -> None:
        params, states, *rest = self.look()
        old_params, old_states, *old_rest = self.before
        assert rest == old_rest
        assert [s.keys() for s in states] == [s.keys() for s in old_states]
        assert all(same(a, b) for a, b in zip(params, old_params, strict=True))
        assert all(same(new[k], old[k]) for new, old in zip(states, old_states, strict=True) for k in old)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, NaN included."""
    return a.dtype is b.dtype and torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
