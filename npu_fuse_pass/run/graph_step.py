"""Steps of all other graphs: a torch.optim optimizer's, or a larger function in which rule optimizers step."""

from __future__ import annotations

import functools
import operator
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import increment_version

from npu_fuse_pass import pipeline
from npu_fuse_pass.errors import GraphRefused, Mismatch
from npu_fuse_pass.fx_nodes.decompositions import undo_decompositions
from npu_fuse_pass.fx_nodes.effects import recorded
from npu_fuse_pass.ir.types import Captured, Leaf, Output
from npu_fuse_pass.options import Options
from npu_fuse_pass.reasons import Code, Reason
from npu_fuse_pass.report.causes import FIRST, Cause
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.rules.batch import inputs_of
from npu_fuse_pass.rules.core_op import Stepping
from npu_fuse_pass.rules.pending import uses_kept
from npu_fuse_pass.run.check_numerics import Widened
from npu_fuse_pass.run.fallbacks import falls_back, given_up, refusal, refused
from npu_fuse_pass.run.plan_facts import Facts, changed, plan_facts
from npu_fuse_pass.run.python_numbers import PythonNumbers
from npu_fuse_pass.run.variants import Variant, Variants
from npu_fuse_pass.tensors.sharded import is_dtensor, local

Kept = dict[str, list[Tensor | None]]
"""Tensors that rule optimizers hold, by optimizer handle."""


def graph_step(gm: fx.GraphModule, options: Options, cause: Cause) -> Callable[..., Any]:
    """Compile any other graph: a torch.optim step, or a larger function in which rule optimizers step.

    Returns:
        The fused step; the original graph where nothing of it is fused.
    """
    handles = [str(n.args[3]) for n in gm.graph.nodes if n.target is core_op.rule_update]

    def prepare() -> None:
        for handle in handles:
            core_op.optimizer_of(handle)._prelude.prepare()

    try:
        prepare()
    except (ValueError, RuntimeError):  # of the inputs; a GradientError is one of these

        @functools.cache
        def later() -> Callable[..., Any]:
            """Compile at a call with valid inputs; others raise the optimizer's error, which Dynamo would wrap here."""
            prepare()
            return graph_step(gm, options, cause)

        return lambda *args: later()(*args)
    step = GraphStep(gm, options, handles, cause)
    if step.fused:
        return step
    undo_decompositions(gm)
    return gm.forward


class GraphStep:
    """A captured graph: its leaves are the graph's arguments and attributes, and what rule optimizers hold."""

    # Dynamo keeps what a backend returns for good, and a copy of its __dict__: with slots there is none.
    __slots__ = (
        "__weakref__",
        "_facts",
        "_given_up",
        "_gm",
        "_numbers",
        "_optimizers",
        "_options",
        "_python",
        "_state",
        "_variants",
    )

    def __init__(self, gm: fx.GraphModule, options: Options, handles: Sequence[str], cause: Cause) -> None:
        self._gm = gm
        self._options = options
        self._given_up = False
        self._optimizers = {h: weakref.ref(core_op.optimizer_of(h), self._drop) for h in handles}
        self._numbers = _numbers(gm) if handles else []
        self._python = PythonNumbers(gm)
        for optimizer in self._stepped():  # which are prepared
            optimizer._prelude.compiled = True
        self._facts: Facts | None = None
        self._plan(cause)

    def _drop(self, optimizer: weakref.ref[Stepping]) -> None:
        """Release the plan and the graph: without one of its optimizers the graph cannot run."""
        for name in ("_gm", "_facts", "_state", "_variants"):
            if hasattr(self, name):  # not if another of its optimizers has gone before
                delattr(self, name)

    @property
    def fused(self) -> bool:
        return self._variants.newest.program is not None

    def _plan(self, cause: Cause = FIRST) -> None:
        batches = [b for o in self._stepped() for b in o._prelude.batches]
        state, facts = self._inputs(), plan_facts(batches)
        if self._facts is not None:
            cause = changed(self._facts, facts)
        self._variants = Variants(self._variant(cause, functools.partial(_number, self._kept())))
        self._state, self._facts = state, facts  # last: what ends a plan early has the next step make it

    def _variant(self, cause: Cause, number: pipeline.Number | None) -> _GraphVariant:
        made = pipeline.fuse_graph(self._gm, self._options, cause, graph_break_of(self._gm), number)
        return _GraphVariant(self._gm, made, self._options)

    def _kept(self) -> Kept:
        return {h: inputs_of(o._prelude.batches) for h, o in zip(self._optimizers, self._stepped(), strict=True)}

    def _stepped(self) -> list[Stepping]:
        found = [optimizer() for optimizer in self._optimizers.values()]
        assert all(o is not None for o in found)
        return found  # type: ignore[return-value]

    def _inputs(self) -> list[object]:
        """What a plan depends on beside the graph: the optimizers' batches, and which gradients exist."""
        preludes = [o._prelude for o in self._stepped()]
        return [(p.version, [[g is None for g in b.grads] for b in p.batches]) for p in preludes]

    def __call__(self, *args: Any) -> Any:
        made = None
        if not self._given_up:
            optimizers = self._stepped() if self._optimizers else []
            if reason := self._refusal(args, optimizers):
                self._refused(reason)
            else:
                made = self._unless_given_up(args, optimizers)
        return self._gm.forward(*args) if made is None else made

    def _refusal(self, args: Sequence[Any], optimizers: Sequence[Stepping]) -> Reason | None:
        """Why the original has to run; raises what Python raises of the graph's numbers."""
        if any(o.has_hooks for o in optimizers):
            return Code.HOOKS("step hooks run between the operations of this graph")
        if self._numbers and any(uses_kept(o, (args[i] for i in self._numbers)) for o in optimizers):
            return Code.KEPT("the graph uses a number that the optimizer reads or counts itself")
        try:
            self._python.check(args)
        except Mismatch as e:
            return e.reason
        return None

    def _unless_given_up(self, args: Sequence[Any], optimizers: Sequence[Stepping]) -> Any:
        try:
            made = self._fused(args, optimizers)
            self._variants.newest.end()
        except Exception as e:
            self._given_up = given_up(self._variants.newest, e, self._options.strict)
            if not self._given_up:
                raise
            return None
        return made

    def _fused(self, args: Sequence[Any], optimizers: Sequence[Stepping]) -> Any:
        """Run the fused step; None where the original has to run."""
        for o in optimizers:
            o._before(None, in_graph=True)
        if optimizers and self._inputs() != self._state:
            self._plan()
        kept = self._kept()
        variant = self._variants.of(functools.partial(_number, kept), self._variant)
        if variant.program is None:
            return None
        try:
            return self._run(variant, args, kept, optimizers)
        except BaseException:
            for o in optimizers:
                o._prelude.expose_updated()
            raise

    def _run(self, variant: _GraphVariant, args: Sequence[Any], kept: Kept, optimizers: Sequence[Stepping]) -> Any:
        program, values = variant.program, variant.arguments(args, kept)
        assert program is not None
        if variant.inference is None:
            variant.inference = any(isinstance(v := values[i], Tensor) and v.is_inference() for i in variant.written)
        if variant.inference and not torch.is_inference_mode_enabled():
            return None  # the original, which torch refuses
        try:
            checked = None
            if any(isinstance(t := values[i], Tensor) and t.stride() != strides for i, strides in variant.layouts):
                raise Mismatch("a tensor lies otherwise in memory than when the operations were captured that stay")
            if variant.check is None:
                program(values, complete=True)
            else:
                fused = functools.partial(program, values, complete=True)
                original = functools.partial(self._gm.forward, *args)
                widened = functools.partial(Widened(self._gm).run, *args)
                checked = variant.check(values, fused, original, optimizers, widened)
        except Mismatch as e:
            return self._refused(refusal(e, optimizers))
        except GraphRefused as e:
            falls_back(variant, e, self._options.strict)
            return None
        increment_version([t for i, t in variant.arguments.dtensors(args) if i in variant.written])
        for o in optimizers:
            o._after()
        if checked is not None:
            return checked
        return tuple(_returned(output, values) for output in variant.captured.returned)

    def _refused(self, reason: Reason) -> None:
        refused(self._variants.newest.report, reason, self._options.strict)


def _numbers(gm: fx.GraphModule) -> list[int]:
    """Positions of the arguments that are tensors of one element: the check of memory does not see who keeps them."""
    found = [recorded(n) for n in gm.graph.find_nodes(op="placeholder")]
    return [i for i, t in enumerate(found) if isinstance(t, Tensor) and all(type(n) is int and n == 1 for n in t.shape)]


def _number(kept: Kept, leaf: Leaf) -> Tensor | None:
    return None if leaf.optimizer is None else kept[leaf.optimizer][leaf.index]


class _GraphVariant(Variant):
    rounds_once = False

    def __init__(self, gm: fx.GraphModule, made: pipeline.Fused, options: Options) -> None:
        super().__init__(made, options)
        self.arguments = _Arguments(gm, made.grouped.leaves)
        self.layouts = _layouts(gm, made.captured) if made.captured.segments else []
        self.written = {m[s] for g in made.grouped.groups for s in g.formula.written for m in g.members}
        self.inference: bool | None = None
        """True if only inference mode may write what the graph writes; found out once, as Dynamo guards it."""


def _layouts(gm: fx.GraphModule, captured: Captured) -> list[tuple[int, tuple[int, ...]]]:
    """The strides of the graph's tensors when it was captured, by leaf.

    Tensors that a step makes for operations that stay lie as they would without fusion, and random draws follow that.
    Dynamo guards layouts, though not everywhere: a graph that ends before the step of an optimizer has been seen to run
    on others.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    attributes = {n.target: n for n in gm.graph.find_nodes(op="get_attr")}  # parameters that Dynamo knows by their id
    found = []
    for i, leaf in enumerate(captured.leaves):
        node = placeholders[leaf.index] if leaf.kind == "input" and leaf.optimizer is None else None
        example = recorded(attributes[leaf.name] if leaf.kind == "attribute" else node)
        if len(leaf.shape) > 1 and isinstance(example, Tensor) and all(type(n) is int for n in example.stride()):
            found.append((i, example.stride()))
    return found


def graph_break_of(gm: fx.GraphModule) -> str | None:
    """Say why and where Dynamo ended a graph before the end of the function; None if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return told(reason) if reason is not None and reason.graph_break else None


def told(reason: Any) -> str:
    """Format a graph break as one line: why and where."""
    frame = reason.user_stack[-1] if reason.user_stack else None
    place = f" ({frame.filename}:{frame.lineno}, in {frame.name})" if frame is not None else ""
    # a break of this package's says why; that of a disabled function stands in brackets
    own = re.search(r"\(reason: npu_fused: (.*)\)|npu_fused: (.*)", str(reason.reason))
    return f"{own[1] or own[2] if own else _first_line(str(reason.reason))}{place}"


def told_of(text: str) -> str:
    """Format the text of a graph break as one line, with the place that it names, or else its context."""
    found = re.search(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\w+)', text)
    found = found or re.search(r"frame skipped: (?P<name>\w+) \((?P<file>.+) line (?P<line>\d+)\)", text)
    more = re.search(r"Developer debug context: *(\S.*)", text)
    place = f" ({found['file']}:{found['line']}, in {found['name']})" if found else f" ({more[1]})" if more else ""
    return f"{_first_line(text)}{place}"


def _first_line(text: str) -> str:
    """Of Dynamo's text, without its advice: what a step can do about a value is another thing (`Code.VALUE`)."""
    return text.replace("Consider annotating your code using torch._check*(). ", "").splitlines()[0]


class _Arguments:
    """Map the graph's arguments to the values of all leaves; attributes are looked up once."""

    def __init__(self, gm: fx.GraphModule, leaves: Sequence[Leaf]) -> None:
        self._template: list[Any] = [None] * len(leaves)
        self._inputs: list[tuple[int, int]] = []
        self._kept: list[tuple[int, str, int]] = []
        for i, leaf in enumerate(leaves):
            if leaf.kind == "attribute":
                self._template[i] = operator.attrgetter(leaf.name)(gm)
            elif leaf.kind == "input" and leaf.optimizer is not None:
                self._kept.append((i, leaf.optimizer, leaf.index))
            elif leaf.kind == "input":
                self._inputs.append((i, leaf.index))
        examples = [recorded(n) for n in gm.graph.find_nodes(op="placeholder")]
        given = [(i, index, examples[index]) for i, index in self._inputs]
        kept = [(i, None, t) for i, t in enumerate(self._template) if t is not None]
        self._dtensors = [(i, index) for i, index, t in (*given, *kept) if is_dtensor(t)]

    def __call__(self, args: Sequence[Any], kept: Kept) -> list[Any]:
        values = self._template.copy()
        for i, index in self._inputs:
            value = args[index]
            values[i] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        for i, handle, index in self._kept:
            values[i] = kept[handle][index]
        for i, t in self.dtensors(args):
            values[i] = local(t)  # what a kernel works on
        return values

    def dtensors(self, args: Sequence[Any]) -> list[tuple[int, Tensor]]:
        """The DTensors of a call, with their leaves."""
        return [(i, self._template[i] if index is None else args[index]) for i, index in self._dtensors]


def _returned(output: Output, values: Sequence[Any]) -> Any:
    if output.leaf is None:
        return output.literal
    value = values[output.leaf]
    if output.number is not None:
        return round(float(value)) if output.number is int else output.number(float(value))
    return value.detach() if output.detached else value
