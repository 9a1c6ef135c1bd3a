"""The NPU lowering through the real torchair: what our pass makes converts, and computes what eager torch computes."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from steps import OnNpu, assert_same, parameters, set_gradients, twins
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_fuse_pass.lowerings.npu.emit import elementwise
from npu_fuse_pass.lowerings.npu.environment import require
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.passes.rewrite import rewrite
from npu_fuse_pass.tolerances import PROMISED
from tests.support.cases import BY_NAME, CASES, Case, over
from tests.support.graphs import captured_step, inputs_of_step, step_with


@over(CASES)
def test_the_rewritten_graph_converts(case: Case) -> None:
    """The graph that `rewrite` makes, as it is, through torchair's public compiler with our converter."""
    ours, eager = twins(case)
    for optimizer in (ours, eager):
        set_gradients(optimizer.param_groups[0]["params"], 1)
    gm = rewrite(group(captured_step(ours)))
    require()
    mode = FakeTensorMode()
    values = [v.detach() for v in inputs_of_step(ours) if v is not None]
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    with harness.record() as graphs:
        step_with(ours, lambda _: harness.convert(gm, mode)(*values))
    eager.step()
    assert set(graphs[0].counts()) <= set(elementwise.DOCUMENTS)
    assert_same(ours, eager, 1e-6)


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
@over(CASES)
def test_five_steps(case: Case, dtype: torch.dtype) -> None:
    """Numbers change every step and the graph is converted once."""
    ours, eager = twins(case, dtype)
    with harness.record() as graphs:
        on_npu = None
        for k in range(5):
            for optimizer in (ours, eager):
                set_gradients(optimizer.param_groups[0]["params"], k)
                for name in ("lr", "learning_rate"):
                    if name in optimizer.param_groups[0]:
                        optimizer.param_groups[0][name] *= 0.9
            on_npu = on_npu or OnNpu(ours)
            on_npu.step()
            eager.step()
    assert [g.runs for g in graphs] == [5]
    assert set(graphs[0].counts()) <= set(elementwise.DOCUMENTS)
    assert_same(ours, eager, PROMISED[dtype])


@over([BY_NAME["adam"], BY_NAME["lamb_global"]])
def test_missing_gradients(case: Case) -> None:
    """One graph for every pattern of them; who has no gradient keeps parameter, states and step count."""
    ours, eager = twins(case)
    with harness.record() as graphs:
        on_npu = None
        for k, missing in enumerate([(), (0, 3), (1,), (2, 3, 5), (0, 1, 2, 3, 4, 5), ()]):
            for optimizer in (ours, eager):
                set_gradients(optimizer.param_groups[0]["params"], k, missing)
            on_npu = on_npu or OnNpu(ours)
            on_npu.step()
            eager.step()
    assert len(graphs) == 1
    assert_same(ours, eager, 1e-6)


def test_gradients_in_another_memory_order() -> None:
    ours, eager = twins(BY_NAME["adamw"])
    on_npu = None
    for k in range(2):
        for optimizer in (ours, eager):
            params = optimizer.param_groups[0]["params"]
            set_gradients(params, k)
            params[0].grad = params[0].grad.t().contiguous().t()
            params[-1].grad = params[-1].grad.contiguous()
        on_npu = on_npu or OnNpu(ours)
        on_npu.step()
        eager.step()
    assert_same(ours, eager, 1e-6)


def test_parameters_that_are_slices() -> None:
    """No dense block of memory to hand to GE: through a copy, and back."""
    whole = [torch.arange(24.0).reshape(4, 6), torch.arange(24.0).reshape(4, 6)]
    ours, eager = (BY_NAME["sgd_momentum"].build([torch.nn.Parameter(w[:, 1:3])]) for w in whole)
    for optimizer in (ours, eager):
        set_gradients(optimizer.param_groups[0]["params"], 0)
    OnNpu(ours).step()
    eager.step()
    assert torch.equal(whole[0][:, 0], torch.arange(24.0).reshape(4, 6)[:, 0])
    assert not torch.equal(whole[0][:, 1:3], torch.arange(24.0).reshape(4, 6)[:, 1:3])
    torch.testing.assert_close(whole[0], whole[1], rtol=1e-6, atol=0)


def test_two_groups_with_different_numbers_are_one_graph() -> None:
    def build() -> Any:
        params = parameters()
        return BY_NAME["adamw"].build([{"params": params[:3]}, {"params": params[3:], "lr": 0.5, "weight_decay": 0.0}])

    ours, eager = build(), build()
    for optimizer in (ours, eager):
        set_gradients([p for g in optimizer.param_groups for p in g["params"]], 0)
    with harness.record() as graphs:
        OnNpu(ours).step()
    eager.step()
    assert len(graphs) == 1
    assert_same(ours, eager, 1e-6)
