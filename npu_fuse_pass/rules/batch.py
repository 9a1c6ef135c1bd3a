"""Where an optimizer's parameters, states, counters and hyperparameters lie: batches over flat buffers.

A `Batch` is the unit that the prelude prepares: the parameters of one group that share a rule, static options, dtypes
and device. Its states are views of one flat buffer per state, its counters one float64 vector, its hyperparameters
one float64 vector; that is why a step touches few Python objects and a changed number never recompiles.
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import GradientError
from npu_fuse_pass.rules.checks import is_pointwise, reads_step
from npu_fuse_pass.rules.declaration import RESIDUAL, Declaration, arithmetic_dtype
from npu_fuse_pass.rules.hyperparameters import Hyper
from npu_fuse_pass.rules.rounding import Rounding
from npu_fuse_pass.rules.state import ParamState, States
from npu_fuse_pass.tensors.buffers import flat_buffer, views_of
from npu_fuse_pass.tensors.memory import place
from npu_fuse_pass.tensors.same import SameTensors
from npu_fuse_pass.tensors.sharded import as_dtensor, is_dtensor, local, local_part, sharding

_grad = operator.attrgetter("grad")
_serials = itertools.count()


@dataclasses.dataclass(eq=False)
class Batch:
    """Parameters of one group with one rule, one set of static options, one dtype and device (N of them)."""

    rule: Declaration
    group: int
    part: int
    owners: list[Tensor]  # as the optimizer lists them; DTensors show here which part `params` are
    params: list[Tensor]  # what this process holds of them
    sharding: str | None
    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    flat: dict[str, Tensor]
    stored: dict[str, torch.dtype]  # the states, and in which dtype they are kept
    fixed: frozenset[str]  # which of the states and "step" stay where they are, whatever is changed between steps
    views: dict[str, list[Tensor]]
    steps: Tensor
    step_views: list[Tensor]
    shown: list[dict[str, Tensor]]  # by parameter: what `opt.state` has of it
    hyper: Hyper
    seen: list[bool]
    totals: tuple[str, ...]
    counts: bool  # whether its parameters have a step counter: those with a state do, and those whose rule reads it
    needs_whole: bool = False  # whether the rule takes norms or sums of parameters of which this process holds a part
    rounding: Rounding = dataclasses.field(default_factory=Rounding)
    checked: set[torch.Size] = dataclasses.field(default_factory=set)  # shapes on which the rule was run without values
    repeats: bool = False  # whether its parameters are listed in an earlier batch already, whose states it shares
    inference: bool = False  # whether it writes tensors that only inference mode may write
    pointers: list[int] = dataclasses.field(default_factory=list)
    all_seen: bool = False
    same: SameTensors = dataclasses.field(default_factory=SameTensors)
    same_params: SameTensors = dataclasses.field(default_factory=SameTensors)  # where gradients are others, or missing
    serial: int = dataclasses.field(init=False, default_factory=_serials.__next__)  # no other batch's, now or later
    _grads: list[Tensor | None] | None = dataclasses.field(default_factory=list)  # None: not read yet

    def __post_init__(self) -> None:
        """Note sizes and layouts; a parameter of others does not fit."""
        self.shapes = [p.shape for p in self.params]
        self.numels = [p.numel() for p in self.params]
        self.strides = [p.stride() for p in self.params]

    @property
    def grads(self) -> list[Tensor | None]:
        """This step's gradients; None for a parameter that is left out."""
        if self._grads is None:
            self._grads = list(map(_grad, self.owners))
            if self.is_dtensors:
                self._grads = list(map(local_part, self.owners, self._grads))
        return self._grads

    @grads.setter
    def grads(self, grads: list[Tensor | None]) -> None:
        self._grads = grads

    def forget_gradients(self) -> None:
        """Read them anew when they are next asked for."""
        self._grads = None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The states that are one number for a parameter; they come behind the others."""
        return self.rule.numbers_of(self.stored)

    @property
    def is_dtensors(self) -> bool:
        return self.sharding in ("shard", "replica")

    def keywords(self, step: Tensor, index: int) -> dict[str, Any]:
        """The keywords of the rule for one parameter at one step count, totals excepted."""
        rounding = self.rounding.keyword(lambda name: self.rounding.views[name][index])
        return {**self.hyper.static, **self.hyper.views, "step": step, **rounding}

    def states(self, index: int) -> dict[str, Tensor]:
        return {name: views[index] for name, views in self.views.items()}


def batch_key(param: Tensor, grad: Tensor | None) -> tuple[torch.dtype, torch.dtype, torch.device, str | None]:
    """What parameters of one batch have in common beside the group."""
    return param.dtype, param.dtype if grad is None else grad.dtype, param.device, sharding(param)


def make_batch(
    rule: Declaration,
    group: int,
    part: int,
    settings: Mapping[str, Any],
    owners: list[Tensor],
    state: States,
    state_dtype: torch.dtype | None,
    rounds: bool = False,
) -> Batch:
    """Allocate flat buffers for parameters and copy in what the optimizer's state holds for them.

    Args:
        state_dtype: of the states; None: the parameters' own.
        rounds: whether new values of half precision are rounded stochastically.
    """
    hyper = Hyper(rule, settings)
    names = rule.states_of(settings)
    grad = next((p.grad for p in owners if p.grad is not None), None)
    dtype, grad_dtype, device, spread = batch_key(owners[0], grad)
    params = list(map(local, owners))
    stored = state_dtype or dtype
    flat: dict[str, Tensor] = {}
    total = sum(p.numel() for p in params)
    for name in names:
        kept = torch.float32 if name == RESIDUAL else stored
        flat[name] = flat_buffer(total, kept, device, list(flat.values()))
    steps = torch.zeros(len(params), dtype=torch.float64, device="cpu")
    rounding = Rounding(len(params)) if rounds and arithmetic_dtype(dtype) is not dtype else Rounding()
    batch = Batch(
        rule=rule,
        group=group,
        part=part,
        owners=owners,
        params=params,
        sharding=spread,
        dtype=dtype,
        grad_dtype=grad_dtype,
        device=device,
        flat=flat,
        stored={name: t.dtype for name, t in flat.items()},
        fixed=frozenset((*names, "step", *rounding.names)),
        views={name: list(views_of(buffer, params)) for name, buffer in flat.items()},
        steps=steps,
        step_views=list(steps.unbind()),
        shown=[{} for _ in params],
        hyper=hyper,
        seen=[False] * len(params),
        totals=rule.totals_of(settings),
        needs_whole=spread == "shard" and not is_pointwise(rule, hyper.static, hyper.views, flat),
        rounding=rounding,
        counts=bool(flat or rounding.names) or reads_step(rule, hyper.static, hyper.views, rule.totals_of(settings)),
    )
    adopt(batch, state)
    return batch


def repeated(batch: Batch, params: Sequence[Tensor]) -> Batch:
    """A batch that updates some parameters of another one once more, on the same states."""
    at = {id(p): i for i, p in enumerate(batch.owners)}
    places = [at[id(p)] for p in params]
    return dataclasses.replace(
        batch,
        owners=list(params),
        params=list(map(local, params)),
        views={name: [views[i] for i in places] for name, views in batch.views.items()},
        step_views=[batch.step_views[i] for i in places],
        rounding=batch.rounding.part(places),
        shown=[batch.shown[i] for i in places],
        seen=[batch.seen[i] for i in places],
        pointers=[],
        repeats=True,
        same=SameTensors(),
        same_params=SameTensors(),
    )


def fill_hyper(batch: Batch, settings: Mapping[str, Any]) -> bool:
    """Write this step's numbers into the batch; False where the settings no longer fit its structure."""
    if tuple(batch.stored) != batch.rule.states_of(settings) or batch.totals != batch.rule.totals_of(settings):
        return False
    return batch.hyper.fill(settings)


def updated_first(batch: Batch) -> list[int]:
    """Members that this step updates, and whose states `opt.state` does not show yet."""
    if batch.all_seen or not batch.counts:
        return []
    return [i for i, grad in enumerate(batch.grads) if grad is not None and not batch.seen[i]]


def updated_so_far(batch: Batch) -> list[int]:
    """As `updated_first` after a step that something interrupted: members that it has updated."""
    members = range(len(batch.owners)) if batch.counts else ()
    return [i for i in members if not batch.seen[i] and batch.step_views[i] > 0]


def expose(batch: Batch, index: int, state: States) -> None:
    """Make a member's states visible in `opt.state`."""
    _show(batch, index, state.entry(batch.owners[index]))
    batch.seen[index] = True


def check_state(
    rule: Declaration, settings: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any], label: str
) -> None:
    """Refuse an entry of `opt.state` that no step can go on from, before anything is changed.

    Raises:
        ValueError: names the parameter and the state, and says what is allowed.
    """
    names = rule.states_of(settings)
    for name in names:
        value = entry.get(name)
        if value is None and rule.states[name].condition is None and entry.keys() & {*names, "step"}:
            listed = ", ".join(map(repr, entry))
            whole = f"give it all of {list(names)}, or clear() it to begin anew"
            raise ValueError(f"the state of {label} has {listed} and lacks {name!r}: {whole}")
        if value is None:
            continue
        allowed = f"allowed is a dense real tensor of the parameter's shape {tuple(param.shape)}"
        if not isinstance(value, Tensor):
            raise ValueError(f"state {name!r} of {label} is {value!r}; {allowed}")
        if is_dtensor(value) != is_dtensor(param):
            kinds = f"{type(value).__name__}, its parameter a {type(param).__name__}"
            raise ValueError(f"state {name!r} of {label} is a {kinds}; distribute both in the same way")
        if value.shape != param.shape or value.is_complex() or value.layout is not torch.strided:
            got = f"{value.dtype}, {value.layout}, of shape {tuple(value.shape)}"
            raise ValueError(f"state {name!r} of {label} is {got}; {allowed}")
    step = entry.get("step", 0)
    needed = "step" in rule.keywords and any(rule.states[n].condition is None for n in names)
    if needed and "step" not in entry and not entry.keys().isdisjoint(names):
        listed = ", ".join(map(repr, entry))
        raise ValueError(f"the state of {label} has {listed} and lacks 'step', which {rule.name} computes with")
    one = step.numel() == 1 and not step.is_complex() if isinstance(step, Tensor) else isinstance(step, numbers.Real)
    if not one:
        raise ValueError(f"state 'step' of {label} is {step!r}; allowed are a number and a tensor of one")


def check_gradient(param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that no rule takes, before anything is changed."""
    if grad.is_sparse or grad.layout is not torch.strided:
        raise GradientError(f"a gradient has layout {grad.layout}; allowed is torch.strided: call grad.to_dense()")
    if grad.is_complex() or not param.is_floating_point():
        dtype = grad.dtype if param.is_floating_point() else param.dtype
        raise GradientError(f"a gradient or parameter is {dtype}; allowed are real floating-point dtypes")
    if grad.shape != param.shape:
        raise GradientError(f"a gradient has shape {tuple(grad.shape)}; its parameter has {tuple(param.shape)}")
    if is_dtensor(grad) != is_dtensor(param):
        kinds = f"{type(grad).__name__}; its parameter is a {type(param).__name__}"
        raise GradientError(f"a gradient is a {kinds}: both or none of them may be DTensors")
    if grad.device != param.device:
        raise GradientError(f"a gradient is on {grad.device}; its parameter is on {param.device}")


def inputs_of(batches: Sequence[Batch]) -> list[Tensor | None]:
    """The tensors that `capture.rule` names as leaves, in its order; None where a parameter has no gradient."""
    found: list[Tensor | None] = []
    for b in batches:
        found += b.params
        found += b.grads
        for views in b.views.values():
            found += views
        found += b.step_views
        for numbers_of_each in b.rounding.views.values():
            found += numbers_of_each
        found += b.hyper.scalars
    return found


def adopt(batch: Batch, existing: States) -> None:
    """Bring loaded, assigned or earlier values into the buffers, and views of these into the entries.

    A parameter that has none of its states begins anew. What is no longer in its entry keeps its value, with memory of
    its own, so that it can be put back later.
    """
    entries = [existing.entry(p).present() if dict.__contains__(existing, p) else {} for p in batch.owners]
    begun = [not batch.flat or not batch.flat.keys().isdisjoint(entry) for entry in entries]
    # torch.optim.SGD keeps no counter: a parameter that has a state has been updated at least once
    steps = [float(entry.get("step", bool(batch.flat))) if b else 0.0 for b, entry in zip(begun, entries, strict=True)]
    for shown, entry in zip(batch.shown, entries, strict=True):
        for name in [name for name, t in shown.items() if entry.get(name) is not t]:
            t = local(shown.pop(name))
            t.data = t.clone()
    for name, views in batch.views.items():
        known = [entry[name].detach() if name in entry else None for entry in entries]
        _bring(list(map(local_part, batch.owners, known)), views, batch.rule.states[name].value)
    for view, step in zip(batch.step_views, steps, strict=True):
        view.fill_(step)
    batch.seen = [bool(entry and batch.counts) for entry in entries]
    for i, param in enumerate(batch.owners):
        if batch.seen[i]:
            _show(batch, i, existing.entry(param))
    batch.all_seen = all(batch.seen)


def _bring(values: Sequence[Tensor | None], views: Sequence[Tensor], fill: float) -> None:
    """Copy values to their places in a buffer; some may lie elsewhere in it, such as those of exchanged entries."""
    buffer = {view.untyped_storage().data_ptr() for view in views}
    stays = [v is not None and place(v) == place(view) for v, view in zip(values, views, strict=True)]
    found = [
        v.clone() if v is not None and not s and v.untyped_storage().data_ptr() in buffer else v
        for v, s in zip(values, stays, strict=True)
    ]
    for value, view, s in zip(found, views, stays, strict=True):
        if value is None:
            view.fill_(fill)
        elif not s:
            view.copy_(value)


def _show(batch: Batch, index: int, entry: ParamState) -> None:
    """Put a parameter's states into its entry: tensors that are used nowhere else, so that they can be given away."""
    shown = batch.shown[index]
    for name, view in {"step": batch.step_views[index], **batch.states(index)}.items():
        spread = batch.is_dtensors and name != "step"
        if name not in shown:
            shown[name] = as_dtensor(view.detach(), batch.owners[index]) if spread else view.detach()
        elif place(local(shown[name])) != place(view):
            local(shown[name]).data = view
    entry.take(shown)
