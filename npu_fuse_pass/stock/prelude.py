"""The checks before every step of a torch.optim optimizer that runs as a rule.

The batches are those of `rules.batch`, but that nothing is kept apart: states are the tensors in `opt.state`, made by
torch's own class and updated where they are, so that whatever else reads or writes them (checkpoints, an uncompiled
step) finds what it expects, and what it puts there counts at the next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import FuseError, RuleError
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.rules.batch import Batch, fill_hyper
from npu_fuse_pass.rules.checks import reads_step
from npu_fuse_pass.rules.declaration import Declaration
from npu_fuse_pass.rules.hyperparameters import Hyper
from npu_fuse_pass.rules.prelude import Prepared
from npu_fuse_pass.stock.classes import StockClass
from npu_fuse_pass.stock.entries import Entries, put_in_order, refused_state
from npu_fuse_pass.tensors.same import same_objects
from npu_fuse_pass.tensors.sharded import alike, is_dtensor, local, sharding

DTYPES = (torch.float32, torch.float64)
DEVICES = ("cpu", "npu")
_PLAIN = (Tensor, torch.nn.Parameter)


class Refused(FuseError):  # noqa: N818 - a value for the binding, not an accident
    """This step is not one that the rule computes; nothing was changed."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class StockPrelude(Prepared):
    """As `rules.prelude.Prelude`, over an optimizer's own states."""

    def __init__(self, opt: torch.optim.Optimizer, known: StockClass) -> None:
        super().__init__()
        self._opt, self._class = opt, known
        self._entries = Entries()
        self._groups: list[tuple[Declaration, list[Tensor]]] = []
        self._idle: list[Tensor] = []  # parameters whose first gradient changes the batches or their states
        self._made: list[tuple[Tensor, str, Tensor]] = []  # states that this step begins, and torch's would, too

    def prepare(self) -> None:
        """Bring the batches up to date with this step's gradients, numbers and states.

        Raises:
            Refused: the rule does not compute this step.
        """
        try:
            if not self._fit():
                self._make()
                if not self._fit():
                    raise Refused(Code.INTERNAL("batches do not fit right after they were made"))
        except RuleError as e:  # hyperparameters that are no numbers
            raise Refused(Code.NO_RULE(str(e))) from e
        if any(batch.inference for batch in self.batches) and not torch.is_inference_mode_enabled():
            raise Refused(Code.NO_RULE("a parameter or state was made under torch.inference_mode()"))

    def expose_states(self) -> None:
        """Show the states that this step has begun."""
        if self._made:
            for param, name, value in self._made:
                self._opt.state[param][name] = value
            self._made = []
            self._entries.learn(self._opt.state)

    def expose_updated(self) -> None:
        """As `expose_states` after a step that something interrupted: of what it has updated."""
        pairs = [pair for b in self.batches for pair in zip(b.owners, b.step_views, strict=True)]
        updated = {id(p) for p, step in pairs if step is not None and step > 0}
        self._made = [made for made in self._made if id(made[0]) in updated]
        self.expose_states()
        self.begin_anew()  # other states that it has begun are in no entry, where those of the next step belong

    def follow(self) -> None:
        """Another step than the rule's has run on these tensors: what is kept beside them follows it."""
        for param, name, value in self._made:
            value.copy_(self._opt.state[param][name])
        for batch in self.batches:
            if "step" in batch.fixed and batch.counts:
                batch.steps += torch.tensor([g is not None for g in batch.grads], dtype=torch.bool, device="cpu")

    def refused_parameters(self) -> Reason | None:
        """Why the rule's arithmetic is not torch's for these parameters."""
        params = [p for group in self._opt.param_groups for p in group["params"]]
        return next((r for i, p in enumerate(params) if (r := _refused(p, p, f"parameter {i}"))), None)

    def begin_anew(self) -> None:
        """Forget what was prepared: another step than the rule's runs, or this one has not ended."""
        self._made, self._entries = [], Entries()
        self.release_gradients()

    def _written(self, batch: Batch) -> list[Tensor]:
        """Parameters and states, which are DTensors as well."""
        rows = zip(batch.owners, batch.shown, batch.grads, strict=True)
        return [t for p, shown, g in rows if g is not None for t in (p, *shown.values())]

    def _fit(self) -> bool:
        groups = self._opt.param_groups
        if len(groups) != len(self._groups) or any(p.grad is not None for p in self._idle):
            return False
        for group, (rule, params) in zip(groups, self._groups, strict=True):
            if self._class.rule_of(group) is not rule or not same_objects(group["params"], params):
                return False
        state = self._opt.state
        watched = self._entries.watched(state)
        self._look_natively(watched)
        if not (self.unchanged and watched is not None) and not self._entries.same(state):
            return False
        if self.input_check is not None:
            self._entries.watch(self.input_check)
        return all((self.unchanged or _read(b)) and fill_hyper(b, groups[b.group]) for b in self.batches)

    @torch.no_grad()
    def _make(self) -> None:
        self._check_anew()
        self._made, self._idle = [], []
        if not all(isinstance(entry, dict) for entry in self._opt.state.values()):
            raise Refused(Code.NO_RULE("an entry of its state is no dict"))
        groups = self._opt.param_groups
        labels = {id(p): f"parameter {i}" for i, p in enumerate(p for group in groups for p in group["params"])}
        if len(labels) < sum(len(group["params"]) for group in groups):
            raise Refused(Code.NO_RULE("a parameter is listed more than once"))
        for group in groups:
            _check(group["params"], labels)
            self._initialise(group)
        put_in_order([entry for group in groups for p in group["params"] if (entry := self._opt.state.get(p))])
        found: list[Batch] = []
        for index, group in enumerate(groups):
            rule = self._class.rule_of(group)
            for members in self._members(group):
                known = (*self.batches, *self._resting)
                old = next((b for b in known if _serves(b, rule, index, group, members)), None)
                batch = old or _new(rule, index, group, members, self._class.counts)
                self._bind(batch, labels)
                found.append(batch)
        self._take(found, self._opt.state)
        self._groups = [(self._class.rule_of(group), list(group["params"])) for group in groups]
        self._entries.learn(self._opt.state)
        kept = (t for b in found for row in (b.params, b.step_views, *b.views.values()) for t in row)
        self.objects = {id(t) for t in kept if t is not None}

    def _initialise(self, group: dict[str, Any]) -> None:
        """Have torch's class make the states of parameters that have none."""
        new = [p for p in group["params"] if p.grad is not None and not self._opt.state.get(p)]
        if new:
            make: Callable[..., Any] | None = getattr(self._opt, "_init_group", None)
            if make is None:
                raise Refused(Code.NO_RULE("this torch has no Optimizer._init_group, which makes the states"))
            lists: list[list[Any]] = [[] for _ in list(inspect.signature(make).parameters)[1:]]
            make({**group, "params": new}, *lists)

    def _members(self, group: Mapping[str, Any]) -> Iterator[list[Tensor]]:
        """The parameters of a group that are updated together."""
        kinds: dict[tuple[torch.dtype, torch.device, bool], list[Tensor]] = {}
        has_states = self._class.counts or self._class.rule_of(group).states_of(group)
        for p in group["params"]:
            begun = bool(self._opt.state.get(p))
            member = p.requires_grad or p.grad is not None or begun
            if member:
                kinds.setdefault((p.dtype, p.device, is_dtensor(p)), []).append(p)
            if p.grad is None and not (member and (begun or not has_states)):
                self._idle.append(p)
        yield from kinds.values()

    def _bind(self, batch: Batch, labels: Mapping[int, str]) -> None:
        """Take the states that are there now."""
        batch.forget_gradients()
        missing: list[Tensor | None] = [None] * len(batch.params)
        entries = [self._opt.state.get(p) or {} for p in batch.owners]
        views = {name: missing.copy() for name in batch.stored}
        numbers = batch.numbers
        batch.shown = [{} for _ in batch.owners]
        for i, (p, entry) in enumerate(zip(batch.owners, entries, strict=True)):
            grad, label = p.grad, labels[id(p)]
            for name in batch.stored:
                value = entry.get(name)
                if value is None and grad is not None:
                    if "step" not in batch.fixed:
                        raise Refused(Code.NO_RULE(f"{label} has other states, and no {name!r}"))
                    value = torch.zeros_like(grad)
                    self._made.append((p, name, value))
                elif value is not None and name not in numbers and (reason := refused_state(p, name, value, label)):
                    raise Refused(reason)
                if value is not None:
                    views[name][i] = local(value)
                    batch.shown[i][name] = value
        batch.views = views  # type: ignore[assignment]
        for name in numbers:
            _check_numbers(name, views[name], batch.owners, labels)
        if "step" in batch.fixed:
            begun = [any(entry.get(name) is not None for name in batch.stored) for entry in entries]
            batch.steps.copy_(torch.tensor(begun, dtype=torch.bool, device="cpu"))
        else:
            batch.step_views = [entry.get("step") for entry in entries]  # type: ignore[misc]
            _check_numbers("step", batch.step_views, batch.owners, labels)


def _new(rule: Declaration, index: int, group: Mapping[str, Any], params: list[Tensor], counted: bool) -> Batch:
    """A batch without states. `counted`: "step" is one of them; otherwise what the rule needs of it is kept here."""
    hyper = Hyper(rule, group)
    names, first, held = rule.states_of(group), params[0], list(map(local, params))
    steps = torch.zeros(0 if counted else len(params), dtype=torch.float64, device="cpu")
    return Batch(
        rule=rule,
        group=index,
        part=index,
        owners=params,
        params=held,
        sharding=sharding(first) if is_dtensor(first) else None,
        dtype=first.dtype,
        grad_dtype=first.dtype,
        device=first.device,
        flat={},
        stored={**dict.fromkeys(names, first.dtype), **dict.fromkeys(rule.numbers_of(names), torch.float32)},
        fixed=frozenset() if counted else frozenset({"step"}),
        views={},
        steps=steps,
        step_views=list(steps.unbind()),
        shown=[],
        hyper=hyper,
        seen=[],
        totals=(),
        counts=counted or bool(names) or reads_step(rule, hyper.static, hyper.views, ()),
    )


def _check(params: Sequence[Tensor], labels: Mapping[int, str]) -> None:
    for p in params:
        label = labels[id(p)]
        reason = _refused(p, p, label) or (p.grad is not None and _refused(p, p.grad, f"the gradient of {label}"))
        if reason:
            raise Refused(reason)


def _refused(p: Tensor, t: Tensor, label: str) -> Reason | None:
    """Why the rule's arithmetic is not torch's for a parameter or its gradient."""
    if t.dtype in (torch.float16, torch.bfloat16):
        return Code.NO_RULE(f"{label} is {t.dtype}: torch rounds after every operation")
    if is_dtensor(p) and is_dtensor(t) and not alike(p, t):
        return Code.NO_RULE(f"{label} is distributed in another way than its parameter")
    known = p.dtype in DTYPES and p.device.type in DEVICES
    if not known or not alike(p, t) or _odd(local(t), p) or t.shape != p.shape:
        told = f"a {type(t).__name__}, {t.dtype}, {t.layout}, on {t.device}, of shape {tuple(t.shape)}"
        return Code.NO_RULE(f"{label} is {told}")
    return None


def _check_numbers(name: str, values: Sequence[Any], params: Sequence[Tensor], labels: Mapping[int, str]) -> None:
    for value, p in zip(values, params, strict=True):
        if value is not None and _odd_number(name, value):
            raise Refused(Code.NO_RULE(f"the state {name!r} of {labels[id(p)]} is {value!r}"))
    places = [value.data_ptr() for value in values if value is not None]
    if len(set(places)) < len(places):
        raise Refused(Code.NO_RULE(f"two parameters share the state {name!r}"))


def _serves(batch: Batch, rule: Declaration, index: int, group: Mapping[str, Any], members: list[Tensor]) -> bool:
    """True if a batch made now for these parameters would equal the existing one."""
    return (
        same_objects(members, batch.owners)
        and batch.rule is rule
        and batch.group == index
        and [local(p).numel() for p in members] == batch.numels
        and [local(p).stride() for p in members] == batch.strides
        and {(p.dtype, p.device) for p in members} == {(batch.dtype, batch.device)}
        and tuple(batch.stored) == rule.states_of(group)
        and fill_hyper(batch, group)
    )


def _read(batch: Batch) -> bool:
    """Take this step's gradients into the batch; False where a tensor is no longer what it was."""
    batch.forget_gradients()
    if batch.is_dtensors:
        if not all(p.grad is None or alike(p, p.grad) for p in batch.owners):
            return False
        batch.params = list(map(local, batch.owners))
        batch.views = {name: [local(s[name]) if name in s else None for s in batch.shown] for name in batch.stored}  # type: ignore[misc]
    counters = [] if "step" in batch.fixed else batch.step_views
    rows: list[Sequence[Tensor | None]] = [batch.params, batch.grads, *batch.views.values(), counters]
    tensors = [t for row in rows for t in row]
    if batch.same.match(tensors):
        return True
    if not all(_fits(batch, i, p, g) for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True))):
        return False
    batch.inference = any(t.is_inference() for row in (rows[0], *rows[2:]) for t in row if t is not None)
    present = [t for t in tensors if t is not None]
    if len(present) == len(tensors):
        batch.same.learn(present)
    return True


def _fits(batch: Batch, index: int, param: Tensor, grad: Tensor | None) -> bool:
    """True if a parameter, its gradient and its states are what the batch was made for."""
    if param.numel() != batch.numels[index] or param.stride() != batch.strides[index] or _odd(param, batch):
        return False
    if grad is None:
        return True
    numbers = batch.numbers
    own = (grad, *(views[index] for name, views in batch.views.items() if name not in numbers))
    counter = () if "step" in batch.fixed else (("step", batch.step_views[index]),)
    kept = (*counter, *((name, batch.views[name][index]) for name in numbers))
    return all(t is not None and t.shape == param.shape and not _odd(t, batch) for t in own) and not any(
        _odd_number(name, t) for name, t in kept
    )


def _odd(t: Tensor, like: Tensor | Batch) -> bool:
    """True for a tensor on which the rule's arithmetic differs from torch's. `like`: has its dtype and device."""
    kind = t.dtype, t.device, t.layout
    return type(t) not in _PLAIN or kind != (like.dtype, like.device, torch.strided)


def _odd_number(name: str, t: object) -> bool:
    """True for a counter or other per-parameter number of a kind that torch does not make or a rule cannot keep."""
    dtypes = DTYPES if name == "step" else (torch.float32,)
    return type(t) is not Tensor or t.dtype not in dtypes or t.device.type != "cpu" or t.ndim != 0
