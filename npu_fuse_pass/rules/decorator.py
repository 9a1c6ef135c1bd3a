"""Update rules: an optimizer as one pure function.

    @rule(states={"exp_avg": zeros}, defaults=dict(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0))
    def lion(param, grad, exp_avg, *, lr, beta1, beta2, weight_decay):
        update = (beta1 * exp_avg + (1 - beta1) * grad).sign()
        return param - lr * (update + weight_decay * param), beta2 * exp_avg + (1 - beta2) * grad

    opt = lion(model.parameters(), lr=3e-4)        # a torch.optim.Optimizer

There is nothing else to write: no foreach form, no fused form, no kernel. `torch.compile(opt.step,
backend="npu_fused")` traces the function once and runs it for all parameters in one kernel.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from npu_fuse_pass.errors import RuleError
from npu_fuse_pass.rules import pickling
from npu_fuse_pass.rules.declaration import OPTIONS, Declaration, Init, Range, Total, is_number
from npu_fuse_pass.rules.ranges import check_declared

if TYPE_CHECKING:
    from npu_fuse_pass.rules.optimizer import RuleOptimizer


class Rule(Declaration):
    """A declared update rule; calling it makes an optimizer. Made by the decorator `rule`."""

    def __call__(self, params: Iterable[Any], **hyperparameters: Any) -> RuleOptimizer:
        """An optimizer over `params` with this rule; unknown hyperparameters are a TypeError."""
        from npu_fuse_pass.rules.optimizer import RuleOptimizer  # loads Dynamo

        return RuleOptimizer.from_rule(self, params, hyperparameters)

    def __reduce__(self) -> tuple[Any, ...]:
        module, qualname = self.function.__module__, self.function.__qualname__
        if module != "__main__" and pickling.lookup(module, qualname) is self:
            return _by_name, (module, qualname)
        fields = (
            pickling.pack(self.function),
            {n: (i.value, pickling.pack(i.condition)) for n, i in self.states.items()},
            dict(self.defaults),
            {n: (pickling.pack(t.function), t.over, pickling.pack(t.condition)) for n, t in self.totals.items()},
            self.writes_grad,
            dict(self.ranges),
        )
        return _from_value, fields


def rule(
    function: None = None,
    /,
    *,
    states: Mapping[str, Init] | None = None,
    defaults: Mapping[str, Any] | None = None,
    totals: Mapping[str, Total] | None = None,
    writes_grad: bool = False,
    ranges: Mapping[str, Range] | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    """Make an optimizer out of a pure function `(param, grad, *states, *, hyperparameters) -> (param, *states)`.

    Args:
        states: name -> how it starts (`zeros`, `ones`, `zeros.when(lambda group: group["amsgrad"])`).
        defaults: hyperparameters and their defaults. Numbers and tuples of numbers arrive as 0-dim float64 tensors, so
            that changing them never recompiles; bool, str and None arrive as they are: use `if` on those only.
        totals: sums over all parameters (see `total`); each arrives as a 0-dim float64 tensor under its name.
        writes_grad: the function returns `(param, grad, *states)` and gradients are written too.
        ranges: hyperparameter -> (least, bound): numbers, or those of a tuple, have to be >= least and < bound; None
            is no bound. Looked at where an optimizer, a group or a loaded checkpoint gives them, not at every step.

    The keyword `step`, if the function takes it, is the number of this update of this parameter, from 1.
    A group may hold other keys, too, as torch's do (`initial_lr`, `name`): no rule reads them, and they are kept. A
    hyperparameter that is misspelt in a group is such a key; as an argument of the optimizer it is a TypeError.
    Arithmetic is float32 for fp16 and bf16 parameters; results are cast back to what is stored.

    Raises:
        RuleError: the declaration and the function's signature do not fit each other.
    """
    if function is not None:
        raise RuleError(f"rule({function!r}): write @rule(states=..., defaults=...), with parentheses")
    for label, given in (("states", states), ("defaults", defaults), ("totals", totals), ("ranges", ranges)):
        if not isinstance(given, (Mapping, type(None))):
            raise RuleError(f"rule({label}={given!r}): allowed is a dict of names and what belongs to them")

    def decorate(function: Callable[..., Any]) -> Rule:
        made = Rule(
            function,
            dict(states or {}),
            dict(defaults or {}),
            dict(totals or {}),
            writes_grad,
            getattr(function, "__name__", "rule"),
            _keywords(function),
            dict(ranges or {}),
        )
        _check_signature(made)
        check_declared(made)
        return made

    return decorate


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as e:
        raise RuleError(
            f"rule(...)({function!r}): {e}; a rule is a Python function (param, grad, *states, *, ...)"
        ) from e
    return tuple(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY)


def _check_signature(made: Rule) -> None:
    parameters = inspect.signature(made.function).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 2 + len(made.states) or positional[2:] != list(made.states):
        wanted = ", ".join(["param", "grad", *made.states])
        raise RuleError(f"rule {made.name!r} takes ({', '.join(positional)}); its states ask for ({wanted}, *, ...)")
    if positional[0] == "grad" or positional[1] == "param":
        raise RuleError(
            f"rule {made.name!r} takes ({', '.join(positional)}); it is given the parameter first: param, grad"
        )
    names = [*made.states, *made.defaults, *made.totals]
    reserved = {"param", "grad", "step", "params"}.intersection(names) | made.defaults.keys() & {*OPTIONS}
    if reserved:
        raise RuleError(f"rule {made.name!r}: the names {sorted(reserved)} are taken; choose others")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RuleError(f"rule {made.name!r}: {twice} are names of more than one state, hyperparameter or total")
    collects = [str(p) for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if collects:
        raise RuleError(f"rule {made.name!r} takes {collects[0]}; name each of its hyperparameters behind a *")
    for name, value in made.defaults.items():
        if not isinstance(value, (bool, int, float, str, tuple, type(None))):
            raise RuleError(f"rule {made.name!r}: default {name}={value!r} must be a number, tuple, bool, str or None")
    for name, init in made.states.items():
        if not isinstance(init, Init) or not is_number(init.value):
            raise RuleError(f"rule {made.name!r}: state {name}={init!r} must be zeros, ones or an Init of a number")
    for name, total in made.totals.items():
        if not isinstance(total, Total) or not callable(total.function):
            raise RuleError(f"rule {made.name!r}: total {name}={total!r} must be made by total(...)")


def _by_name(module: str, qualname: str) -> Any:
    importlib.import_module(module)
    return pickling.lookup(module, qualname)


def _from_value(function: Any, states: Any, defaults: Any, totals: Any, writes_grad: bool, ranges: Any = None) -> Rule:
    return rule(
        states={n: Init(value, pickling.unpack(c)) for n, (value, c) in states.items()},
        defaults=defaults,
        totals={n: Total(pickling.unpack(f), over, pickling.unpack(c)) for n, (f, over, c) in totals.items()},
        writes_grad=writes_grad,
        ranges=ranges,
    )(pickling.unpack(function))
