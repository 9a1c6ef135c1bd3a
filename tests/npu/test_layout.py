"""Layouts: adjacent tensors as one, gathered gradients, one by one; and what makes a step be planned anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import SHAPES, Parameters, Twins, adjacent, flat_parameters, shapes

import npu_fuse_pass
import optimizers
from npu_fuse_pass import errors
from npu_fuse_pass.lowerings.npu import program
from npu_fuse_pass.lowerings.npu.emit import list_operations
from npu_fuse_pass.lowerings.npu.layout import replan
from npu_fuse_pass.lowerings.npu.layout import spans as npu_layout
from optimizers.paddle import RMSProp
from scripts import npu_layouts

Make = Callable[[Parameters], Any]
IN_ORDER = tuple(range(len(SHAPES)))
REVERSED = IN_ORDER[::-1]
MAKE: dict[str, Make] = {
    "Adam": lambda p: optimizers.NpuFusedAdam(p, lr=0.02),
    "AdamW": lambda p: optimizers.NpuFusedAdamW(p, lr=0.02),
    "SGD momentum": lambda p: optimizers.NpuFusedSGD(p, lr=0.02, momentum=0.9),
    "RMSpropTF": lambda p: optimizers.NpuFusedRMSpropTF(p, lr=0.02),
    "Paddle RMSProp": lambda p: RMSProp(0.02, parameters=p),
}
ADAM = MAKE["Adam"]
# For any number of adjacent parameters and gradients: launches, bytes per element, operations that unpack the numbers.
COST: dict[str, tuple[int, int, int]] = {
    "Adam": (1, 28, 2),
    "AdamW": (2, 36, 2),
    "SGD momentum": (1, 20, 2),
    "RMSpropTF": (9, 92, 1),
    "Paddle RMSProp": (11, 108, 1),
}


pytestmark = pytest.mark.usefixtures("afresh")


def separate_parameters(count: int = len(SHAPES)) -> Parameters:
    return [torch.nn.Parameter(t.clone()) for t in adjacent(shapes(count), 0)]


def flat(count: int = len(SHAPES)) -> Callable[[], Parameters]:
    return lambda: flat_parameters(count)


# What the graph looks like -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_compute_nodes_do_not_depend_on_the_number_of_parameters(name: str) -> None:
    """At most 12, whatever N is."""
    found = {}
    for count in (1, 10, 100, 1000):
        twins = Twins(MAKE[name], flat(count))
        steps = 5 if count < 1000 else 2
        for k in range(steps):
            twins.step(k, order=tuple(range(count)))
        assert [g.runs for g in twins.graphs] == [steps]
        assert twins.row.layout == ("list" if count == 1 else "flat")
        found[count] = (twins.nodes(), twins.row.bytes_per_element, twins.row.launches)
    print(f"{name}: compute nodes, bytes per element, launches for N = {found}")
    launches, size, unpacking = COST[name]
    assert set(found.values()) == {(launches + unpacking, size, launches)}
    assert launches + unpacking <= 12


@pytest.mark.parametrize("name", MAKE)
def test_gathered_gradients(name: str) -> None:
    """One concatenation for every 48 gradients, which are 1-D views already, and 8 bytes per element more."""
    launches, size, unpacking = COST[name]
    for count in (10, 100):
        twins = Twins(MAKE[name], flat(count))
        for k in range(3):
            twins.step(k)
        runs = math.ceil(count / npu_layout.CONCATENATED)
        assert twins.graphs[0].counts()["ConcatV2"] == runs
        assert len(twins.graphs) == 1
        assert (twins.row.layout, twins.row.layout_reason) == ("gathered", "")
        assert twins.row.bytes_per_element == size + 8
        in_lists = twins.row.kernel == list_operations.KERNEL
        assert in_lists == (runs > 1 and "RMS" in name)
        assert twins.row.launches == runs + launches * (1 if in_lists else runs)
        assert twins.nodes() == twins.row.launches + (2 if in_lists else unpacking)


@pytest.mark.parametrize("name", ["Adam", "RMSpropTF"])
def test_one_by_one(name: str) -> None:
    """N + a constant for a dedicated operation; else one operation on lists for every 50 parameters."""
    launches, size, unpacking = COST[name]
    for count in (10, 100):
        twins = Twins(MAKE[name], lambda count=count: separate_parameters(count))  # type: ignore[misc]
        twins.step(0)
        each = math.ceil(count / list_operations.LONGEST) * launches if name == "RMSpropTF" else count * launches
        assert twins.nodes() == each + (2 if name == "RMSpropTF" else unpacking)
        assert twins.row.bytes_per_element == size


def test_large_gradients_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of 20 elements is updated by itself, unless the layout is asked for."""
    monkeypatch.setattr(npu_layout, "_SMALL", 12)
    for layout, wanted in {"auto": "gathered + list", "flat": "gathered"}.items():
        twins = Twins(ADAM, flat(), layout=layout)
        twins.step(0)
        assert twins.row.layout == wanted


def test_gradients_in_pieces() -> None:
    """As in DDP's buckets, several gradients each: a run for each piece moves nothing."""
    twins = Twins(ADAM, flat(20))
    twins.step(0, order=(*range(10, 20), *range(10)))
    assert (twins.row.layout, "ConcatV2" in twins.graphs[0].counts()) == ("flat", False)
    twins.step(1, order=(*range(10, 20), *range(10)))
    assert [g.runs for g in twins.graphs] == [2]


def test_separate_parameters_are_taken_one_by_one() -> None:
    twins = Twins(ADAM, separate_parameters)
    twins.step(0, order=IN_ORDER)
    assert twins.row.layout == "list"
    assert twins.row.layout_reason == "'param' of neighbours is not adjacent"


def test_lamb_is_not_flat_for_its_norms() -> None:
    twins = Twins(lambda p: optimizers.NpuFusedLamb(p, lr=0.02), flat())
    twins.step(0, order=IN_ORDER)
    assert twins.row.layout == "list"
    assert "reduces over each tensor" in twins.row.layout_reason


def test_a_global_norm_over_runs() -> None:
    """A sum over all elements of all parameters is one over runs, too."""
    twins = Twins(lambda p: optimizers.NpuFusedLamb(p, lr=0.02, adam=True, use_global_grad_norm=True), flat())
    for k in range(3):
        twins.step(k, order=IN_ORDER, missing=(2,) if k == 2 else ())
    runs = [g.counts()["ReduceSum"] - 1 for g in twins.graphs]  # one adds up what the runs contribute
    assert runs == [1, 3]
    assert twins.row.layout == "flat + list"


# Layouts that are asked for ------------------------------------------------------------------------------------------


def test_one_by_one_on_request() -> None:
    twins = Twins(ADAM, flat(), layout="list")
    twins.step(0, order=IN_ORDER)
    assert (twins.row.layout, twins.row.layout_reason) == ("list", 'layout="list"')


def test_flat_where_it_is_not_possible() -> None:
    twins = Twins(ADAM, separate_parameters, strict=False, layout="flat")
    twins.step(0)
    assert (twins.row.layout, twins.row.layout_reason) == ("list", "'param' of neighbours is not adjacent")
    assert "layout list: 'param' of neighbours is not adjacent" in str(npu_fuse_pass.reports()[-1])
    before = [p.detach().clone() for p in twins.both[0]]
    torch._dynamo.reset()
    refused = Twins(ADAM, lambda: twins.both[0], layout="flat")
    with pytest.raises(Exception, match='strict=True and layout="flat" is not possible'):
        refused.step(0)
    assert all(map(torch.equal, before, twins.both[0]))


@pytest.mark.parametrize("parameters", [flat(4), lambda: separate_parameters(4)], ids=["flat", "separate"])
def test_a_stock_optimizer_asked_to_be_flat(parameters: Callable[[], Parameters]) -> None:
    """Its tensors are seen when it is first called, and so is that they are not adjacent."""
    twins = Twins(lambda p: torch.optim.SGD(p[:2], lr=0.1, foreach=False), parameters, layout="flat")
    if twins.both[0][0].untyped_storage().nbytes() == twins.both[0][0].nbytes:
        with pytest.raises(errors.UnfusedError, match="is not adjacent"):
            twins.step(0)
        return
    twins.step(0)
    twins.step(1)
    assert twins.row.layout == "gathered"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "foreach"}, r"layout='foreach'; allowed are \['auto', 'flat', 'list'\]"),
        ({"layout": "flat", "platform": "cpu"}, "layout with platform='cpu'"),
    ],
)
def test_wrong_layouts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        npu_fuse_pass.compile_step(ADAM(flat_parameters(2)), **options)


# What happens between steps ------------------------------------------------------------------------------------------


def test_groups_with_numbers_of_their_own() -> None:
    """Parameter groups are runs of their own, as their states are buffers of their own: any lr goes with one graph."""

    def set_lr(optimizer: Any, params: Parameters) -> None:
        optimizer.param_groups[1]["lr"] *= 25

    twins = Twins(lambda p: optimizers.NpuFusedAdamW([{"params": p[:2]}, {"params": p[2:]}], lr=0.02), flat())
    twins.step(0, order=IN_ORDER)
    assert twins.row.layout == "flat"
    alone = twins.row.launches
    for k in range(1, 4):
        twins.change(set_lr)
        twins.step(k, order=IN_ORDER)
    assert [g.runs for g in twins.graphs] == [4]
    assert twins.row.layout == "flat"
    assert twins.row.launches == alone


def test_step_counters_that_come_apart() -> None:
    def load(optimizer: Any, params: Parameters) -> None:
        saved = optimizer.state_dict()
        saved["state"][2]["step"] += 7
        optimizer.load_state_dict(saved)

    twins = Twins(ADAM, flat())
    twins.step(0, order=IN_ORDER)
    twins.change(load)
    twins.step(1, order=IN_ORDER)
    twins.step(2, order=IN_ORDER)
    assert [g.runs for g in twins.graphs] == [1, 2]
    assert twins.row.layout == "flat + list"
    assert twins.row.layout_reason == "the numbers of this step differ"


def test_missing_gradients() -> None:
    """Who had none is updated alone from then on, and the rest stays together; none at all changes nothing."""
    twins = Twins(ADAM, flat())
    for k, missing in enumerate([(), (1,), (), IN_ORDER, (1,), ()]):
        twins.step(k, order=IN_ORDER, missing=missing)
    assert [g.runs for g in twins.graphs] == [1, 5]
    assert twins.row.layout == "flat + list"
    assert twins.row.layout_reason == "without a gradient at some steps"


def test_gradients_that_come_and_go_do_not_compile_for_ever() -> None:
    twins = Twins(MAKE["SGD momentum"], flat(10))
    for k in range(20):
        twins.step(k, missing=(k % 10,))
    assert len(twins.graphs) <= 1 + replan._PLANS
    assert twins.row.layout == "list"


def reallocate(optimizer: Any, params: Parameters) -> None:
    params[2].data = params[2].data.clone()


def reallocate_all(optimizer: Any, params: Parameters) -> None:
    for p in params:
        p.data = p.data.clone()


def test_reallocated_parameters() -> None:
    """One of them leaves its run; when all have moved, all are alone."""
    twins = Twins(ADAM, flat())
    twins.step(0, order=IN_ORDER)
    twins.change(reallocate)
    twins.step(1, order=IN_ORDER)
    assert twins.row.layout == "flat + list"
    twins.change(reallocate_all)
    twins.step(2, order=IN_ORDER)
    assert twins.row.layout == "list"
    assert len(twins.graphs) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), errors.GraphRefused("refused")], ids=["Ctrl-C", "refused"])
def test_a_plan_whose_graph_is_not_made(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later step runs without one: it would advance counters alone. It makes the graph, or is refused as well."""
    twins = Twins(ADAM, flat())
    twins.step(0, order=IN_ORDER)
    twins.change(reallocate)
    before = [p.detach().clone() for p in twins.both[0]]

    def fails(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(program, "build", fails)
        for _ in range(2):
            with pytest.raises((KeyboardInterrupt, errors.UnfusedError)):
                twins.step(1, order=IN_ORDER)
    assert all(map(torch.equal, before, twins.both[0]))
    for k in range(1, 3):
        twins.step(k, order=IN_ORDER)
    assert [g.runs for g in twins.graphs] == [1, 2]
    assert twins.row.layout == "flat + list"


def test_memory_that_is_used_again() -> None:
    """The addresses are those of before, but each tensor has a storage of its own."""
    arenas = {}

    def parameters() -> Parameters:
        arena = bytearray(4 * 12)
        whole = torch.frombuffer(arena, dtype=torch.float32).copy_(torch.arange(12.0))
        params = [torch.nn.Parameter(whole[:5]), torch.nn.Parameter(whole[5:])]
        arenas[id(params)] = arena
        return params

    def replace(optimizer: Any, params: Parameters) -> None:
        arena, addresses = arenas[id(params)], [p.data_ptr() for p in params]
        params[0].data = torch.frombuffer(arena, dtype=torch.float32, count=5)
        params[1].data = torch.frombuffer(arena, dtype=torch.float32, offset=20)
        assert addresses == [p.data_ptr() for p in params]

    twins = Twins(ADAM, parameters)
    twins.step(0, order=(0, 1))
    assert twins.row.layout == "flat"
    twins.change(replace)
    twins.step(1, order=(0, 1))
    assert twins.row.layout == "list"


def test_the_rebuild_of_ddps_buckets() -> None:
    """Gradients are views of one bucket, then of another one in which they lie as they become ready."""
    twins = Twins(ADAM, flat())
    for k, order in enumerate([IN_ORDER, REVERSED, REVERSED, REVERSED]):
        twins.step(k, order=order)
    assert [g.runs for g in twins.graphs] == [1, 3]
    assert twins.row.layout == "gathered"


def test_gradients_that_become_adjacent() -> None:
    """A better plan is taken over in the first steps; after that a graph that fits stays."""
    for settled, wanted in ((1, "flat"), (6, "gathered")):
        twins = Twins(ADAM, flat())
        for k in range(settled):
            twins.step(k)
        twins.step(7, order=IN_ORDER)
        twins.step(8, order=IN_ORDER)
        assert twins.row.layout == wanted


def flattened(params: Parameters) -> Any:
    return optimizers.NpuFusedAdam(params, lr=0.02, flatten="params")


def test_flattened_parameters() -> None:
    twins = Twins(flattened, separate_parameters)
    twins.step(0, order=IN_ORDER)
    assert twins.row.layout == "flat"


def cast(optimizer: Any, params: Parameters) -> None:
    torch.nn.ParameterList(params).to(torch.float64)


def test_cast_parameters() -> None:
    """`module.to(dtype)` gives every parameter new memory."""
    for make, wanted in ((flattened, "gathered"), (ADAM, "list")):
        twins = Twins(make, separate_parameters)
        twins.step(0)
        twins.change(cast)
        twins.step(1)
        twins.step(2)
        assert (twins.row.dtype, twins.row.layout) == ("f64", wanted)


def test_late_unfreezing() -> None:
    def parameters() -> Parameters:
        found = separate_parameters()
        found[1].requires_grad_(False)
        return found

    twins = Twins(flattened, parameters)
    twins.step(0)
    assert (twins.row.updates, twins.row.layout) == (4, "gathered")
    twins.change(lambda _, params: params[1].requires_grad_(True))
    for k in range(1, 4):
        twins.step(k)
    assert (twins.row.updates, twins.row.layout) == (5, "gathered + list")  # its counter is behind
    assert twins.row.layout_reason == "the numbers of this step differ"


def test_an_added_group() -> None:
    def add(optimizer: Any, params: Parameters) -> None:
        new = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(2)]
        optimizer.add_param_group({"params": new, "lr": 0.5})
        params += new

    twins = Twins(flattened, separate_parameters)
    twins.step(0)
    twins.change(add)
    for k in range(1, 3):
        twins.step(k)
    assert (twins.row.updates, twins.row.layout) == (7, "gathered")
    assert twins.graphs[-1].counts()["ConcatV2"] == 2


def test_saved_and_loaded() -> None:
    """Loading a state dict of flat storage keeps the plan."""

    def reload(optimizer: Any, params: Parameters) -> None:
        optimizer.load_state_dict(npu_fuse_pass.compact(optimizer.state_dict()))

    twins = Twins(flattened, separate_parameters)
    twins.step(0, order=IN_ORDER)
    twins.change(reload)
    twins.step(1, order=IN_ORDER)
    assert [g.runs for g in twins.graphs] == [2]
    assert twins.row.layout == "flat"


# These tests can fail ------------------------------------------------------------------------------------------------

PLANTED: dict[str, tuple[tuple[Any, str, Any], Callable[[], None]]] = {
    "gradients in another order are taken as they lie": (
        (npu_layout, "gaps", lambda *_: iter(())),
        test_separate_parameters_are_taken_one_by_one,
    ),
    "moved tensors are not noticed": (
        (replan.Replanner, "_in_place", lambda *_: True),
        test_the_rebuild_of_ddps_buckets,
    ),
    "different numbers are not noticed": (
        (replan.Replanner, "_equal", lambda *_: True),
        test_step_counters_that_come_apart,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (owner, attribute, wrong), test = PLANTED[name]
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises((AssertionError, RuntimeError, errors.FuseError)):
        test()


def test_the_table_of_layouts() -> None:
    """scripts/npu_layouts.py, for one optimizer and as many parameters as can be seen at a glance."""
    _, _, line = npu_layouts.table(["SGD, momentum"], [2])
    assert line == "| SGD, momentum | 2, 20 B | 3, 28 B | 3, 20 B | 15, 60 B |"
