"""Capture of a `rule_step` node: trace each rule once and read the trace as an update of all its parameters.

A rule is traced for one parameter with make_fx and goes through the same interpreter as any other graph. Parameters of
another shape share the trace if the rule makes the same calls with the same numbers for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.interpreter import Interpreter
from npu_fuse_pass.capture.list_ops import LISTS
from npu_fuse_pass.capture.threads import while_compiling
from npu_fuse_pass.capture.values import Cell, Val
from npu_fuse_pass.capture.walk import is_known, run_graph
from npu_fuse_pass.errors import Unsupported
from npu_fuse_pass.fx_nodes.effects import entries
from npu_fuse_pass.fx_nodes.names import operation_name
from npu_fuse_pass.fx_nodes.places import source_of_error, source_of_function
from npu_fuse_pass.ir.types import Captured, Leaf, Slot, Traced, Update
from npu_fuse_pass.private_torch import DispatchMode, find, need
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.rules.batch import Batch
from npu_fuse_pass.rules.checks import meta_keywords, results
from npu_fuse_pass.tensors.sharded import across


@dataclasses.dataclass
class _Roles:
    """The positions of a member, in order: param, grad, states, step, hyperparameters."""

    tensors: list[str]
    scalars: list[str]

    @property
    def labels(self) -> list[str]:
        return [*self.tensors, *self.scalars]


Calls = dict[object, object]
"""Recorded calls of rules by batch structure and shape: `outline` hands them to `capture_batches` of equal batches."""


def capture_batches(batches: Sequence[Batch], calls: Calls | None = None) -> Captured:
    """Updates of all parameters; leaves are, batch after batch: params, grads, states, steps, numbers.

    `calls`: what `outline` has just recorded of the same batches.
    """
    return while_compiling(functools.partial(_capture, batches, calls if calls is not None else {}))


def _capture(batches: Sequence[Batch], calls: Calls) -> Captured:
    captured = Captured([], [], [])
    traces, repeats = _Traces(calls), any(b.repeats for b in batches)
    for batch in batches:
        shaped = [n for n in batch.stored if n not in batch.numbers]
        numbers = [*batch.numbers, "step", *batch.rounding.names, *batch.hyper.names]
        roles = _Roles(["param", "grad", *shaped], numbers)
        members = _add_leaves(captured.leaves, batch, roles)
        if repeats:
            continue
        try:
            updates, moved = _updates_of(batch, roles, members, traces)
            captured.updates += updates
            captured.moved += moved
        except Unsupported as e:
            about = f"{e.reason.op} in rule {batch.rule.name}"
            place = e.reason.source or source_of_function(batch.rule.function)
            captured.unfused.append(dataclasses.replace(e.reason, op=about, source=place))
    if repeats:
        text = "a parameter is listed twice, and its second update begins behind the first"
        captured.unfused.append(Code.REPEATED(text))
    return captured


def outline(batches: Sequence[Batch], calls: Calls) -> tuple[object, ...] | None:
    """A key of what `capture_batches` returns: optimizers with equal keys get equal results. None where unknown.

    The rule's calls are recorded anew, on meta tensors: its code may read what has changed in the meantime. `calls`
    keeps them for `capture_batches`.
    """
    traces = _Traces(calls)
    found: list[object] = [torch.get_default_dtype()]
    for b in batches:
        if b.repeats or b.sharding is not None:  # a rule may compute with the shape of the whole
            return None
        shapes = [tuple(p.shape) for p in b.params]
        called = {shape: traces.calls(b, shape or (1,)) for shape in dict.fromkeys(shapes)}
        if any(c == (shape or (1,)) for shape, c in called.items()):
            return None  # a rule that does not say
        totals = tuple(traces.totals.setdefault(_total_key(b, name), len(traces.totals)) for name in b.totals)
        own = (b.rule, *_structure(b), b.group, b.part, b.device, b.fixed)
        found += [own, totals, tuple(shapes), tuple(called.values())]
    return tuple(found)


def _add_leaves(leaves: list[Leaf], batch: Batch, roles: _Roles) -> list[tuple[int, ...]]:
    first, n = len(leaves), len(batch.params)
    dtypes = {"param": batch.dtype, "grad": batch.grad_dtype, **batch.stored}
    of_each = [*roles.tensors, *batch.numbers, "step", *batch.rounding.names]
    for role in of_each:
        for p, owner in zip(batch.params, batch.owners, strict=True):
            name, index = f"{role}_{len(leaves)}", len(leaves)
            shape = tuple(p.shape) if role in roles.tensors else ()
            dtype, fixed = dtypes.get(role, torch.float64), role in batch.fixed
            spread = across(owner) if batch.needs_whole and role in roles.tensors else ()
            whole = owner.numel() if spread else 0
            leaves.append(
                Leaf("input", name, index, 0.0, dtype, shape, batch.device, fixed, across=spread, whole=whole)
            )
    for name in batch.hyper.names:
        leaves.append(Leaf("input", f"{name}_{len(leaves)}", len(leaves), fixed=True))
    per_member = len(of_each)
    shared = range(first + per_member * n, len(leaves))
    return [(*(first + r * n + i for r in range(per_member)), *shared) for i in range(n)]


class _Traces:
    """Formulas of this capture: batches that differ in numbers alone (a learning rate for each layer) share them.

    Attributes:
        totals: number of each total, by what it sums over.
    """

    def __init__(self, calls: Calls) -> None:
        self.totals: dict[tuple[object, ...], int] = {}
        self._calls = calls
        self._updates: dict[object, tuple[Update, float]] = {}

    def calls(self, batch: Batch, shape: tuple[int, ...]) -> object:
        """As `_calls`."""
        key = (*_structure(batch), shape)
        if key not in self._calls:
            self._calls[key] = _calls(batch, shape)
        return self._calls[key]

    def update(self, batch: Batch, roles: _Roles, shape: tuple[int, ...], calls: object) -> tuple[Update, float]:
        """As `_trace`."""
        numbers = tuple(self.totals.setdefault(_total_key(batch, name), len(self.totals)) for name in batch.totals)
        key = (*_structure(batch), numbers, calls)
        if key not in self._updates:
            self._updates[key] = _trace(batch, roles, shape, numbers)
        return self._updates[key]


def _structure(batch: Batch) -> tuple[object, ...]:
    """A key of all that the formula of a batch depends on, except shapes."""
    stored = tuple(batch.stored.items())
    dtypes = (batch.dtype, batch.grad_dtype, stored)
    numbers = (*batch.rounding.names, *batch.hyper.names)
    return (id(batch.rule), dtypes, tuple(batch.hyper.static.items()), numbers, batch.counts)


def _updates_of(
    batch: Batch, roles: _Roles, members: list[tuple[int, ...]], traces: _Traces
) -> tuple[list[Update], int]:
    """The updates of a batch, and the bytes that the rule's operations move when run one by one."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(batch.owners):  # a rule may compute with the shape of the whole
        by_shape.setdefault(tuple(p.shape) or (1,), []).append(i)  # 0-dim as one element, as in eager steps
    by_calls: dict[object, list[tuple[int, ...]]] = {}
    for shape in by_shape:
        by_calls.setdefault(traces.calls(batch, shape), []).append(shape)
    updates, moved = [], 0.0
    for calls, shapes in by_calls.items():
        update, per_element = traces.update(batch, roles, shapes[0], calls)
        chosen = sorted(i for shape in shapes for i in by_shape[shape])
        moved += per_element * sum(batch.numels[i] for i in chosen)
        updates.append(dataclasses.replace(update, members=[members[i] for i in chosen]))
    return updates, round(moved)


def _calls(batch: Batch, shape: tuple[int, ...]) -> object:
    """A rule's calls with their tensors and numbers, for a parameter of this shape: equal calls, equal formula."""
    device = torch.device("meta")
    tensors = {"param": torch.empty(shape, dtype=batch.dtype, device=device)}
    tensors["grad"] = torch.empty(shape, dtype=batch.grad_dtype, device=device)
    shapes = {n: () if n in batch.numbers else shape for n in batch.stored}
    tensors |= {n: torch.empty(shapes[n], dtype=dtype, device=device) for n, dtype in batch.stored.items()}
    keywords = meta_keywords(batch.hyper.static, batch.hyper.views, batch.totals)
    keywords |= batch.rounding.keyword(lambda name: torch.empty((), dtype=torch.float64, device=device))
    record = _Record([*tensors.values(), *(k for k in entries(keywords) if isinstance(k, Tensor))])
    try:
        with record:
            given = results(batch.rule, tensors, keywords, batch.totals)
        return (*record.calls, *record.constants(given), *record.describe(given))
    except Exception:  # whatever a rule cannot do on meta tensors: every shape is traced by itself
        return shape


class _Record(DispatchMode):
    """A record of calls with numbers and named tensors: given ones first, then results in order."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[object] = []
        self._known = list(given)  # kept alive, so that no id is used twice
        self._names = {id(t): i for i, t in enumerate(given)}

    def constants(self, values: Any) -> list[object]:
        """The tensors among them that are neither a rule's arguments nor results, with their values."""
        others = [t for t in entries(values) if isinstance(t, Tensor) and id(t) not in self._names]
        return [("a constant", t.dtype, repr(t.tolist())) for t in others]

    def describe(self, values: Any) -> list[object]:
        return [self._name(v) if isinstance(v, Tensor) else repr(v) for v in entries(values)]

    def _name(self, t: Tensor) -> object:
        if id(t) not in self._names:
            self._names[id(t)] = len(self._known)
            self._known.append(t)
        return (self._names[id(t)], t.ndim)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += self.constants((args, kwargs))
        self.calls.append((str(function), *self.describe((args, kwargs or {}))))
        result = function(*args, **(kwargs or {}))
        self.calls.append(tuple(self.describe(result)))
        return result


def _trace(batch: Batch, roles: _Roles, shape: tuple[int, ...], totals: Sequence[int]) -> tuple[Update, float]:
    """The update of one parameter of this shape, and how many bytes its operations move for each element.

    Args:
        totals: the numbers of the batch's totals.
    """
    interpreter = Interpreter({**LISTS, "stochastic_round": _stochastic}, keeps=False)
    dtypes = {"param": batch.dtype, "grad": batch.grad_dtype, **batch.stored}
    cells = {
        n: interpreter.add_leaf(Leaf("input", n, dtype=dtypes[n], shape=shape), tensor=True) for n in roles.tensors
    }
    scalars = {n: interpreter.add_leaf(Leaf("input", n), tensor=False) for n in roles.scalars}
    b = interpreter.builder
    step = Cell(scalars["step"].val)
    if batch.counts:
        step.val = dataclasses.replace(step.val, expr=b.op("add", step.val.expr, b.const(1)))
    numbers = _group_numbers(batch, scalars)
    contributions, graphs = [], []
    sums = {}
    for name, number in zip(batch.totals, totals, strict=True):
        sums[name] = Cell(dataclasses.replace(step.val, expr=b.total(number)))

        def contribution(t: dict[str, Tensor], k: dict[str, Any], name: str = name) -> Any:
            states = {n: t[n] for n in batch.stored if n in t}
            return batch.rule.contribution(name, t["param"], t["grad"], states, k)

        cell, graph = _run(interpreter, batch, contribution, shape, cells, {**numbers, "step": step})
        graphs.append(graph)
        if cell.val.expr.tensor:
            raise Unsupported(name, "a total over 0-dim parameters of their own values", Code.ACROSS_PARAMETERS)
        contributions.append((number, cell.val.expr))

    def update(t: dict[str, Tensor], k: dict[str, Any]) -> Any:
        new, grad, states = batch.rule.apply(t["param"], t["grad"], {n: {**k, **t}[n] for n in batch.stored}, k)
        return [new, *([grad] if grad is not None else []), *states.values()]

    rounding = batch.rounding.keyword(scalars.__getitem__)
    kept = {n: scalars[n] for n in batch.numbers}
    keyworded = {**numbers, "step": step, **sums, **rounding, **kept}
    results, graph = _run(interpreter, batch, update, shape, cells, keyworded)
    targets = ["param", *(["grad"] if batch.rule.writes_grad else []), *batch.stored]
    position = {n: i for i, n in enumerate(roles.labels)}
    writes = []
    for name, result in zip(targets, results, strict=True):
        expr = result.val.expr
        writes.append((position[name], expr if name in kept else b.cast(expr, dtypes[name])))
    if batch.counts:
        writes.append((position["step"], step.val.expr))
    slots = [Slot(True, dtypes[n]) for n in roles.tensors] + [Slot(False, torch.float64) for _ in roles.scalars]
    stored = sum(2 * slots[p].dtype.itemsize for p, _ in writes if slots[p].tensor)  # copying the results
    keywords = [*entries(_group_numbers(batch, position)), "step", *(f"total {n}" for n, _ in contributions)]
    keywords += [position[name] for name in (*batch.rounding.names, *kept)]
    arguments = (*(position[n] for n in cells), *keywords)
    traced = Traced(batch.rule.name, graph, tuple(graphs), arguments)
    update_of_one = Update(writes, contributions, [], roles.labels, slots, traced, (position["grad"],))
    return update_of_one, interpreter.moved / max(1, math.prod(shape)) + stored


def _stochastic(interpreter: Interpreter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cell:
    """`stochastic_round(x, like, seed, parameter, first, step)`."""
    x, like, *numbers = (cell.read() for cell in args)
    b = interpreter.builder
    given = (b.cast(x.expr, torch.float32), like.expr, *(n.expr for n in numbers))
    interpreter.moves([x], [like], fused=True)
    return Cell(dataclasses.replace(like, expr=b.make("stochastic", given, None, like.dtype, True)))


def _total_key(batch: Batch, name: str) -> tuple[object, ...]:
    over = batch.rule.totals[name].over
    return (id(batch.rule.itself), name, batch.group if over == "group" else None)


def _group_numbers(batch: Batch, scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Replacements (cells, positions) of the rule's number keywords; tuples of numbers as tuples of these."""
    return batch.hyper.by_keyword(scalars[n] for n in batch.hyper.names)


def _run(
    interpreter: Interpreter,
    batch: Batch,
    function: Callable[[dict[str, Tensor], dict[str, Any]], Any],
    shape: tuple[int, ...],
    cells: dict[str, Cell],
    keywords: dict[str, Any],
) -> tuple[Any, fx.GraphModule]:
    """Trace `function` with make_fx on fake tensors and interpret the trace on cells.

    Returns:
        The result in cells, and the trace.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    fake_mode = need("torch._subclasses.fake_tensor.FakeTensorMode")
    tracing = find("torch._guards.tracing") or contextlib.nullcontext
    flat_keywords = entries(keywords)
    names = list(cells)

    def flat(*args: Tensor) -> Any:
        numbers = iter(args[len(names) :])
        given = fx.node.map_aggregate(keywords, lambda _: next(numbers))
        return function(dict(zip(names, args, strict=False)), {**batch.hyper.static, **given})

    # a separate mode: Dynamo's, which is active while a backend runs, would make sizes symbolic; and tensors that the
    # rule makes are numbers here, wherever torch.set_default_device puts them
    with torch.device("cpu"), tracing(None), fake_mode(allow_non_fake_inputs=True, static_shapes=True):
        tensors = [torch.empty(shape, dtype=cells[n].val.dtype) for n in names]
        scalars = [torch.ones((), dtype=torch.float64) for _ in flat_keywords]
        try:
            graph = make_fx(flat, tracing_mode="real")(*tensors, *scalars)
            graph.graph.eliminate_dead_code()  # rows that a rule takes to ask for their size
        except Unsupported as e:
            raise e.at(None, source_of_error(e))  # noqa: B904 - it is the same error
        except Exception as e:
            words = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else e!r}"
            raise Unsupported("tracing", words, Code.RULE).at(None, source_of_error(e)) from e

    def attribute(node: fx.Node) -> Any:
        value = getattr(graph, str(node.target))
        if isinstance(value, Tensor) and value.ndim == 0:
            return Cell(Val(interpreter.builder.const(float(value)), value.dtype, ()))
        raise Unsupported("constant", "a rule uses a tensor constant that is not 0-dim", Code.CONSTANT)

    try:
        made = run_graph(interpreter, graph.graph, [*(cells[n] for n in names), *flat_keywords], attribute)
        return made, graph
    except Unsupported as e:  # name the other operations without a row, too
        calls = [operation_name(node) for node in graph.graph.nodes if node.op == "call_function"]
        others = [name for name in calls if not is_known(name)]
        named = ", ".join(dict.fromkeys([e.reason.op, *others]))
        raise Unsupported.of(dataclasses.replace(e.reason, op=named)) from e
