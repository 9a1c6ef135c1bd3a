"""What tests of the stages share: small graphs written as functions, and running what was captured of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_fuse_pass.capture.graph import capture
from npu_fuse_pass.capture.rule import capture_batches
from npu_fuse_pass.ir.types import Captured, Group
from npu_fuse_pass.lowerings import eager
from npu_fuse_pass.lowerings.cpu import program as cpu
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.rules.batch import Batch, inputs_of

PROGRAMS: dict[str, Callable[..., Any]] = {"kernel": cpu.Program, "interpreter": eager.Program}


class _Recorder(fx.Interpreter):
    """Notes on every node what it gives."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def traced(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The graph of a function on tensors as Dynamo would give it, with shapes and dtypes on every node."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    result = function(*(fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i in range(len(examples))))
    graph.output(tracer.create_arg(() if result is None else result if isinstance(result, tuple) else (result,)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    _Recorder(gm).run(*(t.clone() for t in examples))
    return gm


def fused(function: Callable[..., Any], *examples: Tensor) -> tuple[Captured, list[Group]]:
    """The first two stages, which must succeed."""
    captured = capture(traced(function, *examples))
    assert not captured.unfused, captured.unfused
    return with_groups(captured)


def batches_of(optimizer: Any) -> list[Batch]:
    """The parts of the next step of an optimizer with a rule, with this step's gradients and numbers."""
    optimizer._prelude.prepare()
    batches: list[Batch] = optimizer._prelude.batches
    return batches


def plans_made(optimizer: Any) -> int:
    """How many times an optimizer with a rule has planned its step anew."""
    made: int = optimizer._prelude.version
    return made


def captured_step(optimizer: Any) -> Captured:
    """The next step of an optimizer with a rule, all of which can be fused."""
    captured = capture_batches(batches_of(optimizer))
    assert not captured.unfused, captured.unfused
    return captured


def inputs_of_step(optimizer: Any) -> list[Tensor | None]:
    """The values of a captured step's inputs; a group's own leaves come after them."""
    return inputs_of(batches_of(optimizer))


def step_with(optimizer: Any, core: Callable[[list[Tensor | None]], Any]) -> None:
    """`optimizer.step()`, in which `core` computes on the step's inputs what else a compiled step would."""
    optimizer._before(None)
    core(inputs_of_step(optimizer))
    optimizer._after()


def with_groups(captured: Captured) -> tuple[Captured, list[Group]]:
    """A captured step with the leaves that its groups add, and the groups that write."""
    grouped = group(captured)
    return dataclasses.replace(captured, leaves=list(grouped.leaves)), list(grouped.groups)


def run(captured: Captured, groups: Sequence[Group], arguments: Sequence[Tensor], how: str) -> tuple[Any, ...]:
    """Run captured updates on the arguments, which are changed in place; returns what the graph returns."""
    values: list[Tensor | None] = [None] * len(captured.leaves)
    for i, leaf in enumerate(captured.leaves):
        if leaf.kind == "input":
            values[i] = arguments[leaf.index]
    PROGRAMS[how](captured.leaves, groups)(values, complete=True)
    return tuple(o.literal if o.leaf is None else values[o.leaf] for o in captured.returned)


def check(function: Callable[..., Any], *arguments: Tensor, tolerance: float = 0.0) -> tuple[Captured, list[Group]]:
    """A function computes and writes the same eagerly, in a kernel, and in the interpreter; returns its groups."""
    captured, groups = fused(function, *arguments)
    wanted = [t.clone() for t in arguments]
    returned = function(*wanted)
    for how in PROGRAMS:
        got = [t.clone() for t in arguments]
        results = run(captured, groups, got, how)
        pairs = list(zip(got, wanted, strict=True))
        if returned is not None:
            pairs += zip(results, returned if isinstance(returned, (tuple, list)) else [returned], strict=True)
        for i, (a, b) in enumerate(pairs):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")
    return captured, groups


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values lie between two tensors, as float64; NaN is equal to NaN and far from the rest."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]

    def rank(x: Tensor) -> Tensor:
        bits = x.contiguous().view(ints)
        return torch.where(bits < 0, torch.iinfo(ints).min - bits, bits).long()

    ra, rb = rank(a), rank(b)
    exact, rough = (ra - rb).abs().double(), (ra.double() - rb.double()).abs()
    apart = torch.where(rough > 1e15, rough, exact)
    nan_a, nan_b = a.isnan(), b.isnan()
    apart = torch.where(nan_a & nan_b, torch.zeros_like(apart), apart)
    return torch.where(nan_a ^ nan_b, torch.full_like(apart, torch.inf), apart)
