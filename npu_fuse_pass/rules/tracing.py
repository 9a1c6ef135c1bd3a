"""What Dynamo does otherwise while it compiles for this backend: numbers, names of one tensor, optimizers' attributes.

Python numbers are symbolic where they change, instead of a compile for each value. Dynamo makes an integer that changed
symbolic, but fixes it again where `math.pow`, `math.log` or `math.exp` takes it: it looks for torch._sym_pow and its
like, which torch lacks (it has _sym_sqrt and others). They exist only while Dynamo compiles for this backend; other
compiles do not see them. The same holds for powers of negative numbers, which torch refuses since some are complex.
Numbers that are known to change are symbolic from the first compile on, and Dynamo does not write `capturable`, an
option of torch's classes, into the groups of others, where its guards then fail.

Under plain `torch.compile` nobody has seen a step before the first compile. What a later compile finds in states and
groups for the first time was made by a step, and will change; so will lr. Both are symbolic then, where the step
itself is compiled: in a function around it Dynamo's own guesses stay.

What is found through an optimizer has other names, too: a parameter is a key of `opt.state`, and may be a variable of
the function. Dynamo finds an entry of the state by its place among the keys, and leaves out the guards that both names
mean one tensor still, which takes less time. Entries that were removed and made anew are in another order; without
those guards parameters get each other's states, silently. A gradient that two parameters have it reads from one of
them, and does not guard that it stays the other's.

Dynamo drops what is assigned to attributes of torch's optimizers, `opt.param_groups` among them. It carries out what is
assigned to objects that it tracks, so it tracks optimizers, too. What is assigned to their classes it reads through an
optimizer as it was before. It takes a deque for one without a `maxlen`, so that a full one would have one item too many
in the graph. It draws from a `random.Random` while it traces, and every call gets these numbers. And what was read as
`p.data` or `p.T` it reads again behind the graph, where other data may have been assigned.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import functools
import math
import random
import re
import threading
import types
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from npu_fuse_pass.private_torch import find
from npu_fuse_pass.rules.pending import reads_changed
from npu_fuse_pass.rules.torch_steps import innermost, is_ours


def _sym_pow(x: Any, y: Any) -> Any:
    """math.pow of numbers, of which one may be symbolic."""
    return torch.sym_float(x) ** torch.sym_float(y) if _is_symbolic(x) or _is_symbolic(y) else math.pow(x, y)


def _sym_log(x: Any, base: float = math.e) -> Any:
    """math.log of a number that may be symbolic."""
    return _sym_log2(x) / math.log2(base) if _is_symbolic(x) else math.log(x) if base == math.e else math.log(x, base)


def _sym_exp(x: Any) -> Any:
    """math.exp of a number that may be symbolic."""
    return math.e ** torch.sym_float(x) if _is_symbolic(x) else math.exp(x)


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, (torch.SymInt, torch.SymFloat))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a step that `compile_step` has compiled."""

    backend: object
    changing: Collection[str]
    reads: bool


_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("call", default=None)
_compile_of_code: contextvars.ContextVar[int | None] = contextvars.ContextVar("compile_of_code", default=None)  # plain
_first_seen: weakref.WeakKeyDictionary[types.CodeType, dict[str, int]] = weakref.WeakKeyDictionary()
_sym_log2 = find("torch._sym_log2")
_data_dependent = find("torch._subclasses.fake_tensor.DataDependentOutputException")
_KNOWN = ("floor", "ceil", "trunc", "radians", "isnan", "isinf", "isfinite")  # of which Dynamo has forms of its own
_entry_of, _auto_dynamic = _ENTRIES = (
    find("torch._dynamo.variables.builder.process_automatic_dynamic"),
    find("torch._dynamo.pgo.auto_dynamic"),
)
_set_capturable, _attribute_source, _variable, _lazy = _CAPTURABLE = (
    find("torch._dynamo.variables.OptimizerVariable._set_capturable"),
    find("torch._dynamo.source.AttrSource"),
    find("torch._dynamo.variables.VariableTracker"),
    find("torch._dynamo.variables.LazyVariableTracker"),
)
_end_mapping, _install_guard, _one_object = _GRADIENTS = (
    find("torch._dynamo.variables.OptimizerVariable.create_finalizer"),
    find("torch._dynamo.guards.install_guard"),
    find("torch._dynamo.guards.GuardBuilder.DUPLICATE_INPUT"),
)
_call_method = find("torch._dynamo.variables.OptimizerVariable.call_method")
_leaves_out_guards = find("torch._dynamo.guards.is_from_optimizer_source")
_matches_on_id = find("torch._dynamo.guards.match_on_id_for_tensor")
_read_attribute = find("torch._dynamo.variables.OptimizerVariable.var_getattr")
_tensor, _read_of_tensor, _end_graph = _DATA = (
    find("torch._dynamo.variables.TensorVariable"),
    find("torch._dynamo.variables.TensorVariable.var_getattr"),
    find("torch._dynamo.output_graph.OutputGraph.compile_subgraph"),
)
_call_of_tensor, _build = _DELETED = (
    find("torch._dynamo.variables.TensorVariable.call_method"),
    find("torch._dynamo.variables.VariableTracker.build"),
)
_variable_of, _optimizer = _ATTRIBUTES = (
    find("torch._dynamo.variables.builder.VariableBuilder._wrap"),
    find("torch._dynamo.variables.OptimizerVariable"),
)
_object_of = find("torch._dynamo.variables.builder.VariableBuilder.wrap_user_defined")

_format_value, _sym_node, _constant, _unbacked = _FORMATS = (
    find("torch._dynamo.symbolic_convert.InstructionTranslatorBase._format_value"),
    find("torch._dynamo.variables.SymNodeVariable"),
    find("torch._dynamo.variables.ConstantVariable"),
    find("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols"),
)
_same_constant = find("torch._dynamo.guards.GuardBuilder.CONSTANT_MATCH")
_DEQUES = (_same_constant, _install_guard, _attribute_source, _constant)


def _entry_as_if_changed(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
    """Dynamo's entry of an input; a number that is known to change is marked as changed."""
    found = _entry_of(tx, name, entry, **kwargs)
    if isinstance(found.scalar, (int, float)) and _is_known_to_change(tx, name, found.scalar):
        return dataclasses.replace(found, scalar=_auto_dynamic)
    return found


def _is_known_to_change(tx: Any, name: str, value: float) -> bool:
    """Of an input by Dynamo's name for it."""
    key = re.search(r"(^L)?\['(\w+)'\]$", name)
    if key is None:
        return False
    number = _compile_of_code.get()
    if number is not None:
        if not name.startswith(("L['self']", "L['args'][0]")):
            return False
        return (key[2] == "lr" and number > 0) or _came_with_a_step(tx.f_code, name, value, number)
    if key[1] and isinstance(value, float) and tx.f_code.co_name.startswith("torch_dynamo_resume_in_"):
        return True  # a variable after a break was computed before it, of those that change
    call = _call.get()
    return call is not None and key[2] in call.changing


def _came_with_a_step(code: types.CodeType, name: str, value: float, number: int) -> bool:
    """Whether a number of a state or group was not there before a compile of this code that was not the first.

    A group that was not there itself is of another optimizer of the class, and its numbers are options. A count is met
    after one step, at 1 or 2; larger integers may be sizes, which stay parts of the graph.
    """
    if not re.search(r"\.(state|param_groups)\[", name):
        return False
    seen = _first_seen.setdefault(code, {})
    group = re.match(r".*\.param_groups\[\d+\]", name)
    since = seen.setdefault(group[0], number) if group else 0
    return seen.setdefault(name, number) > since and (isinstance(value, float) or 0 <= value <= 2)


def _set_capturable_where_known(self: Any, tx: Any) -> None:
    """Set `capturable` as torch does, but only in groups that have the option, and only while they are read.

    What a function changes in a group, or copies from it, gets the option as it is.
    """
    source = self.source and _attribute_source(self.source, "param_groups")
    groups = _lazy.realize_all(_variable.build(tx, self.value.param_groups, source)).items
    options = [_capturable(group) for group in groups]
    if not any(options):
        return
    before = [group.get("capturable") for group in self.value.param_groups]
    _set_capturable(self, tx)
    for group, option in zip(self.value.param_groups, before, strict=True):
        if not group["params"] and option is not None:
            group["capturable"] = option  # torch takes all of no parameters to be on a GPU
    for group, option in zip(groups, options, strict=True):
        ((key, traced),) = _capturable(group).items()
        if not option:
            del group.items[key]
        for variable in option.values():
            group.items[key] = type(traced)(traced.value, source=variable.source)


def _capturable(group: Any) -> dict[Any, Any]:
    """The option in Dynamo's variable of a group, if it has it."""
    names = {key: key.vt.as_python_constant() for key in group.items if key.vt.is_python_constant()}
    return {key: group.items[key] for key, name in names.items() if name == "capturable"}


def _attribute(self: Any, tx: Any, name: str) -> Any:
    """An optimizer's attribute; Dynamo takes any name that is part of "_init_group" for that method: `n`, `group`.

    What the function has assigned to the class (`type(self).count += 1`) it reads through the optimizer as before.
    """
    effects = tx.output.side_effects
    own = name in vars(self.value) or effects.has_pending_mutation_of_attr(self, name)
    for cls in () if own else type(self.value).__mro__:
        if cls in effects and effects.has_pending_mutation_of_attr(effects[cls], name):
            return effects.load_attr(effects[cls], name)
        if name in vars(cls):
            break
    if name != "_init_group" and name in "_init_group":
        return super(type(self), self).var_getattr(tx, name)
    return _read_attribute(self, tx, name)


def _method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A call of an optimizer's method. `_init_group` Dynamo runs while it traces: too early for what has changed."""
    if name == "_init_group" and (_has_shown_states(self.value, tx.output) or reads_changed(self.value, tx.output)):
        return super(type(self), self).call_method(tx, name, args, kwargs)
    return _call_method(self, tx, name, args, kwargs)


_GATHERED = "_npu_fused_gathered"


def _has_shown_states(opt: torch.optim.Optimizer, output: Any) -> bool:
    """True if the function has looked at the states ahead of a step that is about to make some."""
    gathered = vars(output).setdefault(_GATHERED, set())
    if id(opt) in gathered:
        return False
    gathered.add(id(opt))
    params = (p for group in opt.param_groups for p in group["params"])
    return opt.state in output.side_effects and any(p.grad is not None and not opt.state.get(p) for p in params)


def _guard_shared_gradients(self: Any, tx: Any) -> None:
    """Guard that two parameters with one gradient have one: the last thing Dynamo does for the parameters of a step."""
    for p, source in self.tensor_to_source.items():
        used = self.grad_to_source.get(p.grad) if p.is_leaf else None
        if used is not None and used.base != source:
            same = functools.partial(_one_object, source_b=used)
            _install_guard(dataclasses.replace(used, base=source).make_guard(same))
    _end_mapping(self, tx)


def _is_matched_on_id(guard: Any) -> bool:
    """Whether a tensor is guarded to be the same object: a key of a dict, but not what an attribute of one holds."""
    is_attribute = isinstance(guard.originating_source, _attribute_source)
    return _matches_on_id(guard) and (guard.is_specialized_nn_module() or not is_attribute)


def _input(self: Any, value: Any) -> Any:
    """Dynamo's variable of an input; what is assigned to attributes of an optimizer is carried out behind the graph.

    A `random.Random` is an object like others, whose methods Python calls between graphs.
    """
    if type(value) is random.Random and _object_of is not None:
        return _object_of(self, value)
    variable, tracked = _variable_of(self, value), self.tx.output.side_effects
    if type(value) is collections.deque and None not in _DEQUES:
        _install_guard(_attribute_source(self.source, "maxlen").make_guard(_same_constant))
        variable.maxlen = _constant(value.maxlen)
        variable.maxlen.is_constant_none = lambda: True  # Dynamo writes all items anew, whatever the limit
    if not isinstance(variable, _optimizer) or value in tracked:
        return variable
    return tracked.track_object_existing(value, variable)


_DATA_READ = "_npu_fused_data_read"


def _read_data(self: Any, tx: Any, name: str) -> Any:
    """A tensor's attribute; each that lies in its memory is noted."""
    found = _read_of_tensor(self, tx, name)
    if isinstance(found, _tensor) and found.proxy.node.op == "call_function":
        vars(tx.output).setdefault(_DATA_READ, []).append(found)
    return found


def _return_data(self: Any, *args: Any, **kwargs: Any) -> Any:
    """End a graph; it returns what was read of tensors' memory where it assigns `data`."""
    assigned = any(node.target is torch.Tensor.set_ for node in self.graph.nodes)
    for variable in vars(self).get(_DATA_READ, ()) if assigned else ():
        variable.source = None
    return _end_graph(self, *args, **kwargs)


def _tensor_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A call of a tensor's method. `del p.grad`, which Dynamo loses, is `p.grad = None`."""
    if name == "__delattr__" and args[0].as_python_constant() == "grad":
        return _build(tx, setattr).call_function(tx, [self, args[0], _build(tx, None)], {})
    return _call_of_tensor(self, tx, name, args, kwargs)


def _format_as_constant(self: Any, fmt_spec: Any, flags: int) -> None:
    """Format a value in an f-string; a number is fixed then. Dynamo formats the text of one that is symbolic."""
    value = self.stack[-1]
    if isinstance(value, _sym_node) and not _unbacked(value.sym_num):  # of a tensor's number nothing is known
        self.stack[-1] = _constant.create(value.evaluate_expr())
    _format_value(self, fmt_spec, flags)


def _of_real_numbers(name: str) -> Any:
    """A function of math that has no symbolic form: of a number that a tensor gave, it ends the graph."""
    real = getattr(math, name)

    @functools.wraps(real)
    def function(*args: Any) -> Any:
        if any(_is_symbolic(x) and _is_read(x) for x in args):
            raise _data_dependent(f"math.{name}")
        return real(*args)

    return function


def _is_read(x: Any) -> bool:
    """True of what is computed of a number that `item()` reads."""
    sources = getattr(x.node.shape_env, "var_to_sources", {})
    found = [source for symbol in x.node.expr.free_symbols for source in sources.get(symbol, ())]
    return any(type(source).__name__ == "CallMethodItemSource" for source in found)


_MISSING = {"_sym_pow": _sym_pow, "_sym_exp": _sym_exp, **({"_sym_log": _sym_log} if _sym_log2 is not None else {})}
if _data_dependent is not None:
    _others = [name for name, f in vars(math).items() if callable(f) and name[0] != "_" and name not in _KNOWN]
    _MISSING = {f"_sym_{name}": _of_real_numbers(name) for name in _others} | _MISSING


class _Replaced:
    """Attributes of torch's modules that are others as long as somebody needs them.

    Args:
        replacements: module or class, name, replacement; None as the first, or as the last, replaces nothing.
    """

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        self._replacements = [r for r in replacements if r[0] is not None and r[2] is not None]
        self._before = [getattr(owner, name, None) for owner, name, _ in self._replacements]
        self._lock = threading.Lock()
        self._entered = 0

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        """A context in which they are."""
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                for owner, name, replacement in self._replacements:
                    setattr(owner, name, replacement)
        try:
            yield
        finally:
            with self._lock:
                self._entered -= 1
                if not self._entered:
                    for (owner, name, _), before in zip(self._replacements, self._before, strict=True):
                        if before is None:
                            delattr(owner, name)
                        else:
                            setattr(owner, name, before)


def _where(needed: Collection[Any], owner: Any, name: str, replacement: Any) -> tuple[Any, str, Any]:
    """A replacement on a torch that has all that it needs, otherwise none."""
    return (None if None in needed else owner), name, replacement


_BUILDER = find("torch._dynamo.variables.builder")
_TRANSLATOR = find("torch._dynamo.symbolic_convert.InstructionTranslatorBase")
_tracing = _Replaced(
    (torch.SymFloat, "__pow__", lambda x, y: x.__float_pow__(y)),  # whose base may be negative
    (torch.SymFloat, "__rpow__", lambda x, base: x.__rfloat_pow__(base)),
    *((torch, name, function) for name, function in _MISSING.items() if not hasattr(torch, name)),
    _where(_ENTRIES, _BUILDER, "process_automatic_dynamic", _entry_as_if_changed),
    _where(_CAPTURABLE, _optimizer, "_set_capturable", _set_capturable_where_known),
    _where([_read_attribute], _optimizer, "var_getattr", _attribute),
    _where([_call_method], _optimizer, "call_method", _method),
    _where(_GRADIENTS, _optimizer, "create_finalizer", _guard_shared_gradients),
    _where([_leaves_out_guards], find("torch._dynamo.guards"), "is_from_optimizer_source", lambda source: False),
    _where(
        (_matches_on_id, _attribute_source), find("torch._dynamo.guards"), "match_on_id_for_tensor", _is_matched_on_id
    ),
    _where(_ATTRIBUTES, find("torch._dynamo.variables.builder.VariableBuilder"), "_wrap", _input),
    _where(_DATA, _tensor, "var_getattr", _read_data),
    _where(_DELETED, _tensor, "call_method", _tensor_method),
    _where(_DATA, find("torch._dynamo.output_graph.OutputGraph"), "compile_subgraph", _return_data),
    _where(_FORMATS, _TRANSLATOR, "_format_value", _format_as_constant),
)
# Libraries that compile parts of their steps themselves lift torch's limit of compiles meanwhile, in a context that
# Dynamo skips; a step that is compiled as a whole has its own limit. Guards look at it, so it stays during the call.
_calling = _Replaced((find("torch._dynamo.utils"), "disable_cache_limit", contextlib.nullcontext))


# Numbers read by `item()` stay in the graph instead of breaking it. Dynamo's own check of what it assumes of them is
# off: it cannot write a quotient of two, and fails. `torch._check` of a number is a node of the graph, and stays.
_READ = "torch._dynamo.config.capture_scalar_outputs", "torch._dynamo.config.do_not_emit_runtime_asserts"
# numpy.random draws what it does eagerly, between graphs, where Dynamo would draw from torch's generator
_NUMPYS_DRAWS = "torch._dynamo.config.use_numpy_random_stream"


@contextlib.contextmanager
def calling(backend: object, changing: Collection[str] = (), reads: bool = True) -> Iterator[None]:
    """Say what is known of a step while it is called, for the compiles by its backend.

    Args:
        backend: which torch.compile was given.
        changing: keys in groups and states whose numbers are symbolic from the first compile on.
        reads: numbers that `item()` reads stay in the graph.
    """
    token = _call.set(_Call(backend, changing, reads))
    try:
        with _calling.meanwhile():
            yield
    finally:
        _call.reset(token)


@functools.cache
def look_after_compiles() -> None:
    """Have Dynamo do all this while it compiles for this backend, whoever called torch.compile; once for a process."""
    current = find("torch._guards.CompileContext.current_compile_id")
    converting, compile_frame = find("torch._dynamo.convert_frame"), find("torch._dynamo.convert_frame._compile")
    if compile_frame is None or current is None:
        return

    @functools.wraps(compile_frame)
    def compile_for_us(*args: Any, **kwargs: Any) -> Any:
        backend, call = innermost(args[_BACKEND] if len(args) > _BACKEND else None), _call.get()
        if call is not None and getattr(backend, "compiler_fn", None) is call.backend:
            number, options = None, (_NUMPYS_DRAWS, *(_READ if call.reads else ()))
        elif is_ours(backend):
            now = current()
            number, options = now.frame_compile_id if now is not None else 0, (_NUMPYS_DRAWS,)
        else:
            return compile_frame(*args, **kwargs)
        token = _compile_of_code.set(number)
        try:
            with _tracing.meanwhile(), _switched_on(options):
                return compile_frame(*args, **kwargs)
        finally:
            _compile_of_code.reset(token)

    setattr(converting, compile_frame.__name__, compile_for_us)


_BACKEND = 5  # its place among the arguments, in torch 2.7 to 2.13


def _switched_on(options: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Switch on those of these options that torch has, for compiles of this thread: a context."""
    patch = find("torch._dynamo.config.patch")
    known = {name.rpartition(".")[2]: True for name in options if find(name) is not None}
    return contextlib.nullcontext() if patch is None else patch(**known)
