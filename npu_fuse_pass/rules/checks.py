"""Checks of rules on tensors without values: what a rule reads, and if it is valid."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from npu_fuse_pass.errors import RuleError
from npu_fuse_pass.fx_nodes.names import overload_name
from npu_fuse_pass.private_torch import DispatchMode
from npu_fuse_pass.rules.declaration import Declaration, split_keywords


def wanted_keywords(rule: Declaration) -> list[str]:
    """Hyperparameters that a rule or one of its totals reads."""
    internal = {"step", "param", "grad", *rule.totals, *rule.states}
    of_totals = [n for t in rule.totals.values() for n in inspect.signature(t.function).parameters]
    return [n for n in dict.fromkeys([*rule.keywords, *of_totals]) if n not in internal]


def structure(rule: Declaration, settings: Mapping[str, Any]) -> tuple[object, ...]:
    """What `check_rule` depends on; equal for parameter groups that differ in numbers alone.

    Raises:
        RuleError: a hyperparameter is of a kind that no rule takes.
    """
    static, numbers = split_keywords(wanted_keywords(rule), settings)
    sizes = tuple((name, len(value) if isinstance(value, tuple) else None) for name, value in numbers.items())
    return id(rule), static, sizes, rule.states_of(settings), rule.totals_of(settings)


def shapes_of(params: Iterable[Tensor]) -> set[tuple[int, ...]]:
    """The shapes of parameters; 0-dim ones are one element, as in steps."""
    return {tuple(p.shape) or (1,) for p in params if not is_lazy(p)}


def any_shape(ndim: int) -> tuple[int, ...]:
    """A shape of so many dimensions, for what a rule computes with most."""
    return (2, 3, *[2] * ndim)[:ndim]


def check_rule(rule: Declaration, settings: Mapping[str, Any], shape: tuple[int, ...] = (2, 3)) -> RuleError | None:
    """Run a rule on meta tensors: its shapes and count of results, and that it decides nothing by values.

    Args:
        shape: of these tensors: the rule may compute something else with others.

    Returns:
        What it fails with that may be due to the shape.

    Raises:
        RuleError: what is wrong with the rule and what to write instead.
    """
    if kept := rule.numbers_of(rule.states_of(settings)):
        raise RuleError(
            f"rule {rule.name!r}: the state {kept[0]!r} is one number, which classes of torch.optim alone keep"
        )
    missing = [n for n in wanted_keywords(rule) if n not in settings]
    if missing:
        known = [name for name in settings if name != "params"]
        lacks = "which this group lacks" if missing[0] in rule.defaults else f"which is not among its defaults {known}"
        raise RuleError(f"rule {rule.name!r} asks for {missing[0]!r}, {lacks}")
    static, numbers = split_keywords(wanted_keywords(rule), settings)
    names, totals = rule.states_of(settings), rule.totals_of(settings)
    try:
        _check_on(shape, rule, {**dict(static), **numbers}, names, totals)
    except RuleError as e:
        if e.__cause__ is None or (len(shape) == 2 and _needs_values(e.__cause__)):
            raise
        return e
    return None


def check_shape(
    shape: Sequence[int],
    dtype: torch.dtype,
    rule: Declaration,
    keywords: Mapping[str, Any],
    states: Sequence[str],
    totals: Sequence[str],
) -> None:
    """Run a rule on meta tensors of a parameter's shape, before an eager step writes anything.

    Raises:
        RuleError: the rule fails on them, and not because they are on the meta device.
    """
    try:
        _check_on(tuple(shape) or (1,), rule, keywords, states, totals, dtype)
    except RuleError as e:
        if not _needs_values(e.__cause__) and "device meta" not in str(e.__cause__):
            whole = "Nothing was changed: write the rule for such parameters as well, or give them to another optimizer"
            raise RuleError(f"{e}. {whole}") from e.__cause__


@torch.inference_mode(False)  # whose tensors do not say how often they were written
def _check_on(
    shape: tuple[int, ...],
    rule: Declaration,
    given: Mapping[str, Any],
    names: Sequence[str],
    totals: Sequence[str],
    dtype: torch.dtype | None = None,
) -> None:
    static = {n: v for n, v in given.items() if v is None or isinstance(v, (bool, str))}
    keywords = meta_keywords(static, {n: v for n, v in given.items() if n not in static}, totals)
    tensors = {n: torch.empty(shape, dtype=dtype, device="meta") for n in ("param", "grad", *names)}
    numbered = {n: k if isinstance(k, tuple) else (k,) for n, k in keywords.items()}
    read = [*tensors.items(), *((n, t) for n, ks in numbered.items() for t in ks if isinstance(t, Tensor))]
    versions = [_version(t) for _, t in read]
    try:
        results(rule, tensors, keywords, totals)
    except RuleError:
        raise
    except Exception as e:
        if _needs_values(e):
            raise RuleError(
                f"rule {rule.name!r} uses a value of a tensor in Python (an `if`, `float()`, `.item()` or `max()`): "
                "write torch.where(condition, a, b), torch.clamp or torch.maximum instead, so that one kernel can "
                "compute it; `if` is fine on bool, str and None options"
            ) from e
        if "device meta" in str(e):
            raise RuleError(
                f"rule {rule.name!r} uses a tensor that does not lie where the parameter does{_place(rule, e)}: make "
                "it with torch.zeros_like(grad) or device=grad.device, or use Python numbers or a state"
            ) from e
        if isinstance(e, NotImplementedError):
            return  # an operation without a meta kernel; tracing decides
        other = [f"{n}={v!r}" for n, v in given.items() if not isinstance(v, Tensor) and v != rule.defaults.get(n)]
        with_them = f" with {', '.join(other)}" if other else ""
        what = f"{type(e).__name__}: {e}".removesuffix(": ")
        raise RuleError(
            f"rule {rule.name!r} fails{with_them} on tensors of shape {shape}: {what}{_place(rule, e)}"
        ) from e
    changed = [n for (n, t), version in zip(read, versions, strict=True) if _version(t) != version]
    if changed:
        raise RuleError(
            f"rule {rule.name!r} changes its argument {changed[0]!r} in place; a rule is a pure function: "
            "compute a new tensor and return it"
        )


def _needs_values(error: BaseException | None) -> bool:
    """Whether something failed because tensors on the meta device have no values."""
    return any(text in str(error) for text in ("meta tensor", "meta device"))


def _place(rule: Declaration, error: BaseException) -> str:
    """The line of the rule, or of what it calls in the same file, that fails; "" if Python does not say."""
    file = getattr(getattr(rule.function, "__code__", None), "co_filename", None)
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" ({lines[-1].filename}:{lines[-1].lineno}, in {lines[-1].name})" if lines else ""


def _version(t: Tensor) -> int | None:
    """How often a tensor was written; None where torch does not say."""
    return getattr(t, "_version", None)


def results(
    rule: Declaration, tensors: Mapping[str, Tensor], keywords: Mapping[str, Any], totals: Sequence[str]
) -> Any:
    """What a rule gives for one parameter: its contributions to totals, and new values. `tensors`: by name."""
    states = {n: t for n, t in tensors.items() if n not in ("param", "grad")}
    own = {n: k for n, k in keywords.items() if n not in totals}  # a total knows no other one
    sums = [rule.contribution(n, tensors["param"], tensors["grad"], states, own) for n in totals]
    return sums, rule.apply(tensors["param"], tensors["grad"], states, keywords)


def meta_keywords(static: Mapping[str, Any], numbers: Mapping[str, Any], totals: Sequence[str]) -> dict[str, Any]:
    """A rule's keywords without values: static options, and a meta tensor for every number."""

    def scalar() -> Tensor:
        return torch.empty((), dtype=torch.float64, device="meta")

    found = {n: tuple(scalar() for _ in v) if isinstance(v, tuple) else scalar() for n, v in numbers.items()}
    return {**static, **found, **{n: scalar() for n in totals}, "step": scalar()}


def reads_step(rule: Declaration, static: Mapping[str, Any], numbers: Mapping[str, Any], totals: Sequence[str]) -> bool:
    """True if a rule without states computes with its step under these options; SGD without momentum does not."""
    seen = _watched(rule, meta_keywords(static, numbers, totals), (), totals)
    return "step" in rule.keywords if seen is None else seen.reads_step  # what fails may be about to read the step


def is_pointwise(
    rule: Declaration, static: Mapping[str, Any], numbers: Mapping[str, Any], states: Iterable[str]
) -> bool:
    """True if a new element depends only on the elements in its place: no norms, sums or totals of whole tensors.

    False if that cannot be found out.
    """
    seen = None if rule.totals else _watched(rule, meta_keywords(static, numbers, ()), states, ())
    return seen is not None and seen.pointwise


def _watched(
    rule: Declaration, keywords: Mapping[str, Any], states: Iterable[str], totals: Sequence[str]
) -> _Watch | None:
    """What a rule does on meta tensors; None where it fails on them."""
    tensors = {n: torch.empty((2, 3), device="meta") for n in ("param", "grad", *states)}
    mode = _Watch(keywords["step"])
    try:
        with mode:
            results(rule, tensors, keywords, totals)
    except Exception:  # whatever a rule cannot do on meta tensors
        return None
    return mode


def check_flat_shards(rule: Declaration, settings: Mapping[str, Any]) -> None:
    """Refuse a rule that takes norms for parameters that FSDP1 keeps as parts of a flat tensor.

    Raises:
        RuleError: says what to use.
    """
    static, numbers = split_keywords(wanted_keywords(rule), settings)
    if not is_pointwise(rule, dict(static), numbers, rule.states_of(settings)):
        raise RuleError(
            f"rule {rule.name!r} takes norms or sums of whole parameters, and FullyShardedDataParallel gives it flat "
            "shards, each a part of a parameter; use torch.distributed.fsdp.fully_shard, whose DTensors know the whole"
        )


class _Watch(DispatchMode):
    """A mode that notices operations on the step, and those on tensors that are not pointwise."""

    _others = (
        "_to_copy",
        "alias",
        "clone",
        "detach",
        "empty_like",
        "full_like",
        "lift_fresh",
        "ones_like",
        "zeros_like",
    )

    def __init__(self, step: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step
        self.reads_step = False
        self.pointwise = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = torch.Tag.pointwise in function.tags or overload_name(function) in self._others
        result = function(*args, **kwargs)
        given = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, (list, tuple)) else (a,))]
        self.reads_step |= any(x is self._step for x in given)
        self.pointwise &= known or not any(isinstance(x, Tensor) and x.ndim for x in given)
        return result
