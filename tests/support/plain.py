"""An oracle for whatever is done to `opt.state`: a rule over plain dictionaries, as torch.optim keeps its states."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.rules.hyperparameters import Hyper


class Plain:
    """Steps as `opt` does, on other parameters, with states in plain dictionaries; without totals."""

    def __init__(self, opt: Any, params: list[Tensor]) -> None:
        self._opt = opt
        self.param_groups = [{**opt.param_groups[0], "params": list(params)}]
        self.state: Any = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rule = self._opt.rule_for(group)
            for params, settings in self._opt.settings(group):
                hyper = Hyper(rule, settings)
                assert hyper.fill(settings)
                for p in (p for p in params if p.grad is not None):
                    self._update(rule, rule.states_of(settings), hyper, p)

    def _update(self, rule: Any, names: tuple[str, ...], hyper: Hyper, p: Tensor) -> None:
        entry = self.state[p]
        if not any(entry.get(n) is not None for n in names):
            entry["step"] = torch.tensor(0.0)
        entry |= {n: torch.full_like(p, rule.states[n].value) for n in names if entry.get(n) is None}
        entry["step"] = torch.as_tensor(entry.get("step", 1.0)) + 1
        states = {n: entry[n].view(-1) for n in names}
        keywords = {**hyper.static, **hyper.views, "step": entry["step"].double()}
        new, _, new_states = rule.apply(p.detach().reshape(-1), p.grad.reshape(-1), states, keywords)
        p.copy_(new.view(p.shape))
        for n, value in new_states.items():
            entry[n].copy_(value.view(p.shape))
