"""The Dynamo backend `npu_fused`: the only place that talks to Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from . import pipeline, step_op
from .compiled import RuleStep, graph_step
from .errors import OptionError

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
    return graph_step(gm, **chosen)


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
