"""The spellings against torch.optim in float64: what is matched is Adam, and what is not is something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fuse_pass.match.result import Match
from tests.support.near_misses import ADAM_MISSES, NEAR_MISSES
from tests.support.spellings import STEPS, VALUES, Spelling
from tests.support.spellings_more import SPELLINGS
from tests.unit.match.test_match import argument_values, leaf_values, over

SETTINGS = dict(lr=VALUES["lr"], betas=(VALUES["b1"], VALUES["b2"]), eps=VALUES["eps"])
OURS = {"adamw": ("p", "m", "v"), "adam_amsgrad": ("p", "m", "v", "w"), "momentum": ("p", "m"), "nesterov": ("p", "m")}
STATES = {"m": "exp_avg", "v": "exp_avg_sq", "w": "max_exp_avg_sq"}


def by_torch(kernel: str, decay: str, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The step after STEPS, by torch.optim's own class, from the same parameter, gradient and states."""
    p = torch.nn.Parameter(before["p"].clone())
    p.grad = before["g"].clone()
    weight_decay = VALUES["wd"] if decay else 0.0
    if kernel in ("momentum", "nesterov"):
        rate, momentum = VALUES["lr"], VALUES["b1"]
        opt: Any = torch.optim.SGD([p], rate, momentum, weight_decay=weight_decay, nesterov=kernel == "nesterov")
        names = {"m": "momentum_buffer"}
    else:
        cls = torch.optim.AdamW if decay == "decoupled" else torch.optim.Adam
        opt = cls([p], **SETTINGS, weight_decay=weight_decay, amsgrad=kernel == "adam_amsgrad")  # type: ignore[arg-type]
        names = {k: v for k, v in STATES.items() if k in OURS[kernel]}
    opt.state[p] = {name: before[k].clone() for k, name in names.items()}
    opt.state[p]["step"] = torch.tensor(STEPS)
    opt.step()
    return {"p": p.detach(), **{k: opt.state[p][name] for k, name in names.items()}}


def named(spelling: Spelling, arguments: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip("pgmvw" if spelling.extra else "pgmv", arguments, strict=False))


@over([s for s in SPELLINGS if s.kernel in OURS])
def test_a_matched_kernel_is_torchs_optimizer(spelling: Spelling, mode: str) -> None:
    """The kernel with the solved scalars; its outputs are written where torch's state of that name is."""
    captured, only = spelling.group(mode)
    found = spelling.found(mode)
    assert isinstance(found, Match)
    arguments = spelling.arguments(mode)
    wanted = by_torch(spelling.kernel, spelling.decay, named(spelling, arguments))
    given = argument_values(found, *leaf_values(captured, only, arguments))
    kernel = found.kernel
    results = kernel.function(*(given[n] for n in kernel.inputs), **{n: given[n] for n in kernel.scalars})
    place_of = {captured.leaves[i].index: s for s, i in enumerate(only.members[0])}
    for name, result in zip(kernel.outputs, results, strict=True):
        (key,) = [k for i, k in enumerate(named(spelling, arguments)) if place_of.get(i) == found.outputs[name]]
        torch.testing.assert_close(result, wanted[key], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("miss", [s for s in NEAR_MISSES if s.name in ADAM_MISSES], ids=lambda s: s.name)
def test_a_near_miss_is_another_optimizer(miss: Spelling) -> None:
    """Not AdamW, Adam or Adam with a penalty: the cases are what their names say."""
    after = miss.arguments("inputs")
    before = named(miss, [x.clone() for x in after])
    miss.function("inputs")(*after)
    got = named(miss, after)
    for decay in ("", "l2", "decoupled"):
        wanted = by_torch("adamw", decay, before)
        apart = max(float((got[k] - x).abs().max()) for k, x in wanted.items())
        assert not apart < 1e-10, decay
