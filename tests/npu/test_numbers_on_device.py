"""Numbers that lie on the device (capturable=True, ASGD): read once and where something else wrote them, and sent back
without waiting.

There is no device here: the leaves say that they lie on one, and their values are this machine's. Where it matters that
nothing reads them by another way than the one that is counted, everything is on the device "meta", which has no values.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

import harness
import interpreter
import numpy as np
import pytest
import torch
from steps import OnNpu, assert_close, assert_same, captured_step, parameters, set_gradients, twins
from torch import Tensor

import npu_fuse_pass
from npu_fuse_pass import pipeline
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.capture import graph as stage
from npu_fuse_pass.ir.types import Leaf
from npu_fuse_pass.lowerings.npu import execution
from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.lowerings.npu.host import mirror as npu_mirror
from npu_fuse_pass.lowerings.npu.layout import bind, binding_cache
from tests.support import graphs
from tests.support.cases import BY_NAME

SHAPES = [(4, 5), (3,), (2, 2), (3,)]
NPU = torch.device("privateuseone:0")  # "npu" has that name where torch_npu is imported


pytestmark = pytest.mark.usefixtures("afresh")


class Transfers:
    """Counts what is read from the device and sent there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.sent: list[Tensor] = []
        patch.setattr(npu_mirror, "from_device", self._from_device)
        patch.setattr(npu_mirror, "to_device", self._to_device)

    def _from_device(self, tensors: Any) -> Tensor:
        self.read.append(len(tensors))
        return torch.stack(list(tensors))

    def _to_device(self, vector: Tensor, device: torch.device) -> Tensor:
        assert device == NPU
        self.sent.append(vector)
        return vector.clone()

    def taken(self) -> tuple[int, int]:
        """How many were read and sent since this was asked last."""
        found = len(self.read), len(self.sent)
        self.read, self.sent = [], []
        return found


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    """Every 0-dim input of a captured step is said to be on the device."""
    capture = stage.capture

    def moved(*args: Any, **kwargs: Any) -> Any:
        captured = capture(*args, **kwargs)
        captured.leaves[:] = map(on_npu, captured.leaves)
        return captured

    monkeypatch.setattr(pipeline, "capture", moved)
    return Transfers(monkeypatch)


def on_npu(leaf: Any) -> Any:
    of_python = leaf.dtype is torch.float64 and leaf.name.endswith("_lr_")  # Dynamo makes a tensor of it, on the host
    given = leaf.kind in ("input", "attribute") and not leaf.shape and not of_python
    return dataclasses.replace(leaf, device=NPU) if given else leaf


def asgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.ASGD(params, lr=0.1, lambd=0.01, foreach=False)


class Twins:
    """An optimizer whose steps are compiled, and an eager one."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer] = asgd, shapes: Any = SHAPES) -> None:
        self.params, self.wanted = parameters(shapes=shapes), parameters(shapes=shapes)
        self.ours, self.eager = make(self.params), make(self.wanted)
        self.step = torch.compile(self.ours.step, backend=npu_fused, options={"platform": "npu"})
        self._steps, self.tolerance = 0, 1e-6

    def gradients(self) -> None:
        self._steps += 1
        for params in (self.params, self.wanted):
            set_gradients(params, self._steps)

    def run(self) -> None:
        """One step, and whether both did the same."""
        self.gradients()
        with harness.record():
            self.step()
        self.eager.step()
        self.compare()

    def compare(self) -> None:
        for p, q in zip(self.params, self.wanted, strict=True):
            assert_close(p.detach(), q.detach(), self.tolerance)
            for key, value in self.eager.state[q].items():
                if isinstance(value, Tensor):
                    assert_close(self.ours.state[p][key], value, self.tolerance)
        assert npu_fuse_pass.reports()[-1].fallback is None


def test_they_are_read_once_and_sent_at_every_step(transfers: Transfers) -> None:
    both = Twins()
    found = []
    for _ in range(5):
        both.run()
        found.append(transfers.taken())
    assert found == [(1, 1)] + [(0, 1)] * 4
    (row,) = npu_fuse_pass.reports()[-1].groups
    assert f"{3 * len(SHAPES)} of its 0-dim tensors are on the device" in row.note
    assert "increment_version" in str(npu_fuse_pass.reports()[-1])


def test_numbers_and_states_are_sent_together(transfers: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind, "numbers_on", lambda leaves, parts, devices: NPU)
    both = Twins()
    for k in range(4):
        both.run()
        assert len(transfers.sent[-1]) > 3 * len(SHAPES)  # eta, mu and step of each, behind what the graph reads
        assert transfers.taken() == (k == 0, 1)


def fill(opt: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        first(opt)["step"].fill_(7.0)


def write_through_a_view(opt: torch.optim.Optimizer) -> None:
    first(opt)["mu"].detach().view(1)[:1].mul_(0.5)


def write_many(opt: torch.optim.Optimizer) -> None:
    torch._foreach_add_([s["step"] for s in opt.state.values()], 3.0)


def load(opt: torch.optim.Optimizer) -> None:
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved)
    for entry in state["state"].values():
        entry["step"] += 11
    opt.load_state_dict(state)


def load_in_place(opt: torch.optim.Optimizer) -> None:
    """As torch.distributed.checkpoint does."""
    for entry in opt.state.values():
        entry["eta"].detach().copy_(torch.tensor(0.05))


def replace(opt: torch.optim.Optimizer) -> None:
    for entry in opt.state.values():
        entry["step"] = entry["step"] + 2


def elsewhere(opt: torch.optim.Optimizer) -> None:
    entry = first(opt)
    entry["step"].data = entry["step"].data + 5  # no write is counted: the memory is another


def told(opt: torch.optim.Optimizer) -> None:
    step = first(opt)["step"]
    step.data.fill_(9.0)
    torch.autograd.graph.increment_version(step)


def exchanged(opt: torch.optim.Optimizer) -> None:
    """Copies of the states, as after unpickling."""
    for entry in opt.state.values():
        entry.update(copy.deepcopy(dict(entry)))
        entry["step"] -= 1


def in_inference_mode(opt: torch.optim.Optimizer) -> None:
    with torch.inference_mode():
        first(opt)["step"].fill_(3.0)


CHANGES = {
    f.__name__: f
    for f in (
        *(fill, write_through_a_view, write_many, load, load_in_place, replace, elsewhere, told, exchanged),
        in_inference_mode,
    )
}


def first(opt: torch.optim.Optimizer) -> dict[str, Any]:
    return opt.state[opt.param_groups[0]["params"][0]]


def test_what_something_else_has_written_is_read(transfers: Transfers) -> None:
    both = Twins()
    both.run()
    both.run()
    transfers.taken()
    for name, change in CHANGES.items():
        for opt in (both.ours, both.eager):
            change(opt)
        both.run()
        assert transfers.taken() == (1, 1), name
        both.run()
        assert transfers.taken() == (0, 1), name


@pytest.mark.parametrize("backend", ["eager step", "aot_eager"])
def test_what_another_step_has_written_is_read(transfers: Transfers, backend: str) -> None:
    """The optimizer's own step, or one that another backend compiled, between compiled ones."""
    both = Twins()
    both.run()
    both.run()
    transfers.taken()
    other = both.ours.step if backend == "eager step" else torch.compile(both.ours.step, backend=backend)
    both.gradients()
    other()
    both.eager.step()
    both.compare()
    assert transfers.taken() == (0, 0)
    both.run()
    assert transfers.taken() == (1, 1)


def test_a_write_that_nothing_counts_needs_to_be_told(transfers: Transfers) -> None:
    """What docs/npu.md says of `t.data`: the step goes on from what it knows; `told`, above, is the way out."""
    both = Twins()
    both.run()
    both.run()
    first(both.ours)["step"].data.fill_(9.0)
    both.run()


def test_tensors_that_count_nothing_are_read_at_every_step(transfers: Transfers) -> None:
    both = Twins()
    both.run()
    both.run()
    for opt in (both.ours, both.eager):
        with torch.inference_mode():
            first(opt)["step"] = first(opt)["step"].clone()
    transfers.taken()
    for k in range(3):
        for opt in (both.ours, both.eager):
            with torch.inference_mode():
                first(opt)["step"].fill_(float(k))
        with torch.inference_mode():
            both.run()
        assert transfers.taken() == (1, 1)


def test_zero_dim_parameters_are_read_at_every_step(transfers: Transfers) -> None:
    """`p.data.clamp_()` is how models keep theirs in bounds, with gradients or without new ones."""
    both = Twins(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False), [(), (3,)])
    for k in range(4):
        both.run()
        for params in (both.params, both.wanted):
            params[0].data.clamp_(0.1 * k, 0.1 * k)
        with harness.record():
            both.step()
        both.eager.step()
        both.compare()
        assert transfers.taken() == (2, 2)


def test_a_learning_rate_on_the_device(transfers: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one group only, next to another group's Python number; schedulers fill it."""

    def make(params: Any) -> torch.optim.Optimizer:
        groups = [dict(params=params[:1], lr=torch.tensor(0.1)), dict(params=params[1:], lr=0.01)]
        return torch.optim.Adam(groups, foreach=False, capturable=True)

    # "cpu" is the device here, which torch.optim does not let eager steps with capturable=True run on
    monkeypatch.setattr(import_module("torch.optim.adam"), "_get_capturable_supported_devices", lambda *_: ["cpu"])
    both = Twins(make)
    both.tolerance = 4e-6  # eager steps take their bias corrections in float32 then, where 1 - 0.999 is 1e-5 off
    for k in range(6):
        if k == 4:
            for opt in (both.ours, both.eager):
                opt.param_groups[0]["lr"].fill_(0.02)
        both.run()
        assert transfers.taken() == (k in (0, 4), 1)


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_members_that_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their counters stay, those of others advance."""
    transfers = Transfers(monkeypatch)
    ours, eager = twins(BY_NAME[name])
    found: list[tuple[int, int]] = []

    def captured(optimizer: Any) -> Any:
        made = captured_step(optimizer)
        made.leaves[:] = [on_npu(leaf) if "step" in leaf.name else leaf for leaf in made.leaves]
        return made

    monkeypatch.setattr("steps.captured_step", captured)
    with harness.record():
        through = OnNpu(ours)
        for k, missing in enumerate([(), (1,), (1, 3), (), (0,), ()]):
            for opt in (ours, eager):
                set_gradients(opt.param_groups[0]["params"], k, missing)
            through.step()
            eager.step()
            assert_same(ours, eager, 1e-6)
            found.append(transfers.taken())
    # the counters are views of one vector, which counts the writes to any of them
    assert found == [(1, 1), (0, 1), (1, 1), (1, 1), (0, 1), (1, 1)]


def test_a_state_that_the_step_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to one that it writes: both are sent at once."""

    def step(p: Any, q: Any, g: Any, h: Any, count: Any, other: Any) -> Any:
        other.add_(1)
        p.sub_(g / other)
        made = count + 1
        q.sub_(h / made)
        return made

    transfers = Transfers(monkeypatch)
    given = [torch.rand(n) for n in (5, 7, 5, 7)] + [torch.tensor(3.0), torch.tensor(8.0)]
    captured, groups = graphs.fused(step, *given)
    leaves = [x if x.shape or x.kind == "constant" else dataclasses.replace(x, device=NPU) for x in captured.leaves]
    (made,) = [i for i, leaf in enumerate(leaves) if leaf.kind == "output"]
    wanted = [t.clone() for t in given]
    with harness.record():
        program = npu.Program(leaves, groups)
        for k in range(3):
            values: list[Tensor | None] = [None] * len(leaves)
            for i, leaf in enumerate(leaves):
                if leaf.kind == "input":
                    values[i] = given[leaf.index]
            program(values, complete=True)
            result = step(*wanted)
            for got, want in zip([*given, values[made]], [*wanted, result], strict=True):
                assert got is not None
                assert_close(got, want, 1e-6)
            assert transfers.taken() == (k == 0, 1)


def test_each_dtype_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    leaf = Leaf("input", "step", device=NPU)
    kinds = [torch.float32, torch.int64]
    leaves = [dataclasses.replace(leaf, dtype=kinds[i % 2], index=i) for i in range(20)]
    values: list[Tensor | None] = [torch.tensor(2**24 + i, dtype=x.dtype) for i, x in enumerate(leaves)]
    mirror = npu_mirror.Mirror([i for i in range(20) if i != 3], leaves)
    mirror.update(values)
    assert transfers.read == [10, 9]
    assert 3 not in mirror.places
    for i, place in mirror.places.items():
        wanted = values[i]
        assert wanted is not None
        assert mirror.values[place] == wanted.double()  # exact: a mix of both dtypes would round integers


def test_another_tensor_in_the_same_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one was freed and the next one got its memory; the mirror keeps none alive."""
    transfers = Transfers(monkeypatch)
    mirror = npu_mirror.Mirror([0], [Leaf("input", "step", dtype=torch.float32, device=NPU)])
    memory = np.full((), 3.0, dtype=np.float32)
    t = torch.from_numpy(memory)
    for wanted in (1, 0):
        mirror.update([t])
        assert transfers.taken() == (wanted, 0)
    address, version, gone = t.data_ptr(), t._version, weakref.ref(t)
    del t
    assert gone() is None
    memory[()] = 8.0
    t = torch.from_numpy(memory)
    assert (t.data_ptr(), t._version) == (address, version)
    mirror.update([t])
    assert mirror.values.tolist() == [8.0]


@pytest.mark.parametrize("make", [asgd, lambda params: torch.optim.Adam(params, lr=0.1, capturable=True)])
def test_nothing_else_reads_them(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", where reading by any other way fails. The graph does not run: addresses are all the same there."""
    meta = torch.device("meta")
    read, sent = [], []

    def from_device(tensors: Any) -> Tensor:
        read.append(len(tensors))
        return torch.zeros(len(tensors))

    def to_device(vector: Tensor, device: torch.device) -> Tensor:
        sent.append(vector)
        return vector.to(device)

    monkeypatch.setattr(npu_mirror, "from_device", from_device)
    monkeypatch.setattr(npu_mirror, "to_device", to_device)
    monkeypatch.setattr(interpreter, "run", lambda graph, inputs, assigned=(): list(assigned))
    monkeypatch.setattr(execution.Execution, "_first", lambda self, inputs, written: self.compiled(*inputs))
    monkeypatch.setattr(bind, "check_apart", lambda *tensors: None)
    monkeypatch.setattr(binding_cache, "apart", lambda *blocks: True)
    params = [torch.nn.Parameter(torch.empty(shape, device=meta)) for shape in SHAPES]
    optimizer = make(params)
    step = torch.compile(optimizer.step, backend=npu_fused, options={"platform": "npu"})
    for k in range(4):
        for p in params:
            p.grad = torch.empty_like(p)
        with harness.record() as recorded:
            step()
        assert len(recorded) == (k == 0)
        assert len(read) == 1
        assert len(sent) == k + 1  # with the numbers of the graph: there is no other input from the host
        assert k + 1 in sent[-1]  # the counters
    assert npu_fuse_pass.reports()[-1].fallback is None
