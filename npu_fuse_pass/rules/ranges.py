"""What a rule's hyperparameters may be: of their defaults' kinds, and in the ranges that the rule declares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from npu_fuse_pass.errors import RuleError
from npu_fuse_pass.rules.declaration import Declaration, Range, is_number, split_keywords

_KINDS = {float: "a number", tuple: "a tuple of numbers", bool: "True or False", str: "a string"}


def check_kinds(rule: Declaration, settings: Mapping[str, Any]) -> None:
    """Refuse hyperparameters of another kind than their defaults; None stands for anything.

    Raises:
        RuleError: names the hyperparameter, its value and what is allowed.
    """
    for name, default in rule.defaults.items():
        value = settings.get(name)
        if value is None or default is None:
            continue
        wanted = type(_plain(name, default))
        if type(_plain(name, value)) is not wanted:
            allowed = f"{_KINDS[wanted]}, as its default {default!r} is"
            raise RuleError(f"rule {rule.name!r}: {name}={value!r}; allowed is {allowed}")


def check_ranges(rule: Declaration, settings: Mapping[str, Any]) -> None:
    """Refuse numbers outside of the ranges that the rule declares.

    Raises:
        RuleError: names the hyperparameter, its value and what is allowed.
    """
    for name, (least, bound) in rule.ranges.items():
        value = settings.get(name)
        plain = _plain(name, value)
        for number in filter(is_number, plain if isinstance(plain, tuple) else (plain,)):
            if math.isnan(number) or (least is not None and number < least) or (bound is not None and number >= bound):
                raise RuleError(f"rule {rule.name!r}: {name}={value!r}; allowed are {_text((least, bound))}")


def check_declared(rule: Declaration) -> None:
    """Refuse ranges of what is no hyperparameter, of another form, or that the defaults are not in.

    Raises:
        RuleError: names the range.
    """
    for name, limits in rule.ranges.items():
        if name not in rule.defaults:
            raise RuleError(f"rule {rule.name!r}: a range for {name!r}; its hyperparameters are {list(rule.defaults)}")
        pair = isinstance(limits, tuple) and len(limits) == 2
        if not pair or not all(x is None or is_number(x) for x in limits):
            raise RuleError(f"rule {rule.name!r}: range {name}={limits!r}; allowed is (least or None, bound or None)")
    check_ranges(rule, rule.defaults)


def _plain(name: str, value: Any) -> Any:
    """A hyperparameter as rules get it: a float, a tuple of floats, a bool, a string or None."""
    static, numbers = split_keywords([name], {name: value})
    return numbers[name] if numbers else dict(static)[name]


def _text(limits: Range) -> str:
    least, bound = limits
    told = [*([f">= {least:g}"] if least is not None else []), *([f"< {bound:g}"] if bound is not None else [])]
    return " and ".join(["numbers", *told]).replace("numbers and", "numbers")
