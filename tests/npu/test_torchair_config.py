"""The option `torchair_config`: a torchair.CompilerConfig that reaches torchair as the user made it."""

from __future__ import annotations

import pathlib
from typing import Any

import harness
import pytest
import torch
from steps import assert_same, parameters, set_gradients, step_both, twins
from test_refused import STEPS, compiled

import npu_fuse_pass
from npu_fuse_pass import errors
from npu_fuse_pass.lowerings.npu.emit import list_operations
from npu_fuse_pass.lowerings.npu.environment import require
from tests.support.cases import BY_NAME


@pytest.mark.parametrize("name", STEPS)
def test_the_users_configuration_reaches_torchair(
    name: str, ge: harness.Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchair = require()
    build, function = STEPS[name]
    ours = build(parameters())
    set_gradients(ours.param_groups[0]["params"], 0)
    config = torchair.CompilerConfig()
    config.experimental_config.keep_inference_input_mutations = False
    given: list[Any] = []
    get_compiler = torchair.get_compiler
    monkeypatch.setattr(torchair, "get_compiler", lambda config: (given.append(config), get_compiler(config))[1])
    compiled(function(ours), torchair_config=config)()
    assert given
    assert all(c is config for c in given)
    assert not config.experimental_config.keep_inference_input_mutations


def test_a_configuration_of_the_wrong_type_or_platform(ge: harness.Recording) -> None:
    torchair = require()
    config = torchair.CompilerConfig()
    empty = torch.fx.GraphModule({}, torch.fx.Graph())
    for wrong in (torchair.CompilerConfig, 3, {}, False):
        with pytest.raises(errors.OptionError, match=r"allowed are None and a torchair\.CompilerConfig"):
            npu_fuse_pass.npu_fused(empty, [], options={"platform": "npu", "torchair_config": wrong})
    for platform in ("cpu", "eager"):
        with pytest.raises(errors.OptionError, match="it is allowed with 'auto' and 'npu'"):
            npu_fuse_pass.npu_fused(empty, [], options={"platform": platform, "torchair_config": config})
    for platform in ("auto", "npu"):
        npu_fuse_pass.npu_fused(empty, [], options={"platform": platform, "torchair_config": config})


@pytest.mark.parametrize("mode", ["reduce-overhead", "npugraph_ex"])
def test_a_mode_that_makes_no_ge_graph(mode: str, ge: harness.Recording) -> None:
    """What torchair captures there reads numbers that lie on the host once, and writes to clones of the inputs."""
    config = require().CompilerConfig()
    config.mode = mode
    ours = STEPS["ours"][0](parameters())
    set_gradients(ours.param_groups[0]["params"], 0)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"torchair_config\.mode='.*'max-autotune'"):
        compiled(ours.step, torchair_config=config)()


def test_graphs_are_dumped_where_the_configuration_says(ge: harness.Recording, tmp_path: pathlib.Path) -> None:
    config = require().CompilerConfig()
    config.debug.graph_dump.type = "pbtxt"
    config.debug.graph_dump.path = str(tmp_path)
    ours, eager = twins(BY_NAME["lamb"])
    for optimizer in (ours, eager):
        set_gradients(optimizer.param_groups[0]["params"], 0)
    compiled(ours.step, torchair_config=config, strict=True)()
    eager.step()
    assert_same(ours, eager, 1e-6)
    assert [g.runs for g in ge.graphs] == [1]
    assert "ReduceSum" in next(tmp_path.glob("dynamo_optimized_graph_*.pbtxt")).read_text()


@pytest.mark.parametrize(
    ("name", "kernels", "kernel"),
    [
        ("lamb_global", "auto", list_operations.KERNEL),
        ("lamb_global", "elementwise", "GE elementwise"),
        ("adamw", "auto", "AdamApplyOneAssign"),
        ("sgd_momentum", "auto", "FusedMulApplyMomentum"),
    ],
)
def test_running_eagerly_inside_torchair(name: str, kernels: str, kernel: str, ge: harness.Recording) -> None:
    """torchair converts and then runs our graph's eager kernels: for bisecting."""
    config = require().CompilerConfig()
    config.debug.run_eagerly = True
    ours, eager = twins(BY_NAME[name])
    step_both(ours, eager, compiled(ours.step, torchair_config=config, kernels=kernels, strict=True), 2)
    assert_same(ours, eager, 1e-6)
    assert not ge.graphs
    assert [row.kernel for row in npu_fuse_pass.reports()[-1].groups] == [kernel]
