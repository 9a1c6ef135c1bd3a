"""Which rule computes what a class of torch.optim does, and for which optimizers and options that is proved.

Proved with torch's database of optimizers, in tests/unit/capture/test_stock_road.py: every input that it has for these
classes but those with the options that `StockClass.refused` names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.algorithms.adadelta import adadelta
from npu_fuse_pass.algorithms.adagrad import adagrad
from npu_fuse_pass.algorithms.adam import adam, adamw
from npu_fuse_pass.algorithms.adamax import adamax
from npu_fuse_pass.algorithms.asgd import asgd
from npu_fuse_pass.algorithms.nadam import nadam
from npu_fuse_pass.algorithms.radam import radam
from npu_fuse_pass.algorithms.rmsprop import rmsprop
from npu_fuse_pass.algorithms.rprop import rprop
from npu_fuse_pass.algorithms.sgd import sgd
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.rules.declaration import Declaration

Group = Mapping[str, Any]

_ANOTHER_STEP = ("capturable", "differentiable", "fused")
_COMMON = {"lr", "weight_decay", "maximize", "foreach", *_ANOTHER_STEP}
_ADAM = {*_COMMON, "betas", "eps", "amsgrad", "decoupled_weight_decay"}


@dataclasses.dataclass(frozen=True)
class StockClass:
    """A class of torch.optim.

    Attributes:
        rule: of a group.
        options: that the rule has an answer for; another torch may have more.
        counts: whether it keeps a state "step".
        plain: whether it takes no tensor as lr with foreach=True.
    """

    rule: Callable[[Group], Declaration]
    options: frozenset[str]
    counts: bool = True
    plain: bool = False

    def refused(self, group: Group) -> Reason | None:
        """Why a group's options ask for another step than the rule's; looked at before every step."""
        for name in _ANOTHER_STEP:
            if group.get(name):
                return Code.NO_RULE(f"{name}={group[name]!r} asks for another step than the rule's")
        if self.plain and group.get("foreach") and isinstance(group["lr"], Tensor):
            return Code.NO_RULE("foreach=True takes no tensor as lr")
        in_place = group.get("nesterov") and group.get("foreach") and not group.get("maximize")
        if in_place and not group["weight_decay"]:
            return Code.NO_RULE("Nesterov momentum with foreach=True writes to the gradients")
        return None

    def rule_of(self, group: Group) -> Declaration:
        """The rule of a group; the same object for the same options."""
        rule = self.rule(group)
        return _ascending(rule) if group.get("maximize") else rule


def _stock(rule: Declaration, *options: str, counts: bool = True) -> StockClass:
    return StockClass(lambda group: rule, frozenset({*_COMMON, *options}), counts)


_CLASSES: dict[type[torch.optim.Optimizer], StockClass] = {
    torch.optim.Adam: StockClass(
        lambda g: adamw if g.get("decoupled_weight_decay") else adam, frozenset(_ADAM), plain=True
    ),
    torch.optim.AdamW: StockClass(
        lambda g: adamw if g.get("decoupled_weight_decay", True) else adam, frozenset(_ADAM), plain=True
    ),
    torch.optim.SGD: _stock(sgd, "momentum", "dampening", "nesterov", counts=False),
    torch.optim.RMSprop: _stock(rmsprop, "alpha", "eps", "momentum", "centered"),
    torch.optim.Adagrad: _stock(adagrad, "lr_decay", "initial_accumulator_value", "eps"),
    torch.optim.Adadelta: _stock(adadelta, "rho", "eps"),
    torch.optim.Adamax: _stock(adamax, "betas", "eps"),
    torch.optim.NAdam: _stock(nadam, "betas", "eps", "momentum_decay", "decoupled_weight_decay"),
    torch.optim.RAdam: _stock(radam, "betas", "eps", "decoupled_weight_decay"),
    torch.optim.Rprop: _stock(rprop, "etas", "step_sizes"),
    torch.optim.ASGD: _stock(asgd, "lambd", "alpha", "t0"),
}


def stock_class(opt: torch.optim.Optimizer, step: Callable[..., Any]) -> StockClass | Reason:
    """The class of an optimizer, or why its step is not run as a rule. `step`: its own, perhaps without hooks."""
    known, name = _CLASSES.get(type(opt)), type(opt).__name__
    if known is None:
        parents = [c.__name__ for c in type(opt).__mro__[1:] if c in _CLASSES]
        return Code.NO_RULE(f"{name} may step otherwise than {parents[0]}" if parents else f"no rule is {name}'s")
    if not _torchs_own(step):
        return Code.NO_RULE(f"another function has taken the place of this {name}'s step")
    more = opt.defaults.keys() - known.options
    if more:
        return Code.NO_RULE(f"{name} has the option {min(more)!r}, of which its rule does not know")
    return known


def original_step(opt: torch.optim.Optimizer) -> None:
    """An uncompiled step as torch's class makes it; without hooks."""
    inspect.unwrap(type(opt).step)(opt)


@functools.cache
def _ascending(rule: Declaration) -> Declaration:
    """The rule for maximize=True: all of torch's classes turn the gradient around first."""

    def ascending(param: Tensor, grad: Tensor, *states: Tensor | None, **keywords: Any) -> Any:
        return rule.function(param, -grad, *states, **keywords)

    return dataclasses.replace(rule, function=ascending)


_TORCH = pathlib.Path(torch.optim.__file__).parent


def _torchs_own(step: Any) -> bool:
    """True if a step and all that wraps it (hooks, profiler range, schedulers' counts) are torch's."""
    while step is not None:
        code = getattr(step, "__code__", None)
        if code is None or pathlib.Path(code.co_filename).parent != _TORCH:
            return False
        step = getattr(step, "__wrapped__", None)
    return True
