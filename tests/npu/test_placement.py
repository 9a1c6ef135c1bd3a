"""On an NPU every parameter and state is written in place, and step counters advance on the host, outside the graph."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Sequence

import harness
import placement
import pytest
import torch
from placement import Memory, Placed
from steps import assert_close, parameters, set_gradients
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.graph import graph as npu_graph
from scripts import conversion_cases
from scripts.conversion_cases import OURS, RULES, Make

SHAPES = [(4, 5), (7,), (2, 1, 3), (7,)]
STOCK = {row.name: row.make for row in conversion_cases.STOCK}
CASES: dict[str, Make] = {**OURS, **STOCK, **{f"rule {name}": make for name, make in RULES.items()}}
Tensors = dict[str, Tensor]


class Ran:
    """One optimizer after two steps, the second one compiled for NPUs; its eager twin says what had to happen."""

    def __init__(self, make: Make, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        self.params, eager = parameters(shapes=shapes), parameters(shapes=shapes)
        self.optimizer, other = make(self.params), make(eager)
        for k, step in enumerate((self.optimizer.step, self._compiled)):
            for params in (self.params, eager):
                set_gradients(params, k)
            before = {name: t.clone() for name, t in tensors(other, eager).items()}
            step()
            other.step()
        self.after = tensors(other, eager)
        self.mutated = [name for name, t in self.after.items() if not torch.equal(before[name], t)]

    def _compiled(self) -> None:
        torch._dynamo.reset()
        with placement.watched() as seen, harness.record() as graphs:
            torch.compile(self.optimizer.step, backend=npu_fused, options={"platform": "npu"})()
        assert [g.runs for g in graphs] == [1] and npu_fuse_pass.reports()[-1].fallback is None
        (self.given,) = seen

    def tensors(self) -> Tensors:
        return tensors(self.optimizer, self.params)


def tensors(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> Tensors:
    """Parameters, gradients and states by name."""
    found: Tensors = {}
    for k, p in enumerate(params):
        assert p.grad is not None
        found |= {f"param {k}": p.detach(), f"grad {k}": p.grad}
        found |= {f"{name} {k}": v for name, v in optimizer.state[p].items() if isinstance(v, Tensor)}
    return found


def placed(ran: Ran, leave_out: str = "") -> Placed:
    on_device = [t for name, t in ran.tensors().items() if t.ndim and name.rpartition(" ")[0] != leave_out]
    return placement.placed(ran.given, on_device)


def check(ran: Ran, found: Placed, tolerance: float = 1e-6) -> None:
    """What an NPU needs of a graph, from the memory of its inputs. `tolerance`: of what it computes."""
    assert not found.in_place & found.host, "a host input is written"
    written = found.written()
    for name, t in ran.tensors().items():
        memory = Memory.of(t)
        if not t.ndim:  # step counters, and what else a step computes from them
            assert name in ran.mutated or not name.startswith("step")
            assert not memory.touches(found.inputs[i] for i in set(range(len(found.inputs))) - found.host), name
            assert not memory.touches(written), f"{name} is written by the graph"
        elif name in ran.mutated:
            assert memory.within(written), f"{name} is not written in place"
        else:
            assert not memory.touches(written), f"{name} is written"
        assert_close(t, ran.after[name], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_in_place(name: str) -> None:
    ran = Ran(CASES[name])
    assert len([n for n in ran.mutated if not n.startswith("step")]) >= len(SHAPES)
    found = placed(ran)
    check(ran, found)
    assert len(found.host) == 1  # all numbers of the step, packed


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon is in torch since 2.9")
def test_what_is_written_in_place_around_original_operations() -> None:
    ran = Ran(conversion_cases.MUON.make, [(4, 5), (6, 3)])
    found = placed(ran)
    check(ran, found, tolerance=1e-2)  # test_muon.py says why
    assert not found.host  # its numbers are constants


@pytest.fixture(scope="module")
def adam() -> Ran:
    return Ran(CASES["NpuFusedAdam"])


def test_a_write_that_is_left_out_is_noticed(adam: Ran) -> None:
    gm = torch.fx.GraphModule(adam.given.gm, copy.deepcopy(adam.given.gm.graph))
    (write,) = gm.graph.find_nodes(op="call_function", target=npu_graph.device_write)
    targets, fused = write.args
    with gm.graph.inserting_before(write):
        kept = [gm.graph.call_function(operator.getitem, (fused, i)) for i in range(len(targets) - 1)]
    write.args = (targets[:-1], kept)
    whole = adam.given
    adam.given = dataclasses.replace(whole, gm=gm)
    with pytest.raises(AssertionError, match="is not written in place"):
        check(adam, placed(adam))
    adam.given = whole


def test_a_written_input_on_the_host_is_noticed() -> None:
    """torchair writes nothing in place then, of the whole graph."""
    ran = Ran(CASES["rule adan"])
    found = placed(ran, leave_out="previous_grad")
    assert not found.in_place
    with pytest.raises(AssertionError, match="is not written in place"):
        check(ran, found)


def test_an_input_that_is_written_without_need_is_noticed(adam: Ran) -> None:
    found = placed(adam)
    with pytest.raises(AssertionError, match="grad 0 is written"):
        check(adam, dataclasses.replace(found, in_place=frozenset(range(len(found.inputs) - 1))))
