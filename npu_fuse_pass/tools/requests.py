"""Requests: one torch.compile with this backend each, with its graphs, its steps, and why it is not fused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from npu_fuse_pass import backend
from npu_fuse_pass.errors import NumericsError
from npu_fuse_pass.reasons import Reason
from npu_fuse_pass.report.causes import graph_break
from npu_fuse_pass.report.report import CompileReport, new_since, reports
from npu_fuse_pass.rules.core_op import is_core
from npu_fuse_pass.rules.hidden import hidden
from npu_fuse_pass.run.graph_step import graph_break_of

_PAST_THE_LIMIT = "torch stops at its limit of compiles: what changes is said by every compile above"


@dataclasses.dataclass
class Request:
    """One torch.compile with this backend.

    Attributes:
        name: of the compiled function.
        hidden: why torch shows it to no backend, if known.
        core: it compiles the core of an optimizer with rules, which another road or function may make needless.
        graphs: number of captured graphs.
        reports: of graphs that update something.
        breaks: where Dynamo ended a graph, and why.
        steps: calls with something to update, where an optimizer's own step is compiled.
        eager: steps in which no compiled graph ran.
        missed: (parameters, updated ones) of a step that updated fewer in compiled graphs.
        wrong: differences that check_numerics found.
    """

    name: str
    hidden: Reason | None
    core: bool = False
    graphs: int = 0
    reports: list[CompileReport] = dataclasses.field(default_factory=list)
    breaks: list[str] = dataclasses.field(default_factory=list)
    steps: int = 0
    eager: int = 0
    missed: tuple[int, int] | None = None
    wrong: list[str] = dataclasses.field(default_factory=list)

    def problems(self, known_breaks: Sequence[str]) -> list[str]:
        """Why it is not fused, in words; empty if everything is."""
        breaks = [text for text in dict.fromkeys([*self.breaks, *known_breaks]) if backend.OWN_BREAK not in text]
        if not self.reports:
            reasons = [self.hidden] if self.hidden else [graph_break(text) for text in breaks]
            arrived = "no graph with an update" if self.graphs else "no graph"
            unknown = "it was never called, or has no parameter with a gradient"
            if self.steps:
                unknown = "TORCH_LOGS=graph_breaks says why" if self.graphs else _PAST_THE_LIMIT
            told = [reason.advised for reason in reasons] or [unknown]
            return [f"{self.name}: {arrived} reached the backend: {text}" for text in told]
        found = [f"{self.name}: {reason}" for report in self.reports for reason in report.reasons]
        because = "".join(f"; {graph_break(text).advised}" for text in breaks)
        if self.missed:
            of, updated = self.missed
            found.append(f"{self.name}: compiled graphs updated {updated} of {of} parameters with gradients{because}")
        if self.eager:
            why = because or f"; {_PAST_THE_LIMIT}"
            found.append(f"{self.name}: {self.eager} of {self.steps} steps ran in no compiled graph{why}")
        return list(dict.fromkeys(found))


def request_for(model: Any, step: str | None = None) -> Request:
    """The request for a function or module, before any graph was captured. `step`: what a core runs, in words."""
    if step is not None and is_core(model):
        return Request(step, None, core=True)
    owner = getattr(model, "__self__", None)
    name = str(getattr(model, "__name__", type(model).__name__))
    why = hidden(owner) if isinstance(owner, torch.optim.Optimizer) else None
    return Request(f"{type(owner).__name__}.{name}" if owner is not None else name, why)


def followed(request: Request, tracked: backend.TrackedBackend) -> Callable[..., Any]:
    """The backend, recording captured graphs in the request."""

    def compiled(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        request.graphs += 1
        ended = graph_break_of(gm)
        if ended is not None and ended not in request.breaks:
            request.breaks.append(ended)
        before = reports()
        try:
            run = tracked(gm, example_inputs)
        finally:
            request.reports += [r for r in new_since(before) if r.is_step]
        return _noting_numbers(request, run) if tracked.options["check_numerics"] else run

    return compiled


def _noting_numbers(request: Request, run: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        try:
            return run(*args)
        except NumericsError as e:
            request.wrong.append(f"{request.name}: {e}")
            raise

    return noted


def counted(
    request: Request, tracked: backend.TrackedBackend, model: Any, step: Callable[..., Any]
) -> Callable[..., Any]:
    """A compiled step that records which updates ran in compiled graphs; only for an optimizer's own step."""
    opt = getattr(model, "__self__", None)
    if not isinstance(opt, torch.optim.Optimizer):
        return step

    @functools.wraps(step)
    def noted(*args: Any, **given: Any) -> Any:
        due = sum(p.grad is not None for group in opt.param_groups for p in group["params"])
        tracked.ran.clear()
        result = step(*args, **given)
        request.steps += bool(due)
        request.eager += bool(due) and not tracked.ran
        updated = sum(report.updated for report in tracked.ran)
        whole = not tracked.ran or any(report.reasons for report in tracked.ran)
        if not whole and updated < due and not hasattr(opt, "_prelude"):  # ours plan anew without another compile
            request.missed = due, updated
        return result

    return noted
