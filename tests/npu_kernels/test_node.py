"""The real torchair converts a step's group to one GE node; the GE interpreter runs that by executing the last IR."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.append(str(pathlib.Path(__file__).parent.parent / "npu"))

import harness
import kernels
import placement
from interpreter import Node

from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.lowerings.npu.host.host import Host
from npu_fuse_pass.lowerings.npu.kernels import node as generated_node
from npu_fuse_pass.lowerings.npu.kernels.launch import Launches
from npu_fuse_pass.lowerings.npu.kernels.program import Numbered, rows_of
from npu_fuse_pass.rules.batch import inputs_of
from tests.npu_kernels import steps
from tests.npu_kernels.executed import Cores, captured_rules, generated_groups
from tests.npu_kernels.steps import OURS, parameters, set_gradients
from tests.npu_kernels.test_executed import assert_close

SIZES = (1, 7, 4864, 363)


@pytest.mark.parametrize("name", ["adamw", "lamb", "rmsprop_tf_momentum"])
def test_one_node_per_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(s for s in OURS if s.name == name)
    opts = [step.build([torch.nn.Parameter(p.detach().to(d)) for p in parameters(SIZES)])
            for d in (torch.float32, torch.float32, torch.float64)]  # fmt: skip
    ours = opts[0]
    set_gradients(ours.param_groups[0]["params"], 0)
    grouped = captured_rules(ours)
    (generated,) = generated_groups(grouped, size=2048)
    cores = Cores()

    def callback(node: Node) -> list[torch.Tensor]:
        """What GE would call: on copies here, which torchair's outputs are written back from."""
        *tensors, numbers = (t.clone() for t in node.tensors())
        members = node.op.attr["members"].i
        assert node.op.attr["kernel"].s.decode() == generated.group.name
        rows = [tensors[k : k + members] for k in range(0, len(tensors), members)]
        launches = Launches(generated, grouped.leaves, torch.zeros(0, members), 0)
        launches.bind(rows, [True] * members)
        launches.launch(numbers, False, cores)
        written = [generated.kernels.slots.index(s) for s, _ in generated.made.device.writes]
        return [t for s in written for t in rows[s]]

    monkeypatch.setitem(kernels.KERNELS, generated_node.TYPE, callback)
    generated_node.register(npu.require())
    mode = FakeTensorMode()
    gm = generated_node.graph(generated, SIZES, torch.device("cpu"), mode)
    host = Host(grouped.leaves, [Numbered(generated, grouped.leaves)])
    with harness.record() as graphs:
        run = harness.convert(gm, mode)
        for k in range(5):
            for opt in opts:
                set_gradients(opt.param_groups[0]["params"], k)
            ours._prelude.prepare()
            given = inputs_of(ours._prelude.batches)
            values = [*given, *[None] * (len(grouped.leaves) - len(given))]
            found = host.look(values, complete=True)
            slots = generated.made.tensor_slots
            inputs = [values[m[s]].detach().reshape(-1) for s in slots for m in generated.group.members]
            numbers = rows_of(found.numbers[0][0], len(SIZES)).float()
            run(*inputs, numbers)
            host.finish(found, values)
            for opt in opts[1:]:
                opt.step()
    ours._prelude.expose_states()
    (ge,) = graphs
    assert ge.runs == 5
    assert [op.type for op in ge.compute_ops()] == [generated_node.TYPE]
    (op,) = ge.compute_ops()
    outputs, names = [d.name for d in op.output_desc], [d.name for d in op.input_desc]
    assert set(outputs) < set(names)
    assert len(outputs) == len(SIZES) * len(generated.made.device.writes)
    assert len(cores.launched) == 5 * len(generated.kernels.launches)
    assert_close(*(steps.tensors(opt) for opt in opts))
    placed = placement.placed(placement.Given(gm, (*inputs, numbers)), inputs)
    assert len(placed.in_place) == len(outputs)
