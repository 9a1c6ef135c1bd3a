"""The checks before every step, in plain Python: gradients, numbers, and storage that must still fit."""

from __future__ import annotations

import abc
import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from npu_fuse_pass.errors import OptionError, RuleError
from npu_fuse_pass.rules.batch import (
    Batch,
    adopt,
    batch_key,
    check_gradient,
    check_state,
    expose,
    fill_hyper,
    make_batch,
    repeated,
    updated_first,
    updated_so_far,
)
from npu_fuse_pass.rules.checks import any_shape, check_flat_shards, check_rule, shapes_of, structure
from npu_fuse_pass.rules.declaration import Declaration, arithmetic_dtype, with_master_weights
from npu_fuse_pass.rules.meeting import Meeting
from npu_fuse_pass.rules.ranges import check_kinds
from npu_fuse_pass.rules.state import States
from npu_fuse_pass.tensors.same import same_objects
from npu_fuse_pass.tensors.sharded import local, sharding


class InputCheck(Protocol):
    """A native check of parameters and gradients that it has seen before; see `lowerings.cpu.Program`."""

    def same(self, watched: object = None) -> bool: ...
    def release(self) -> None: ...
    def watched(self, dicts: Sequence[dict[Any, Any]]) -> object: ...


class Prepared(abc.ABC):
    """The batches of an optimizer, and what a compiled step reads of the checks before it.

    `version` counts how often the batches were made; compare it before using what was derived from earlier ones.

    Attributes:
        input_check: a native check that has seen the tensors of these batches.
        compiled: this backend has planned kernels for it at least once.
        unchanged: at this step they are as they were, and `input_check` has bound them already.
        objects: ids of the tensors, gradients excepted, that are the same ones as long as no batch is made.
        meeting: with other processes, where steps communicate.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._resting: list[Batch] = []
        self.version = 0
        self.input_check: InputCheck | None = None
        self.unchanged = False
        self.compiled = False
        self.objects: set[int] = set()
        self.meeting = Meeting()

    @abc.abstractmethod
    def prepare(self) -> None:
        """Bring the batches up to date with this step's gradients, numbers, parameters and states."""

    @abc.abstractmethod
    def expose_states(self) -> None:
        """Show the states that this step has begun in `opt.state`."""

    @abc.abstractmethod
    def expose_updated(self) -> None:
        """As `expose_states` after a step that something interrupted (KeyboardInterrupt): of what it has updated."""

    @property
    def kinds(self) -> object:
        """Equal at two steps if every parameter and gradient was of the same kind at both (dtype, sizes, strides)."""
        learned = [b.same.matched for b in self.batches]
        return None if self.unchanged or None in learned else (self.version, learned)

    def release_gradients(self) -> None:
        """Release this step's gradients: the next forward pass needs the memory that zero_grad frees."""
        for batch in self.batches:
            if batch.is_dtensors:  # what was written is a tensor inside of them
                increment_version(self._written(batch))
            batch.grads = [None] * len(batch.params)
        if self.input_check is not None:
            self.input_check.release()

    def _look_natively(self, watched: object = None) -> None:
        """Find out if all tensors are as they were; gradients are then read when they are asked for.

        Args:
            watched: dicts that have to be as they were, too.
        """
        self.unchanged = self.input_check is not None and self.input_check.same(watched)
        for batch in self.batches if self.unchanged else ():
            batch.forget_gradients()

    def _check_anew(self) -> None:
        """Check in Python, until a program has seen the tensors of the next batches."""
        if self.input_check is not None:
            self.input_check.release()
        self.input_check, self.unchanged = None, False

    def _take(self, batches: list[Batch], state: Mapping[Any, Any]) -> None:
        """Go on with these batches; others may come back: DeepSpeed's ZeRO steps each group as if it were the only one.

        Those keep nothing alive for long that `opt.state` does not: their parameters have states, and no other batch.
        """
        if batches != self.batches:  # a loaded checkpoint alone changes values, not the plan
            self.version += 1
        others = [b for b in (*self.batches, *self._resting) if b not in batches]
        held = {id(p) for b in batches for p in b.owners}
        self._resting = [b for b in others if all(id(p) not in held and p in state for p in b.owners)]
        self.batches = batches

    def _written(self, batch: Batch) -> list[Tensor]:
        """The DTensors of a batch that this step has written."""
        return [p for p, g in zip(batch.owners, batch.grads, strict=True) if g is not None]


class Stepped(Protocol):
    """What a prelude asks of its optimizer; see `RuleOptimizer`."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    state_dtype: torch.dtype | None
    flatten: str | None
    master_weights: bool
    stochastic_rounding: bool

    def rule_for(self, group: dict[str, Any]) -> Declaration: ...
    def settings(self, group: dict[str, Any]) -> list[tuple[list[Tensor], Mapping[str, Any]]]: ...
    def settle(self, lists: Iterable[Sequence[Tensor]]) -> None: ...


class _Part(NamedTuple):
    """Parameters of one group that have the same settings."""

    group: int
    rule: Declaration
    params: list[Tensor]
    settings: Mapping[str, Any]


class Prelude(Prepared):
    """The checks for a rule optimizer. Its batches are made when first needed and again whenever they no longer fit."""

    def __init__(self, optimizer: Stepped) -> None:
        super().__init__()
        self._optimizer = weakref.ref(optimizer)
        self._parts: list[tuple[Declaration, list[Tensor]]] = []
        self._exact: dict[Declaration, Declaration] = {}  # rules with master weights, by what they are made of
        self._outside: list[Tensor] = []
        self._reader = object()
        self._checked: set[object] = set()

    def prepare(self) -> None:
        """Bring the batches up to date with this step's gradients, numbers and parameters.

        Raises:
            GradientError: a gradient is of a kind that no rule takes; nothing has been changed.
            RuleError: the rule takes norms, of which a flat shard of FSDP1 knows a part; nothing has been changed.
            ValueError: `opt.state` holds what no step can go on from; nothing has been changed.
            RuntimeError: a tensor that only inference mode may write is written; nothing has been changed.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        parts = [
            _Part(i, optimizer.rule_for(group), params, settings)
            for i, group in enumerate(optimizer.param_groups)
            for params, settings in optimizer.settings(group)
        ]
        if not self._fit(optimizer, parts):
            self._make(optimizer, parts)
            if not self._fit(optimizer, parts):
                raise AssertionError("batches do not fit right after they were made")
        if any(batch.inference for batch in self.batches) and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "Inplace update to inference tensor outside InferenceMode is not allowed: a parameter or its state was "
                "made under torch.inference_mode(); nothing was changed. A clone of it is a normal tensor"
            )

    def check_once(self, rule: Declaration, settings: Mapping[str, Any], params: Iterable[Tensor]) -> None:
        """Refuse settings with which the rule fails, before another group is updated; numbers alone are not looked at.

        Raises:
            RuleError: names the rule and what it fails with.
        """
        key = structure(rule, settings)
        shapes = shapes_of(params)

        def fails(tried: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], RuleError]:
            found = {}
            for shape in tried:
                error = None if (key, shape) in self._checked else check_rule(rule, settings, shape)
                if error is None:
                    self._checked.add((key, shape))
                else:
                    found[shape] = error
            return found

        failed = fails(map(any_shape, (2, *sorted({len(shape) for shape in shapes} - {2}))))
        if any_shape(2) not in failed:
            return
        # sizes may be what it fails with: those of matrices count here, others where an eager step looks at them
        of_theirs = fails(sorted(shapes))
        matrices = [error for shape, error in of_theirs.items() if len(shape) == 2]
        if matrices or len(of_theirs) == len(shapes):
            raise [*matrices, *of_theirs.values(), failed[any_shape(2)]][0]

    def expose_states(self) -> None:
        """Show the states of parameters that were updated for the first time in `opt.state`."""
        self._expose(updated_first)

    def expose_updated(self) -> None:
        """As `expose_states` after a step that something interrupted (KeyboardInterrupt): of what it has updated."""
        self._expose(updated_so_far)

    def _expose(self, members: Callable[[Batch], list[int]]) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        new = [(batch, i) for batch in self.batches for i in members(batch)]
        if not new or not isinstance(optimizer.state, States):
            return
        numbers = _numbers(optimizer)  # entries come in the order of the parameters, as torch.optim's do
        for batch, i in sorted(new, key=lambda member: numbers[id(member[0].owners[member[1]])]):
            expose(batch, i, optimizer.state)
        for batch in self.batches:
            batch.all_seen = all(batch.seen)

    def _fit(self, optimizer: Stepped, parts: list[_Part]) -> bool:
        state = optimizer.state
        if not isinstance(state, States) or state.changes.made or any(p.grad is not None for p in self._outside):
            return False
        if state.changes.reader is not self._reader or state.changes.moved or len(parts) != len(self._parts):
            return False
        for part, (rule, known) in zip(parts, self._parts, strict=True):
            if part.rule is not rule or not same_objects(part.params, known):
                return False
        self._look_natively()
        for batch in self.batches if optimizer.stochastic_rounding else ():
            batch.rounding.fill(optimizer.param_groups[batch.group])
        return all(
            (self.unchanged or _read_gradients(b)) and fill_hyper(b, parts[b.part].settings) for b in self.batches
        )

    def _make(self, optimizer: Stepped, parts: list[_Part]) -> None:
        self._check_anew()
        for part in parts:
            check_kinds(part.rule, part.settings)
            self.check_once(part.rule, part.settings, part.params)
        for part in parts:
            for p in part.params:
                if p.grad is not None:
                    check_gradient(p, p.grad)
        if not isinstance(optimizer.state, States):
            optimizer.state = States(optimizer.state)
        state = optimizer.state
        unready = self._check_states(optimizer, parts)
        for part in parts:
            if any(sharding(p) == "flat shard" for p in part.params):
                check_flat_shards(part.rule, part.settings)
        state.changes.forget(self._reader)
        try:
            self._make_batches(optimizer, parts, state, unready)
        except BaseException:
            state.changes.made = True  # half of it is: the next step begins anew
            raise

    def _make_batches(self, optimizer: Stepped, parts: list[_Part], state: States, unready: set[int]) -> None:
        batches: list[Batch] = []
        outside: list[Tensor] = []
        numbers = _numbers(optimizer)
        for index, (group, rule, params, settings) in enumerate(parts):
            keyed: dict[Any, list[Tensor]] = {}
            again: dict[Any, list[Tensor]] = {}
            times: Counter[int] = Counter()
            for p in params:
                times[id(p)] += 1
                waits = p.grad is None and (p.device.type == "meta" or not (p.requires_grad or p in state))
                if waits or id(p) in unready:
                    outside.append(p)
                elif times[id(p)] == 1:
                    keyed.setdefault(batch_key(p, p.grad), []).append(p)
                else:  # a parameter that is listed twice is updated twice, as in torch.optim
                    again.setdefault((times[id(p)], batch_key(p, p.grad)), []).append(p)
            first: dict[Any, Batch] = {}
            for key, members in keyed.items():
                stepped = self._stepped(optimizer, rule, members[0])
                known = (*self.batches, *self._resting)
                old = next((b for b in known if _serves(b, stepped, index, settings, members)), None)
                if old is not None:
                    adopt(old, state)
                elif optimizer.flatten is not None:
                    with contextlib.suppress(OptionError):  # then they stay where they are; the report says the layout
                        optimizer.settle([members])
                stored, rounds = optimizer.state_dtype, optimizer.stochastic_rounding
                first[key] = old or make_batch(stepped, group, index, settings, members, state, stored, rounds)
                first[key].rounding.place(members, numbers)
            batches += [*first.values(), *(repeated(first[key], members) for (_, key), members in again.items())]
        self._take(batches, state)
        self._outside = outside
        self.objects = {id(p) for b in batches for p in b.params}
        self._parts = [(part.rule, list(part.params)) for part in parts]

    def _stepped(self, optimizer: Stepped, rule: Declaration, param: Tensor) -> Declaration:
        """The rule as it is computed for a parameter: half-precision ones may have master weights."""
        if not optimizer.master_weights or arithmetic_dtype(param.dtype) is param.dtype:
            return rule
        if rule not in self._exact:
            self._exact[rule] = with_master_weights(rule)
        return self._exact[rule]

    def _check_states(self, optimizer: Stepped, parts: list[_Part]) -> set[int]:
        """Refuse states that no step can go on from; of parameters without a gradient, return the ids instead.

        As in torch.optim, nothing reads these yet: they may become whole before the first gradient comes.
        """
        state = optimizer.state
        assert isinstance(state, States)
        unready: set[int] = set()
        numbers = _numbers(optimizer)
        for _, rule, params, settings in parts:
            for p in (p for p in params if dict.__contains__(state, p)):
                stepped = self._stepped(optimizer, rule, p)
                try:
                    check_state(stepped, settings, p, state.entry(p).present(), f"parameter {numbers[id(p)]}")
                except ValueError:
                    if p.grad is not None:
                        raise
                    unready.add(id(p))
        return unready


def _numbers(optimizer: Stepped) -> dict[int, int]:
    """The number of each parameter by its `id`; the first one of a parameter that is listed twice."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): i for i, p in reversed([*enumerate(params)])}


def _serves(batch: Batch, rule: Declaration, part: int, settings: Mapping[str, Any], members: list[Tensor]) -> bool:
    """True if a batch made now for these parameters would equal the existing one."""
    return (
        same_objects(members, batch.owners)
        and not batch.repeats
        and batch.rule is rule
        and batch.part == part
        and _read_gradients(batch)
        and fill_hyper(batch, settings)
    )


def _read_gradients(batch: Batch) -> bool:
    """Take this step's gradients into the batch; False where a parameter or gradient is no longer what it was."""
    if batch.is_dtensors:
        batch.params = list(map(local, batch.owners))
    params = batch.params
    batch.forget_gradients()
    grads = batch.grads
    if batch.same.match([*params, *grads]):
        return True
    batch.inference = any(p.is_inference() for p, g in zip(params, grads, strict=True) if g is not None)
    batch.inference |= any(flat.is_inference() for flat in batch.flat.values())
    dtypes = {None if g is None else g.dtype for g in grads} - {None, batch.grad_dtype}
    if dtypes:
        return False
    if not batch.same_params.match(params):  # a parameter may be another in the same memory: `p.data = p.data.t()`
        if {p.dtype for p in params} != {batch.dtype} or [p.shape for p in params] != batch.shapes:
            return False
        if [p.stride() for p in params] != batch.strides:
            return False
        batch.same_params.learn(params)
    pointers = [p.data_ptr() for p in params]
    if pointers != batch.pointers:
        if any(p.device != batch.device for p in params):
            return False
        batch.pointers = pointers
    for p, g in zip(params, grads, strict=True):
        if g is not None and not g.is_contiguous():
            check_gradient(p, g)
    present = [g for g in grads if g is not None]
    if len(present) == len(params):
        batch.same.learn([*params, *present])
    return True
