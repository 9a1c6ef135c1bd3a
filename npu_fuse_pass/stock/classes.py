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
_COMMON = ("lr", "weight_decay", "maximize", "foreach", *_ANOTHER_STEP)


@dataclasses.dataclass(frozen=True)
class StockClass:
    """A class of torch.optim.

    Attributes:
        rule: of the class; Adam's two take each other's place.
        more: options that the rule has an answer for, beside its own and those of all classes; another torch may have
            others.
        counts: whether it keeps a state "step".
        plain: whether it takes no tensor as lr with foreach=True.
    """

    rule: Declaration
    more: tuple[str, ...] = ()
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
        rule = self.rule
        if rule in (adam, adamw):
            rule = adamw if group.get("decoupled_weight_decay", rule is adamw) else adam
        return _ascending(rule) if group.get("maximize") else rule


_CLASSES: dict[type[torch.optim.Optimizer], StockClass] = {
    torch.optim.Adam: StockClass(adam, ("decoupled_weight_decay",), plain=True),
    torch.optim.AdamW: StockClass(adamw, ("decoupled_weight_decay",), plain=True),
    torch.optim.SGD: StockClass(sgd, counts=False),
    torch.optim.RMSprop: StockClass(rmsprop),
    torch.optim.Adagrad: StockClass(adagrad, ("initial_accumulator_value",)),
    torch.optim.Adadelta: StockClass(adadelta),
    torch.optim.Adamax: StockClass(adamax),
    torch.optim.NAdam: StockClass(nadam),
    torch.optim.RAdam: StockClass(radam),
    torch.optim.Rprop: StockClass(rprop),
    torch.optim.ASGD: StockClass(asgd),
}


def stock_class(opt: torch.optim.Optimizer, step: Callable[..., Any]) -> StockClass | Reason:
    """The class of an optimizer, or why its step is not run as a rule. `step`: its own, perhaps without hooks."""
    known, name = _CLASSES.get(type(opt)), type(opt).__name__
    if known is None:
        parents = [c.__name__ for c in type(opt).__mro__[1:] if c in _CLASSES]
        return Code.NO_RULE(f"{name} may step otherwise than {parents[0]}" if parents else f"no rule is {name}'s")
    if not _torchs_own(step):
        return Code.NO_RULE(f"another function has taken the place of this {name}'s step")
    more = opt.defaults.keys() - {*_COMMON, *known.rule.defaults, *known.more}
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
