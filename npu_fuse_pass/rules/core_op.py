"""The operations that a captured step consists of, and their eager kernel: the rule, parameter by parameter.

`npu_fused::rule_step(Tensor(a!) ticket) -> ()` takes one tensor that names the optimizer instead of its tensors: what
Dynamo wraps is what costs compile time and guards (about 3.4 ms and 1.1 us per tensor). The ticket also holds a counter
that the operation writes, so that no compiler drops or reorders it. What Dynamo captures of all optimizers is the same,
so that it compiles it once for all of them.

`npu_fused::rule_update(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor? found_inf, str optimizer) -> ()` is the step as
part of a larger graph (clipping before it, an average of the parameters after it): that graph has to see which tensors
it reads and writes. States stay behind the handle; nothing else touches them.

Under any other backend the eager kernels below run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
import os
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from npu_fuse_pass.options import disabled
from npu_fuse_pass.private_torch import find, storage_key
from npu_fuse_pass.rules import pending
from npu_fuse_pass.rules.batch import Batch
from npu_fuse_pass.rules.checks import check_shape
from npu_fuse_pass.rules.pending import Keeping
from npu_fuse_pass.tensors.sharded import as_dtensor, is_dtensor, local, local_part
from npu_fuse_pass.user_warnings import warn


class Stepping(Keeping, Protocol):
    """An optimizer whose step these operations are; see `RuleOptimizer`."""

    _surface: Surface

    @property
    def _replaces(self) -> str | None: ...  # whose step it makes, where that is another optimizer's

    def _before(self, closure: Callable[[], Any] | None, in_graph: bool = False) -> Any: ...
    def _after(self) -> None: ...
    def _run_original(self) -> None: ...
    def _run_beside(self) -> None: ...


log = logging.getLogger(__name__)

_optimizers: weakref.WeakValueDictionary[str, Stepping] = weakref.WeakValueDictionary()
_NAME = "npu_fused_core_"
_cores = itertools.count()
_handles = map(str, itertools.count())  # strings: Dynamo makes a number that differs at a second compile symbolic

_MANY = 100  # steps without a kernel, after which that is said

_library = torch.library.Library("npu_fused", "FRAGMENT")
_library.define("rule_step(Tensor(a!) ticket) -> ()")
_library.define("rule_update(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor? found_inf, str optimizer) -> ()")
rule_step = torch.ops.npu_fused.rule_step.default
rule_update = torch.ops.npu_fused.rule_update.default


APART = (
    "npu_fused: the step takes the values that hold when it is called, so it runs fused in a graph of its own: {}; "
    "under fullgraph=True do that outside of the compiled function, or compile opt.step alone"
)


def optimizer_of(handle: str) -> Stepping:
    """The optimizer that a `rule_step` node names."""
    return _optimizers[handle]


def register(optimizer: Stepping) -> str:
    """A new handle for an optimizer."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


@dataclasses.dataclass(eq=False)
class Surface:
    """What Dynamo sees of an optimizer whose step is part of a larger graph.

    Not the optimizer itself: Dynamo would guard every number in its groups, and a changed lr would recompile. The
    optimizer's own groups and not a list of their parameters: Dynamo guards whatever is changed in their lists.
    """

    groups: list[dict[str, Any]]
    handle: str
    said: bool = False  # that the step is part of another backend's graph
    apart: str | None = None  # why and where a function's graph had to end before the step, the latest

    def present(self) -> list[Tensor]:
        """Parameters that have a gradient, group by group; which ones do is a guard of the graph."""
        return [p for group in self.groups for p in group["params"] if p.grad is not None]

    def update(self, found_inf: Tensor | None) -> None:
        """The step as an operation on tensors."""
        params = self.present()
        rule_update(params, [p.grad for p in params], found_inf, self.handle)  # without any it still calls step hooks


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_apart(handle: str) -> str:
    """While a function is traced: why the step cannot be part of its graph, or ""; noted for reports."""
    optimizer = optimizer_of(handle)
    reason = pending.why_apart(optimizer, optimizer._surface, rule_update, handle)
    if reason:
        optimizer._surface.apart = f"{reason}{_place()}"
        return reason
    # What the function does with states behind the step Dynamo guards as they are now, and compiling the step would
    # bring those that were put in from elsewhere into the flat buffers, maybe in another order of their elements.
    with contextlib.suppress(Exception):  # the step meets it again, and says so where it is compiled and called
        optimizer._prelude.prepare()
        optimizer._prelude.release_gradients()
    return ""


def _place() -> str:
    """Where the step is called in the function that is being traced."""
    extract = find("torch._guards.TracingContext.extract_stack")
    stack = extract() if extract is not None else ()
    frame = next((f for f in reversed(stack) if not f.filename.startswith(os.path.dirname(__file__))), None)
    return f" ({frame.filename}:{frame.lineno}, in {frame.name})" if frame is not None else ""


def make_ticket(handle: str) -> Tensor:
    """What `rule_step` is given: how many steps it has made, and which optimizer."""
    ticket = torch.tensor([0, int(handle)], dtype=torch.int64, device="cpu")
    ticket._npu_fused_handle = handle  # type: ignore[attr-defined]
    return ticket


def handle_on(ticket: Tensor) -> str:
    """The handle on a ticket, or on a compiler's copy of one."""
    found = getattr(ticket, "_npu_fused_handle", None)
    return str(int(ticket[1])) if found is None else found


def make_core() -> Callable[[Tensor], None]:
    """The function that Dynamo captures: one operation. Its code is its own, and so is torch's limit of 8 compiles."""

    def core(ticket: Tensor) -> None:
        rule_step(ticket)

    code = core.__code__.replace(co_name=f"{_NAME}{next(_cores)}")
    return types.FunctionType(code, core.__globals__, code.co_name, None, core.__closure__)


def is_core(function: Any) -> bool:
    """True if this is what `make_core` gives."""
    return str(getattr(function, "__name__", "")).startswith(_NAME)


class _NewestCore:
    """The core with which optimizers begin that have no compiled steps.

    Once there are two compiled forms of it (for other options, say), later optimizers take a new one: how many compiles
    torch allows an optimizer then hardly depends on what others did.
    """

    def __init__(self) -> None:
        self.core, self.compiles = make_core(), 0

    def note_compile(self) -> None:
        self.compiles += 1
        if self.compiles > 1:
            self.core, self.compiles = make_core(), 0


newest = _NewestCore()


@torch.no_grad()
def run_eager(optimizer: Stepping) -> None:
    """One step without a compiler: totals first, then every parameter's rule."""
    run_rules(_met(optimizer))


def _met(optimizer: Stepping) -> list[Batch]:
    """The batches of a step that every process with parts of its parameters makes unfused."""
    prelude = optimizer._prelude
    if any(batch.needs_whole for batch in prelude.batches):
        prelude.meeting.unfused(prelude.batches)
    return prelude.batches


def run_rules(batches: list[Batch]) -> None:
    """Totals, then every parameter's rule.

    Raises:
        RuleError: it fails on tensors of a parameter's shape; nothing was changed.
    """
    for batch in batches:
        _check_shapes(batch)
    if any(batch.needs_whole for batch in batches):
        from torch.distributed.tensor.experimental import implicit_replication

        with implicit_replication():  # counters and hyperparameters are plain numbers beside DTensors
            _run_rules(batches)
    else:
        _run_rules(batches)


def _run_rules(batches: list[Batch]) -> None:
    totals = [{name: _total(name, batch, batches) for name in batch.totals} for batch in batches]
    for batch, sums in zip(batches, totals, strict=True):
        for i, param, grad, states in _members(batch):
            step = batch.step_views[i] + 1
            new, new_grad, new_states = batch.rule.apply(param, grad, states, {**batch.keywords(step, i), **sums})
            written = [(param, new), *((states[name], value) for name, value in new_states.items())]
            _write([*written, (grad, new_grad)] if new_grad is not None else written)
            if batch.counts:
                batch.step_views[i].copy_(step)


def _check_shapes(batch: Batch) -> None:
    """Try the rule without values on every shape that it has not met, so that no step ends between two parameters."""
    whole = batch.owners if batch.needs_whole else batch.params
    shapes = dict.fromkeys(p.shape for p, grad in zip(whole, batch.grads, strict=True) if grad is not None)
    for shape in [shape for shape in shapes if shape not in batch.checked]:
        keywords = {**batch.hyper.static, **batch.hyper.views}
        check_shape(shape, batch.dtype, batch.rule, keywords, [*batch.flat], batch.totals)
        batch.checked.add(shape)


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy new values to where they belong; a rule may return what it was given, in another place or as a view."""
    memory = [storage_key(local(t).untyped_storage()) for pair in pairs for t in pair]
    written = set(memory[::2])
    values = [v.clone() if m in written and v is not t else v for (t, v), m in zip(pairs, memory[1::2], strict=True)]
    for (target, _), value in zip(pairs, values, strict=True):
        target.copy_(value)


def _members(batch: Batch) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]:
    """Those with a gradient, by place: parameter, gradient and states.

    Whole ones, as DTensors, where the rule takes norms of them; a 0-dim tensor as one element, so that float64
    hyperparameters do not promote it.
    """
    for i, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if grad is not None:
            held = {"param": param, "grad": grad, **batch.states(i)}
            if batch.needs_whole:
                held = {name: as_dtensor(t, batch.owners[i]) for name, t in held.items()}
            held = {name: t if t.ndim else t.view(1) for name, t in held.items()}
            yield i, held.pop("param"), held.pop("grad"), held


def _total(name: str, batch: Batch, batches: list[Batch]) -> Tensor:
    """A total in float64, over the parameters with a gradient of the group or of the optimizer."""
    everywhere = batch.rule.totals[name].over == "optimizer"
    alike = [b for b in batches if b.rule.itself is batch.rule.itself and name in b.totals]
    result = torch.zeros((), dtype=torch.float64, device="cpu")
    for b in (b for b in alike if everywhere or b.group == batch.group):
        for i, param, grad, states in _members(b):
            part = b.rule.contribution(name, param, grad, states, b.keywords(b.step_views[i] + 1, i))
            if is_dtensor(part):
                part = part.full_tensor()
            result = result + part.to(result.device)
    return result


_in_mode = find(
    "torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals",
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode",
)
_of_compilers = {} if _in_mode is None else inspect.signature(_in_mode).parameters  # older: whether those count


def under_dispatch_mode() -> bool:
    """True if a TorchDispatchMode is active (FlopCounterMode, say), under which Dynamo skips a core's code for good.

    In any thread: so torch has it.
    """
    return _in_mode is not None and bool(_in_mode(False) if _of_compilers else _in_mode())


def _step(ticket: Tensor) -> None:
    stepping = optimizer_of(handle_on(ticket))
    stepping._run_original()
    ticket[0].add_(1)
    if int(ticket[0]) == _MANY and not stepping._prelude.compiled and not disabled():
        log.warning(
            "%s has made %d steps without a fused kernel, parameter by parameter: it was never compiled. Call "
            "npu_fuse_pass.compile_optimizer_(opt), or instead of opt.step what npu_fuse_pass.compile_step(opt) or "
            'torch.compile(opt.step, backend="npu_fused") gives',
            type(stepping).__name__,
            _MANY,
        )


uncompiled_core: Callable[[Tensor], None] = torch.compiler.disable(_step)
"""What a core does, without Dynamo."""


@torch.no_grad()
def _update(params: list[Tensor], grads: list[Tensor], found_inf: Tensor | None, handle: str) -> None:
    """A whole step on the given tensors, which stand for the optimizer's own (a compiler may have cloned them)."""
    optimizer = optimizer_of(handle)
    if not optimizer._prelude.compiled and not optimizer._surface.said:
        optimizer._surface.said = True
        warn(
            f"npu_fused: the step of {type(optimizer).__name__} is part of a graph that another backend compiled, "
            'where it runs parameter by parameter, unfused. Compile that function with backend="npu_fused", or call '
            "the compiled step in a function of its own under @torch.compiler.disable"
        )
    own = optimizer._surface.present()
    given = {id(p): (param, p.grad, grad) for p, param, grad in zip(own, params, grads, strict=True)}
    optimizer._before(None, in_graph=True)  # hooks may change gradients
    if found_inf is None or not bool(found_inf):
        run_rules([_on_given(batch, given) for batch in _met(optimizer)])
    optimizer._after()


def _on_given(batch: Batch, given: Mapping[int, tuple[Tensor, Tensor | None, Tensor]]) -> Batch:
    pairs = []
    for owner, p, g in zip(batch.owners, batch.params, batch.grads, strict=True):
        param, before, grad = given.get(id(owner), (p, owner.grad, owner.grad))
        same = owner.grad is before and grad is not None
        pairs.append((local(param), local_part(owner, grad) if same else g))
    made = dataclasses.replace(batch, params=[p for p, _ in pairs])
    made.grads = [g for _, g in pairs]
    return made


_library.impl("rule_step", _step, "CompositeExplicitAutograd")
_library.impl("rule_update", _update, "CompositeExplicitAutograd")
torch.library.register_fake("npu_fused::rule_step", lambda ticket: None, lib=_library)
torch.library.register_fake("npu_fused::rule_update", lambda params, grads, found_inf, optimizer: None, lib=_library)
