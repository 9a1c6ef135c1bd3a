"""`fuse_pass` as torchair's hook: the graph that torchair converts holds the fused nodes, and computes the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from steps import assert_close, parameters, step_both
from torch import fx

import npu_fuse_pass
from npu_fuse_pass.ir.fused_op import multi_tensor_update
from npu_fuse_pass.lowerings.npu.environment import require

STOCK: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, foreach=False),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.9, centered=True, foreach=True),
}


@pytest.mark.parametrize("name", STOCK)
def test_torchair_converts_the_rewritten_graph(name: str) -> None:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    torchair = require()  # registers the converters of the fused nodes
    harness.prepare()
    seen: list[int] = []

    def look(gm: fx.GraphModule, *given: Any) -> None:
        seen.append(len(gm.graph.find_nodes(op="call_function", target=multi_tensor_update)))

    config = torchair.CompilerConfig()
    config.post_grad_custom_pre_pass = npu_fuse_pass.fuse_pass
    config.post_grad_custom_post_pass = look
    both = [parameters(shapes=[(4, 5), (3,), (2, 1, 6)]) for _ in range(2)]
    ours, eager = (STOCK[name](p) for p in both)
    with harness.record() as graphs:
        step = torch.compile(ours.step, backend=torchair.get_npu_backend(compiler_config=config))
        step_both(ours, eager, step, 4)
    assert seen and set(seen) == {1}
    assert sum(g.runs for g in graphs.graphs) == 4
    for report in npu_fuse_pass.reports():
        assert report.fallback is None and not report.unfused and [g.updates for g in report.groups] == [3]
    for p, q in zip(*both, strict=True):
        assert_close(p, q, 2e-6)  # compiled, stock Adam is capturable: another order of its bias corrections
