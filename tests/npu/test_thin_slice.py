"""A functional list operation and its copy_ epilogue go straight into the real torchair and come out as GE operations.

No package of ours takes part: the operation, its converter and its graph are made here. It is the shape of graph that
the pass produces, so this fails first when torchair changes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = [(4, 5), (3,), (), (2, 1, 6), (3,)]
LR, MOMENTUM = 0.1, 0.9


def momentum_step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> list[Tensor]:
    new = [MOMENTUM * buffer + grad for buffer, grad in zip(buffers, grads, strict=True)]
    return [param - LR * buffer for param, buffer in zip(params, new, strict=True)] + new


@pytest.fixture(scope="module")
def list_op() -> Iterator[Any]:
    library = torch.library.Library("npu_fused_test", "FRAGMENT")
    library.define("momentum(Tensor[] params, Tensor[] grads, Tensor[] buffers) -> Tensor[]")
    library.impl("momentum", momentum_step, "CompositeExplicitAutograd")
    op = torch.ops.npu_fused_test.momentum.default
    torch.library.register_fake("npu_fused_test::momentum", lib=library)(
        lambda params, grads, buffers: [torch.empty_like(t) for t in [*params, *buffers]]
    )
    harness.prepare()
    import torchair
    from torchair._ge_concrete_graph import ge_apis as ge

    @torchair.register_fx_node_ge_converter(op)
    def convert(params: list[Any], grads: list[Any], buffers: list[Any], meta_outputs: Any = None) -> list[Any]:
        new = [ge.Add(ge.Mul(buffer, MOMENTUM), grad) for buffer, grad in zip(buffers, grads, strict=True)]
        return [ge.Sub(param, ge.Mul(buffer, LR)) for param, buffer in zip(params, new, strict=True)] + new

    yield op
    library._destroy()


def step_graph(op: Any, mode: FakeTensorMode, tensors: list[Tensor]) -> torch.fx.GraphModule:
    """Placeholders -> one list op -> getitem -> copy_ into the written ones; returns ()."""
    graph = torch.fx.Graph()
    inputs = []
    for index, tensor in enumerate(tensors):
        inputs.append(graph.placeholder(f"arg{index}"))
        inputs[-1].meta["val"] = mode.from_tensor(tensor)
    n = len(tensors) // 3
    params, grads, buffers = inputs[:n], inputs[n : 2 * n], inputs[2 * n :]
    call = graph.call_function(op, (params, grads, buffers))
    for index, target in enumerate([*params, *buffers]):
        value = graph.call_function(
            torch.ops.aten.copy_.default, (target, graph.call_function(operator.getitem, (call, index)))
        )
        value.meta["val"] = target.meta["val"]
    graph.output(())
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_a_list_operation_becomes_ge_operations(list_op: Any) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for _ in range(3) for shape in SHAPES]
    mode = FakeTensorMode()
    n = len(SHAPES)
    want = momentum_step(tensors[:n], tensors[n : 2 * n], tensors[2 * n :])
    with harness.record() as graphs:
        step = harness.convert(step_graph(list_op, mode, tensors), mode)
        step(*tensors)
    assert graphs[0].counts() == {"Data": 3 * n, "Const": 2 * n, "Mul": 2 * n, "Add": n, "Sub": n, "NetOutput": 1}
    for got, expected in zip([*tensors[:n], *tensors[2 * n :]], want, strict=True):
        assert torch.equal(got, expected)
