"""The Dynamo backend `npu_fused`: the only place that talks to Dynamo."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.errors import FuseError, OptionError
from npu_fuse_pass.options import KERNELS, LAYOUTS, PLATFORMS, Options
from npu_fuse_pass.private_torch import find
from npu_fuse_pass.reasons import Reason
from npu_fuse_pass.report.causes import FIRST, Cause, recompile
from npu_fuse_pass.report.logs import switched_off, warn_unfused
from npu_fuse_pass.report.net import net
from npu_fuse_pass.report.report import CompileReport, new_since, record, reports
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.rules.registration import prepare
from npu_fuse_pass.run.graph_step import graph_step, told, told_of
from npu_fuse_pass.run.rule_step import RuleSteps

prepare()
_OPTIONS = frozenset(f.name for f in dataclasses.fields(Options))


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
            `strict`: raise UnfusedError if anything is left unfused; `check_numerics`: run every step fused and as
            the original, whose values count, and raise NumericsError at the first difference (slow; otherwise
            NPU_FUSE_CHECK_NUMERICS=1); `torchair_config`: a torchair.CompilerConfig of mode "max-autotune", which
            torchair's compiler gets as it is; `layout`: how an NPU graph takes a group's tensors: "auto" (flat where
            they are adjacent in memory), "flat" or "list" (one by one); `kernels`: on an NPU "auto" (generated kernels
            where the self-test has proved them, otherwise GE operations as exact as eager), "generated", "operations"
            (of GE), "dedicated" (the fewest operations) or "elementwise"; `dump`: a folder in
            which every compile leaves files to read (otherwise NPU_FUSE_DUMP, or torch's debug folder under
            TORCH_COMPILE_DEBUG=1); `verify`: check what every stage promises, and raise internal errors instead of
            running the original (otherwise NPU_FUSE_VERIFY=1).

    Raises:
        OptionError: an unknown option or value; the message names the allowed ones.
        UnfusedError: `strict`, and something is left unfused.
        PlatformError: the platform that was asked for cannot be used here.

    torch.compile wraps these in a BackendCompilerFailed (its `inner_exception`); `npu_fuse_pass.compile_step` does not.
    """
    prepare()
    chosen = Options(**_checked_options(mode, options))
    if switched_off() or all(node.op in ("placeholder", "get_attr", "output") for node in gm.graph.nodes):
        return gm.forward  # Dynamo compiles empty graphs too, around what it does not capture
    report = CompileReport(chosen.platform)
    with net(report, chosen):
        if _is_rule_step(gm):
            core_op.newest.note_compile()
            return RuleSteps(gm.forward, chosen, _cause(with_rules=True), example_inputs[0])
        return graph_step(gm, chosen, _cause(_has_rules(gm)))
    record(report)
    warn_unfused(report.fallbacks)
    return gm.forward


class TrackedBackend:
    """The backend with its options, as `compile_step` and `explain` use it: it records which of its graphs ran.

    Attributes:
        options: all of them, checked.
        ran: reports of the graphs with updates that have run since it was cleared.
        no_rule: for reports: why Dynamo captures a step that could have been an update rule.
        step: the step that a core runs, in words.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = _checked_options(None, options)
        self.ran: list[CompileReport] = []
        self.no_rule: Reason | None = None
        self.step: str | None = None
        self._graphs: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()

    def release(self) -> None:
        """Free the states that graphs hold: their optimizer is gone, and torch may keep its graphs."""
        for gm in self._graphs:
            for named in (gm.named_parameters, gm.named_buffers):
                for name, _ in [*named(recurse=False, remove_duplicate=False)]:
                    delattr(gm, name)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = reports()
        compiled = npu_fused(gm, example_inputs, options=self.options)
        if isinstance(compiled, RuleSteps):
            return lambda ticket: compiled(ticket, self.ran)
        made = [r for r in new_since(before) if r.is_step]
        self._graphs.add(gm)
        if not made:
            return compiled  # nothing is updated here: what surrounds a step, or a closure

        for report in made:
            report.no_rule = report.no_rule or self.no_rule

        def run(*args: Any) -> Any:
            self.ran += made
            return compiled(*args)

        return run


def isolates() -> bool:
    """True if torch can compile a function for one instance alone (2.13)."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def isolated(step: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a recompile limit for this instance alone, where torch can."""
    options: dict[str, Any] = {"isolate_recompiles": True} if isolates() else {}
    return torch.compile(step, backend=backend, **options)


_compile = torch.compile


def rule_core(tracked: TrackedBackend, step: str) -> Callable[[Tensor], None]:
    """A compiled core for one optimizer.

    Dynamo would find in it what is known, one operation, and look at every step whether its guards hold, none of which
    tells what the step's own checks do not. A function that replaces torch.compile sees it instead.

    Args:
        tracked: the backend.
        step: the step that it runs, in words.
    """
    tracked.step = step
    if torch.compile is not _compile:
        return isolated(core_op.make_core(), tracked)
    steps: RuleSteps | None = None

    def core(ticket: Tensor) -> None:
        nonlocal steps
        off = (switched_off() or not compiling()) if steps is None else _stance() == "force_eager"
        if off:
            core_op.rule_step(ticket)
            return
        if steps is None:
            steps = RuleSteps(core_op.rule_step, Options(**tracked.options), FIRST, ticket)
        steps(ticket, tracked.ran)

    return core


@functools.cache
def let_torch_hide_steps() -> None:
    """Torch hides LBFGS.step and SparseAdam.step from Dynamo in the first torch.compile of a process: make that one.

    An `opt.step` that was read before that is a step that Dynamo compiles in part.
    """
    torch.compile(lambda: None, backend="eager")


def own_error(error: Exception) -> FuseError | None:
    """The FuseError that Dynamo has wrapped in this one; None if there is none."""
    found = (error, error.__cause__, getattr(error, "inner_exception", None))
    return next((e for e in found if isinstance(e, FuseError)), None)


def compiling() -> bool:
    """True if torch.compile compiles at all.

    TORCH_COMPILE_DISABLE=1, of which torch's configuration tells, TORCHDYNAMO_DISABLE=1, which torch reads whenever
    torch.compile is called, torch.compiler.set_stance and a TorchDispatchMode switch it off.
    """
    outside = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    off = outside or find("torch._dynamo.config.disable") or _stance() == "force_eager"
    return not (off or core_op.under_dispatch_mode())


def _stance() -> str | None:
    """What torch.compiler.set_stance has set."""
    return getattr(find("torch._dynamo.eval_frame._stance"), "stance", None)


_KINDS = "graph_break", "unimplemented"  # code that it skips, a loop for example, is counted as the latter alone
_CLOSURE = "npu_fused_closure"  # the name of the function below, by which Dynamo tells of it
_LIMIT = "recompile limit exceeded"  # counted there, too; what leads to it are compiles, and they have causes


OWN_BREAK = ", in _use_grad)"  # torch breaks the graph itself around every step of its optimizers


def uncompiled(closure: Callable[..., Any]) -> Callable[..., Any]:
    """A closure as a step that is compiled gets it: it runs as it is, in a graph break that is no reason for others."""

    def npu_fused_closure(*args: Any, **kwargs: Any) -> Any:
        return closure(*args, **kwargs)

    return torch.compiler.disable(npu_fused_closure)  # type: ignore[no-any-return]


class NewBreaks:
    """The graph breaks since this was made, as Dynamo reports them, without those at closures."""

    def __init__(self) -> None:
        self._counts = {kind: dict(_counted(kind)) for kind in _KINDS}
        self._told = len(_told())

    def reason(self) -> str | None:
        """Why and where the first of them was, if possible none of torch's own, else the last that was only counted.

        None: there was none.
        """
        if found := [told(r) for r in _told()[self._told :] if _CLOSURE not in str(r.reason)]:
            return next((text for text in found if OWN_BREAK not in text), found[0])
        for kind, before in self._counts.items():
            grown = [reason for reason, count in _counted(kind).items() if count > before.get(reason, 0)]
            if grown := [reason for reason in grown if _CLOSURE not in reason]:
                return told_of(grown[-1])
        return None

    def leave_an_update(self, ran: Sequence[CompileReport]) -> bool:
        """Whether the graphs that ran in a step, of those that it ended, update something; otherwise Python does."""
        return any(report.is_update for report in ran) or (bool(ran) and self.reason() is None)


def breaks() -> list[str]:
    """Why and where Dynamo broke graphs in this process, oldest first; then why it skipped code; each once."""
    found = list(map(told, _told()))
    skipped = [text for text in _counted(_KINDS[1]) if not any(f.startswith(text.splitlines()[0]) for f in found)]
    return list(dict.fromkeys([*found, *(told_of(text) for text in skipped if _LIMIT not in text)]))


def _counted(kind: str) -> Mapping[str, int]:
    """The number of graph breaks by their reason."""
    counters = find("torch._dynamo.utils.counters")
    return counters[kind] if counters is not None else {}


def _told() -> Sequence[Any]:
    """Dynamo's graph breaks that have a place in the source."""
    return find("torch._dynamo.utils.graph_break_reasons") or ()


def _cause(with_rules: bool) -> Cause:
    """Why Dynamo compiles: the failed guard of an earlier compile of this code, if there was one."""
    metrics = find("torch._dynamo.utils.get_metrics_context")
    current = find("torch._guards.CompileContext.current_compile_id")
    reason = getattr(metrics(), "_metrics", {}).get("recompile_reason") if metrics is not None else None
    now = current() if current is not None else None
    if not reason or now is None or not now.frame_compile_id:
        return FIRST
    found = recompile(str(reason), with_rules)
    limit = find("torch._dynamo.config.recompile_limit")
    stops = f", torch stops at {limit}" if limit is not None else ""
    return Cause(f"{found.text}; compile {now.frame_compile_id + 1} of this code{stops}", found.remedy)


def _checked_options(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if mode not in (None, "default"):
        raise OptionError(f"mode={mode!r}: this backend has no modes; allowed options are {sorted(_OPTIONS)}")
    if not isinstance(options, (Mapping, type(None))):
        raise OptionError(f"options={options!r}: allowed is a dict of {sorted(_OPTIONS)}")
    unknown = sorted(map(str, (options or {}).keys() - _OPTIONS))
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r}; allowed are {sorted(_OPTIONS)}")
    chosen = {**vars(Options()), **(options or {})}
    for name, allowed in {"platform": PLATFORMS, "layout": LAYOUTS, "kernels": KERNELS}.items():
        if chosen[name] not in allowed:
            raise OptionError(f"{name}={chosen[name]!r}; allowed are {list(allowed)}")
    for name in ("strict", "check_numerics", "verify"):
        if not isinstance(chosen[name], bool):
            raise OptionError(f"{name}={chosen[name]!r}; allowed are True and False")
    if not (chosen["dump"] is None or (chosen["dump"] and isinstance(chosen["dump"], (str, os.PathLike)))):
        raise OptionError(f"dump={chosen['dump']!r}; allowed are None and the path of a folder")
    config = chosen["torchair_config"]
    for name, is_set in {"layout": chosen["layout"] != "auto", "torchair_config": config is not None}.items():
        if is_set and chosen["platform"] not in ("auto", "npu"):
            raise OptionError(f"{name} with platform={chosen['platform']!r}; it is allowed with 'auto' and 'npu'")
    if config is not None:
        _check_torchair_config(config)
    return chosen


def _check_torchair_config(config: Any) -> None:
    from npu_fuse_pass.lowerings.npu.environment import is_config

    if not is_config(config):
        raise OptionError(f"torchair_config={config!r}; allowed are None and a torchair.CompilerConfig")
    if (mode := config.mode.value) != "max-autotune":
        why = "other modes capture kernels, and would repeat the numbers of the step that was captured"
        raise OptionError(f"torchair_config.mode={mode!r}; allowed is 'max-autotune', which makes GE graphs: {why}")


def _has_rules(gm: fx.GraphModule) -> bool:
    """True if a rule optimizer steps in the graph, or ends it because the step has to be apart."""
    if any(node.target is core_op.rule_update for node in gm.graph.nodes):
        return True
    ended = getattr(gm, "compile_subgraph_reason", None)
    frames = ended.user_stack if ended is not None and ended.graph_break else []
    return any(os.path.dirname(frame.filename) == os.path.dirname(core_op.__file__) for frame in frames)


def _is_rule_step(gm: fx.GraphModule) -> bool:
    """True for the core of rule optimizers."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    return len(calls) == 1 and calls[0].target is core_op.rule_step
