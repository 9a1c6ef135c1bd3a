"""What an update rule is: a pure function, its states and totals, the defaults of its hyperparameters."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from npu_fuse_pass.errors import RuleError
from npu_fuse_pass.rules.rounding import ROUNDING, by_chance

Condition = Callable[[Mapping[str, Any]], bool]
C = TypeVar("C", bound="_Conditional")

OPTIONS = ("state_dtype", "flatten", "master_weights", "stochastic_rounding")
"""What every rule's optimizer takes beside hyperparameters."""


class _Conditional:
    """What may exist in some groups only."""

    def when(self: C, condition: Condition) -> C:
        """It exists only in groups for which `condition(hyperparameters)` is true; else the rule gets None."""
        if not callable(condition):
            allowed = "allowed is a function of the hyperparameters, lambda group: group['momentum'] > 0"
            raise RuleError(f"when({condition!r}): {allowed}")
        return dataclasses.replace(self, condition=condition)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class Init(_Conditional):
    """How a state starts: filled with `value`, in the parameter's shape. Use `zeros`, `ones` or `Init(0.5)`.

    Attributes:
        is_number: it is one number for the whole parameter; see `number`.
    """

    value: float
    condition: Condition | None = None
    is_number: bool = False


zeros = Init(0.0)
ones = Init(1.0)


def number(value: float) -> Init:
    """A state that is one number for the whole parameter, behind all that have its shape.

    The rule gets and returns a 0-dim float64 tensor. Only torch's own classes have such states: the flat buffers of a
    rule optimizer have no place for them.
    """
    return Init(value, is_number=True)


@dataclasses.dataclass(frozen=True)
class Total(_Conditional):
    """A sum over parameters of a per-parameter 0-dim value. Made by `total`."""

    function: Callable[..., Tensor]
    over: Literal["group", "optimizer"]
    condition: Condition | None = None


def total(function: Callable[..., Tensor], over: Literal["group", "optimizer"] = "optimizer") -> Total:
    """Declare a sum over all parameters that have a gradient, e.g. for a global norm.

    Args:
        function: returns a 0-dim tensor for one parameter. Its argument names choose what it gets: `param`, `grad` or
            a state, in the arithmetic dtype, and hyperparameters as the rule gets them. Summed in float64.
        over: sum over the parameters of one "group" or of the whole "optimizer".

    Raises:
        RuleError: `over` is something else.
    """
    if over not in ("group", "optimizer"):
        raise RuleError(f"total(over={over!r}): allowed are 'group' and 'optimizer'")
    return Total(function, over)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a rule computes for parameters of `dtype`: float32 for half precision, else `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


Range = tuple[float | None, float | None]
"""Numbers from the first on and below the second; None is no bound."""


@dataclasses.dataclass(frozen=True, eq=False)
class Declaration:
    """A declared update rule; see `npu_fuse_pass.rules.rule` for what the fields mean."""

    function: Callable[..., Any]
    states: Mapping[str, Init]
    defaults: Mapping[str, Any]
    totals: Mapping[str, Total]
    writes_grad: bool
    name: str
    keywords: tuple[str, ...]
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    base: Declaration | None = None  # what this one computes, with master weights

    @property
    def itself(self) -> Declaration:
        """The rule as it was declared: the same for parameters with and without master weights."""
        return self.base or self

    def states_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the states that parameters of a group with these hyperparameters have."""
        return tuple(n for n, init in self.states.items() if self._holds(n, init.condition, group))

    def numbers_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of these states that are one number for a parameter."""
        return tuple(n for n in names if self.states[n].is_number)

    def totals_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the totals to which parameters of such a group contribute."""
        return tuple(n for n, t in self.totals.items() if self._holds(n, t.condition, group))

    def _holds(self, name: str, condition: Condition | None, group: Mapping[str, Any]) -> bool:
        try:
            return condition is None or bool(condition(group))
        except Exception as e:
            known = sorted(n for n in group if n != "params")
            raise RuleError(
                f"rule {self.name!r}: the condition of {name!r} fails: {type(e).__name__}: {e}; it is called with the "
                f"hyperparameters {known}"
            ) from e

    def apply(
        self, param: Tensor, grad: Tensor, states: Mapping[str, Tensor], keywords: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """One update of one parameter: (new param, new grad or None, new states), in the dtypes they came in.

        This is the semantics of the rule: eager steps call it, and the pass traces it.
        """
        work = arithmetic_dtype(param.dtype)
        own = self.itself.states
        kinds = {n: torch.float64 if init.is_number else work for n, init in own.items()}
        values = [states[n].to(kinds[n]) if n in states else None for n in own]
        exact = _exact(param, states, work)
        result = self.function(exact, grad.to(work), *values, **{k: keywords.get(k) for k in self.keywords})
        new = list(result) if isinstance(result, (tuple, list)) else [result]
        names = ["param", *(["grad"] if self.writes_grad else []), *own]
        if len(new) != len(names):
            raise RuleError(f"rule {self.name!r} returned {len(new)} values; it must return ({', '.join(names)})")
        old = {"param": param, "grad": grad, **states}
        out: dict[str, Tensor] = {}
        for name, value in zip(names, new, strict=True):
            if name in old:
                self._check(name, value, old[name])
                if name == "param" and ROUNDING in keywords:
                    out[name] = by_chance(value.to(work), param, keywords[ROUNDING], keywords["step"])
                else:
                    out[name] = value.to(old[name].dtype)
            elif value is not None:
                raise RuleError(f"rule {self.name!r} returned a value for state {name!r}, which this group lacks")
        if RESIDUAL in states:
            out[RESIDUAL] = (new[0] - out["param"].to(work)).to(states[RESIDUAL].dtype)
        return out["param"], out.get("grad"), {n: out[n] for n in self.states if n in states}

    def contribution(
        self, name: str, param: Tensor, grad: Tensor, states: Mapping[str, Tensor], keywords: Mapping[str, Any]
    ) -> Tensor:
        """What one parameter adds to the total `name`: a 0-dim tensor."""
        work = arithmetic_dtype(param.dtype)
        have = {
            "param": _exact(param, states, work),
            "grad": grad.to(work),
            **{n: s.to(work) for n, s in states.items()},
        }
        wanted = list(inspect.signature(self.totals[name].function).parameters)
        unknown = [n for n in wanted if n not in have and n not in keywords and n not in self.states]
        if unknown:
            raise RuleError(f"total {name!r} of rule {self.name!r} asks for {unknown[0]!r}, which it cannot get")
        value = self.totals[name].function(**{n: have[n] if n in have else keywords.get(n) for n in wanted})
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise RuleError(f"total {name!r} of rule {self.name!r} must return a 0-dim tensor, got {value!r}")
        return value.double()

    def _check(self, name: str, value: Any, old: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise RuleError(f"rule {self.name!r} returned {type(value).__name__} for {name!r}; it must be a tensor")
        if value.shape != old.shape:
            raise RuleError(
                f"rule {self.name!r} returned shape {tuple(value.shape)} for {name!r}; it must be {tuple(old.shape)}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Declaration:
        return self  # immutable


RESIDUAL = "master_residual"
"""The state that holds what a parameter's dtype has rounded away of it."""


def with_master_weights(rule: Declaration) -> Declaration:
    """The rule on float32 parameters, each kept as a half-precision parameter and a float32 state with the rest.

    Raises:
        RuleError: the rule has a state of that name.
    """
    if RESIDUAL in rule.states:
        raise RuleError(f"rule {rule.name!r} has a state {RESIDUAL!r}, the name of what master_weights keeps")
    states = {**rule.states, RESIDUAL: zeros.when(lambda group: True)}  # a checkpoint may lack it
    return dataclasses.replace(rule, states=states, base=rule)


def _exact(param: Tensor, states: Mapping[str, Tensor], work: torch.dtype) -> Tensor:
    return param.to(work) + states[RESIDUAL].to(work) if RESIDUAL in states else param.to(work)


def is_number(value: object) -> bool:
    """True for a hyperparameter that enters as a tensor and may change freely; False for a part of the structure."""
    return number_of(value) is not None


def number_of(value: object) -> float | None:
    """A hyperparameter as a float: a real number (NumPy scalar, Fraction), or a tensor or array of one element.

    None for anything else, and for what no float holds; bools are flags.
    """
    try:
        if isinstance(value, (int, float)):  # first, because it is the most common case
            return None if isinstance(value, bool) else float(value)
        if isinstance(value, Real):
            return float(value)
        one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
        if not one and not (getattr(value, "size", None) == 1 and callable(getattr(value, "item", None))):
            return None
        item = value.item()  # type: ignore[attr-defined]
        return float(item) if isinstance(item, Real) and not isinstance(item, bool) else None
    except OverflowError:
        return None


def split_keywords(
    names: Sequence[str], values: Mapping[str, Any]
) -> tuple[tuple[tuple[str, Any], ...], dict[str, float | tuple[float, ...]]]:
    """Divide the keywords that a rule asks for into static ones (hashable) and numbers (floats or tuples of floats)."""
    static: list[tuple[str, Any]] = []
    numbers: dict[str, float | tuple[float, ...]] = {}
    for name in names:
        value = values.get(name)
        number = number_of(value)
        parts = [number_of(v) for v in value] if isinstance(value, (tuple, list)) else []
        if number is not None:
            numbers[name] = number
        elif parts and None not in parts:
            numbers[name] = tuple(v for v in parts if v is not None)
        elif value is None or isinstance(value, (bool, str)):
            static.append((name, value))
        elif _is_flag(value):
            static.append((name, bool(value)))
        else:
            raise RuleError(f"hyperparameter {name}={value!r} must be a number, a tuple of numbers, bool, str or None")
    return tuple(static), numbers


def _is_flag(value: object) -> bool:
    """True for NumPy's bools, and for tensors and arrays of one bool."""
    return getattr(value, "dtype", None) in (torch.bool, bool) and getattr(value, "ndim", None) == 0
