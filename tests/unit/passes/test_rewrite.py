"""Stage 4, rewrite: a real FX graph that prints, lints, runs and computes what the original step does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import npu_fuse_pass
from npu_fuse_pass.ir.fused_op import multi_tensor_contribute, multi_tensor_update
from npu_fuse_pass.ir.types import Grouped
from npu_fuse_pass.lowerings.cpu import program as cpu
from npu_fuse_pass.passes.rewrite import rewrite
from tests.support.cases import CASES, over
from tests.support.graphs import fused, inputs_of_step
from tests.support.training import compiled, gradients, last_report, parameters, set_gradients, take_over, train

pytestmark = pytest.mark.usefixtures("same_numbers")


def step(lr: Any, p: Any, g: Any, m: Any, q: Any, h: Any, n: Any) -> None:
    """Momentum for two parameters."""
    for param, grad, buffer in ((p, g, m), (q, h, n)):
        buffer.mul_(0.9).add_(grad)
        param.sub_(lr * buffer)


def tensors() -> list[Tensor]:
    lr = torch.tensor(0.1, dtype=torch.float64)
    return [lr, *(torch.randn(n) for n in (5, 5, 5)), *(torch.randn(2, 3) for _ in range(3))]


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def well_formed(gm: Any) -> fx.GraphModule:
    assert isinstance(gm, fx.GraphModule)
    gm.graph.lint()
    assert "multi_tensor_update" in gm.code and "def forward" in gm.code
    assert "multi_tensor_update" in gm.print_readable(print_output=False)
    assert not list(gm.parameters()) and not list(gm.buffers()), "it holds no tensors"
    return gm


def test_one_node_for_a_group_then_copies():
    """Functional: every value is computed before anything is written."""
    captured, groups = fused(step, *tensors())
    gm = well_formed(rewrite(Grouped(tuple(captured.leaves), (), tuple(groups))))
    (node,) = calls(gm, multi_tensor_update)
    assert node.name == groups[0].name
    copies = calls(gm, torch.ops.aten.copy_.default)
    assert len(copies) == 4
    order = list(gm.graph.nodes)
    assert all(order.index(copy) > order.index(node) for copy in copies)
    assert {n.op for n in order} == {"placeholder", "call_function", "output"}


def test_it_runs_and_gives_what_the_step_gives():
    given = tensors()
    captured, groups = fused(step, *given)
    gm = rewrite(Grouped(tuple(captured.leaves), (), tuple(groups)))
    wanted, got = [t.clone() for t in given], [t.clone() for t in given]
    step(*wanted)
    arguments = [got[leaf.index] for leaf in captured.leaves if leaf.kind in ("input", "attribute")]
    assert gm(*arguments) == ()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_outputs_and_swaps():
    """What the step returns is returned; what it reads is read before it is overwritten."""

    def swap(p: Any, g: Any) -> Any:
        new = p * 2 + g
        old = p.clone()
        p.copy_(g)
        g.copy_(old)
        return new, p.sum()

    given = [torch.randn(5), torch.randn(5)]
    captured, groups = fused(swap, *given)
    gm = well_formed(rewrite(Grouped(tuple(captured.leaves), (), tuple(groups))))
    wanted, got = [t.clone() for t in given], [t.clone() for t in given]
    expected, returned = swap(*wanted), gm(*got)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(returned, expected, rtol=1e-6, atol=0)


def test_what_follows_from_no_tensor():
    """A new tensor of numbers alone."""

    def step_and_twos(p: Any, g: Any) -> Any:
        p.sub_(g)
        return torch.full_like(p, 2.0, dtype=torch.bfloat16)

    given = [torch.randn(2, 3), torch.randn(2, 3)]
    captured, groups = fused(step_and_twos, *given)
    (returned,) = rewrite(Grouped(tuple(captured.leaves), (), tuple(groups)))(*given)
    assert torch.equal(returned, torch.full((2, 3), 2.0, dtype=torch.bfloat16))


def test_attributes_become_arguments():
    """Stock optimizers read their state as attributes of the graph; the rewritten graph has arguments instead."""
    torch._dynamo.reset()
    params = parameters([(3, 4), (5,)])
    opt = torch.optim.Adam(params, lr=0.1)
    compiled_step = torch.compile(opt.step, backend="npu_fused")
    npu_fuse_pass.clear_reports()
    train(params, compiled_step, seeds=range(2))
    gm = well_formed(last_report().fused_graph)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    assert len(names) == len(set(names)) == 2 + 4 * 2, names


@over(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_graph_of_every_optimizer_steps_like_the_optimizer(case, dtype):
    """The rewritten graph, run by torch on tensors, against an eager step from the same state."""
    torch._dynamo.reset()
    shapes = [(3, 4), (5,), (), (2, 2, 2)]
    params, twins = parameters(shapes, dtype), parameters(shapes, dtype)
    opt, twin = case.build(params), case.build(twins)
    fused_step = compiled(opt)
    for some, run in ((params, fused_step), (twins, twin.step)):
        train(some, run, seeds=range(2))  # a state that is not all zeros
    take_over(opt, params, twin, twins)
    gm = well_formed(last_report().fused_graph)
    for some in (params, twins):
        set_gradients(some, gradients(some, 7))
    arguments = inputs_of_step(opt)
    assert len(gm.graph.find_nodes(op="placeholder")) == len(arguments)
    with torch.no_grad():
        gm(*arguments)
    twin.step()
    rtol = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7)
        for name, value in twin.state.get(q, {}).items():
            torch.testing.assert_close(opt.state[p][name], value, rtol=rtol, atol=1e-7)
    assert bool(calls(gm, multi_tensor_contribute)) == ("global" in case.name)


def test_the_nodes_work_on_fake_tensors():
    """torchair and make_fx trace the graph: shapes and dtypes without values."""
    given = tensors()
    captured, groups = fused(step, *given)
    gm = rewrite(Grouped(tuple(captured.leaves), (), tuple(groups)))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(given[leaf.index]) for leaf in captured.leaves if leaf.kind == "input"]
        gm(*fakes)
    again = fx.experimental.proxy_tensor.make_fx(gm, tracing_mode="fake")(*fakes)
    assert len(calls(again, multi_tensor_update)) == 1


def test_kernel_and_graph_agree_to_the_last_bit():
    """On arithmetic alone there is nothing in which they could differ."""
    given = tensors()
    captured, groups = fused(step, *given)
    a, b = [t.clone() for t in given], [t.clone() for t in given]
    values: list[Tensor | None] = [a[leaf.index] if leaf.kind == "input" else None for leaf in captured.leaves]
    cpu.Program(captured.leaves, groups)(values, complete=True)
    rewrite(Grouped(tuple(captured.leaves), (), tuple(groups)))(
        *(b[leaf.index] for leaf in captured.leaves if leaf.kind == "input")
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
