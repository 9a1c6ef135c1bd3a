"""The Dynamo backend `npu_fused`: the only place that talks to Dynamo."""

from __future__ import annotations

import logging
import operator
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import pipeline, step_op
from .errors import Mismatch, OptionError, UnfusedError
from .ir import Captured, Output
from .report import CompileReport
from .storage import inputs_of

log = logging.getLogger(__name__)

_OPTIONS: dict[str, Any] = {"platform": "auto", "strict": False}


def npu_fused(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Backend for `torch.compile(opt.step, backend="npu_fused", options={...})`.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its example arguments.
        mode: must be None; modes belong to other backends.
        options: `platform`: "auto" (by the tensors' device), "cpu", "npu" or "eager" (the original graph);
            `strict`: raise UnfusedError if anything is left unfused.

    Raises:
        OptionError: an unknown option or value; the message names the allowed ones.
    """
    chosen = _checked_options(mode, options)
    if all(node.op in ("placeholder", "get_attr", "output") for node in gm.graph.nodes):
        return gm.forward  # Dynamo compiles empty graphs too, around what it does not capture
    handle = _rule_step(gm)
    if handle is not None:
        return RuleStep(handle, **chosen)
    return _graph_step(gm, **chosen)


def _checked_options(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if mode not in (None, "default"):
        raise OptionError(f"mode={mode!r}: this backend has no modes; allowed options are {sorted(_OPTIONS)}")
    unknown = sorted((options or {}).keys() - _OPTIONS.keys())
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r}; allowed are {sorted(_OPTIONS)}")
    chosen = {**_OPTIONS, **(options or {})}
    if chosen["platform"] not in pipeline.PLATFORMS:
        raise OptionError(f"platform={chosen['platform']!r}; allowed are {list(pipeline.PLATFORMS)}")
    if not isinstance(chosen["strict"], bool):
        raise OptionError(f"strict={chosen['strict']!r}; allowed are True and False")
    return chosen


def _rule_step(gm: fx.GraphModule) -> int | None:
    """The handle of the optimizer, if the graph is the core of one of ours."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    if len(calls) == 1 and calls[0].target is step_op.rule_step:
        return int(calls[0].args[1])
    return None


class RuleStep:
    """The compiled core of an optimizer of ours: plans kernels for its batches, and again when they change."""

    def __init__(self, handle: int, platform: str, strict: bool) -> None:
        self._optimizer = weakref.ref(step_op.optimizer_of(handle))
        self._platform = platform
        self._strict = strict
        self._version = -1
        self._program: pipeline.Program | None = None
        self._plan()

    def _plan(self) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        prelude = optimizer._prelude
        cause = "compile" if self._version < 0 else "the optimizer's parameters, dtypes or options changed"
        self._version = prelude.version
        fused = pipeline.fuse_batches(prelude.batches, self._platform, self._strict, cause)
        self._program, self._report = fused.program, fused.report

    def __call__(self, *args: Tensor) -> tuple[()]:
        optimizer = self._optimizer()
        assert optimizer is not None
        if optimizer._prelude.version != self._version:
            self._plan()
        if self._program is None or not self._run(inputs_of(optimizer._prelude.batches)):
            step_op.run_eager(optimizer)
        return ()

    def _run(self, values: list[Tensor | None]) -> bool:
        assert self._program is not None
        try:
            self._program(values)
        except Mismatch as e:
            _refused(self._report, str(e), self._strict)
            return False
        return True


def _graph_step(gm: fx.GraphModule, platform: str, strict: bool) -> Callable[..., Any]:
    """Compile any other graph: a stock optimizer's step."""
    fused = pipeline.fuse_graph(gm, platform, strict)
    captured, program = fused.captured, fused.program
    if program is None:
        return gm.forward
    arguments = _arguments(gm, captured)

    def step(*args: Any) -> tuple[Any, ...]:
        values = arguments(args)
        try:
            program(values, complete=True)
        except Mismatch as e:
            _refused(fused.report, str(e), strict)
            return gm.forward(*args)  # type: ignore[no-any-return]
        return tuple(_returned(output, values) for output in captured.returned)

    return step


def _arguments(gm: fx.GraphModule, captured: Captured) -> Callable[[Sequence[Any]], list[Any]]:
    """A function from the graph's arguments to the values of all leaves; attributes are looked up once."""
    template: list[Any] = [None] * len(captured.leaves)
    inputs = []
    for i, leaf in enumerate(captured.leaves):
        if leaf.kind == "attribute":
            template[i] = operator.attrgetter(leaf.name)(gm)
        elif leaf.kind == "input":
            inputs.append((i, leaf.index))

    def arguments(args: Sequence[Any]) -> list[Any]:
        values = template.copy()
        for i, index in inputs:
            values[i] = (
                args[index] if isinstance(args[index], Tensor) else torch.tensor(args[index], dtype=torch.float64)
            )
        return values

    return arguments


def _returned(output: Output, values: Sequence[Any]) -> Any:
    if output.leaf is None:
        return output.literal
    value = values[output.leaf]
    if output.number is int:
        return round(float(value))
    return float(value) if output.number is float else value


def _refused(report: CompileReport, reason: str, strict: bool) -> None:
    """A step that runs unfused because of its tensors: said once for each reason, and in the report.

    Raises:
        UnfusedError: `strict`; nothing was changed.
    """
    if strict:
        raise UnfusedError(f"strict=True and this step cannot run fused: {reason}")
    if report.fallback is None or reason not in report.fallback:
        report.fallback = "; ".join([*([report.fallback] if report.fallback else []), f"at some steps: {reason}"])
        warnings.warn(f"npu_fused: this step runs unfused: {reason}", stacklevel=3)
