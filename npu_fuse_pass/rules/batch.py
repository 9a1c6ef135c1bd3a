"""Where an optimizer's parameters, states, counters and hyperparameters lie: batches over flat buffers.

A `Batch` is the unit that the prelude prepares: the parameters of one group that share a rule, static options, dtypes
and device. Its states are views of one flat buffer per state, its counters one float64 vector, its hyperparameters
one float64 vector; that is why a step touches few Python objects and a changed number never recompiles.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from npu_fuse_pass.errors import GradientError
from npu_fuse_pass.rules.checks import reads_step
from npu_fuse_pass.rules.declaration import Rule
from npu_fuse_pass.rules.hyperparameters import Hyper
from npu_fuse_pass.tensors.buffers import flat_buffer
from npu_fuse_pass.tensors.same import SameTensors

if TYPE_CHECKING:
    from npu_fuse_pass.rules.optimizer import RuleOptimizer


_grad = operator.attrgetter("grad")


class ParamState(dict[str, Any]):
    """State of one parameter; assigning a tensor copies into the optimizer's flat buffer."""

    def __setitem__(self, name: str, value: Any) -> None:
        view = self.get(name)
        if not isinstance(view, Tensor) or value is view:
            super().__setitem__(name, value)
        elif isinstance(value, Tensor) and value.numel() == view.numel():
            view.copy_(value.detach().reshape(view.shape))
        elif isinstance(value, (int, float)) and view.ndim == 0:
            view.fill_(value)
        else:
            got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state {name!r} is a tensor of shape {tuple(view.shape)}; cannot assign {got}")


class States(defaultdict[Tensor, Any]):
    """`opt.state`: parameter -> ParamState. Notices when entries are replaced or removed, so that storage follows."""

    def __init__(self, entries: Mapping[Tensor, Mapping[str, Any]] | None = None) -> None:
        super().__init__(ParamState)
        self.changed = True
        for param, entry in (entries or {}).items():
            super().__setitem__(param, ParamState(entry))

    def __setitem__(self, param: Tensor, entry: Mapping[str, Any]) -> None:
        super().__setitem__(param, entry if isinstance(entry, ParamState) else ParamState(entry))
        self.changed = True

    def __delitem__(self, param: Tensor) -> None:
        super().__delitem__(param)
        self.changed = True

    def pop(self, *args: Any) -> Any:
        self.changed = True
        return super().pop(*args)

    def clear(self) -> None:
        super().clear()
        self.changed = True


@dataclasses.dataclass(eq=False)
class Batch:
    """Parameters of one group with one rule, one set of static options, one dtype and device (N of them)."""

    rule: Rule
    group: int
    part: int
    params: list[Tensor]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    flat: dict[str, Tensor]
    views: dict[str, list[Tensor]]
    steps: Tensor
    step_views: list[Tensor]
    hyper: Hyper
    numels: list[int]
    seen: list[bool]
    totals: tuple[str, ...]
    strides: list[tuple[int, ...]]
    pointers: list[int]
    counts: bool  # whether its parameters have a step counter: those with a state do, and those whose rule reads it
    all_seen: bool = False
    same: SameTensors = dataclasses.field(default_factory=SameTensors)
    _grads: list[Tensor | None] | None = dataclasses.field(default_factory=list)  # None: not read yet

    @property
    def grads(self) -> list[Tensor | None]:
        """This step's gradients; None for a parameter that is left out."""
        if self._grads is None:
            self._grads = list(map(_grad, self.params))
        return self._grads

    @grads.setter
    def grads(self, grads: list[Tensor | None]) -> None:
        self._grads = grads

    def forget_gradients(self) -> None:
        """Read them anew when somebody asks for them."""
        self._grads = None

    def keywords(self, step: Tensor) -> dict[str, Any]:
        """The keywords of the rule at one step count, totals excepted."""
        return {**self.hyper.static, **self.hyper.views, "step": step}

    def states(self, index: int) -> dict[str, Tensor]:
        return {name: views[index] for name, views in self.views.items()}


def batch_key(param: Tensor, grad: Tensor | None) -> tuple[torch.dtype, torch.dtype, torch.device]:
    """What parameters of one batch have in common beside the group."""
    return param.dtype, param.dtype if grad is None else grad.dtype, param.device


def make_batch(
    rule: Rule, group: int, part: int, settings: Mapping[str, Any], params: list[Tensor], optimizer: RuleOptimizer
) -> Batch:
    """Allocate flat buffers for `params` and copy in what the optimizer's state holds for them."""
    hyper = Hyper(rule, settings)
    names = rule.states_of(settings)
    dtype, grad_dtype, device = batch_key(params[0], next((p.grad for p in params if p.grad is not None), None))
    stored = optimizer.state_dtype or dtype
    flat: dict[str, Tensor] = {}
    views = {}
    total = sum(p.numel() for p in params)
    for name in names:
        flat[name] = flat_buffer(total, stored, device, list(flat.values()))
        views[name] = list(_views(flat[name], params))
    steps = torch.zeros(len(params), dtype=torch.float64, device="cpu")
    batch = Batch(
        rule=rule,
        group=group,
        part=part,
        params=params,
        dtype=dtype,
        grad_dtype=grad_dtype,
        device=device,
        flat=flat,
        views=views,
        steps=steps,
        step_views=list(steps.unbind()),
        hyper=hyper,
        numels=[p.numel() for p in params],
        seen=[False] * len(params),
        totals=rule.totals_of(settings),
        strides=[p.stride() for p in params],
        pointers=[],
        counts=bool(flat) or reads_step(rule, hyper.static, hyper.views, rule.totals_of(settings)),
    )
    assert isinstance(optimizer.state, States)
    adopt(batch, optimizer.state)
    return batch


def reference_strides(param: Tensor) -> tuple[int, ...]:
    """Strides in which the elements of a parameter's states lie: its own where it is dense, else contiguous."""
    if param.is_contiguous():
        return param.stride()
    return torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()


def fill_hyper(batch: Batch, settings: Mapping[str, Any]) -> bool:
    """Write this step's numbers into the batch; False where the settings no longer fit its structure."""
    if tuple(batch.flat) != batch.rule.states_of(settings) or batch.totals != batch.rule.totals_of(settings):
        return False
    return batch.hyper.fill(settings)


def expose(batch: Batch, state: States) -> None:
    """Make the states of parameters that were updated for the first time visible in `opt.state`."""
    if batch.all_seen or not batch.counts:
        return
    changed = state.changed
    for i, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if grad is not None and not batch.seen[i]:
            batch.seen[i] = True
            state[param] = ParamState(step=batch.step_views[i], **batch.states(i))
    state.changed = changed
    batch.all_seen = all(batch.seen)


def check_gradient(param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that no rule takes, before anything is changed."""
    if grad.is_sparse or grad.layout is not torch.strided:
        raise GradientError(f"a gradient has layout {grad.layout}; allowed is torch.strided: call grad.to_dense()")
    if grad.is_complex() or param.is_complex():
        raise GradientError(f"a gradient or parameter is {grad.dtype}; allowed are real floating-point dtypes")
    if grad.shape != param.shape:
        raise GradientError(f"a gradient has shape {tuple(grad.shape)}; its parameter has {tuple(param.shape)}")
    if grad.device != param.device:
        raise GradientError(f"a gradient is on {grad.device}; its parameter is on {param.device}")


def inputs_of(batches: Sequence[Batch]) -> list[Tensor | None]:
    """The tensors that `trace` names as leaves, in its order; None where a parameter has no gradient."""
    found: list[Tensor | None] = []
    for b in batches:
        found += b.params
        found += b.grads
        for views in b.views.values():
            found += views
        found += b.step_views
        found += b.hyper.scalars
    return found


def _views(flat: Tensor, params: Iterable[Tensor]) -> Iterator[Tensor]:
    offset = 0
    for p in params:
        yield flat.as_strided(p.shape, reference_strides(p), offset)
        offset += p.numel()


def adopt(batch: Batch, existing: States) -> None:
    """Copy loaded or earlier values into the buffers and put views in their place; reset where there are none."""
    changed = existing.changed
    for i, param in enumerate(batch.params):
        entry = {k: v for k, v in existing[param].items() if v is not None} if param in existing else {}
        batch.seen[i] = bool(entry and batch.counts)
        for name, views in batch.views.items():
            if name in entry:
                views[i].copy_(entry[name].detach().reshape(param.shape))
            else:
                views[i].fill_(batch.rule.states[name].value)
        # torch.optim.SGD keeps no counter: a parameter that has a state has been updated at least once
        batch.steps[i] = float(entry["step"]) if "step" in entry else float(any(n in entry for n in batch.flat))
        if batch.seen[i]:
            existing[param] = ParamState({**entry, "step": batch.step_views[i], **batch.states(i)})
    existing.changed = changed
    batch.all_seen = all(batch.seen)
