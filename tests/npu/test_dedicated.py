"""Dedicated GE operations: which groups take one, what it computes, and that the table holds what it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import harness
import kernels as ge_kernels
import pytest
import torch
from steps import OnNpu, assert_close, assert_same, parameters, set_gradients, step_both, twins

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.emit import dedicated_operations, elementwise, list_operations
from npu_fuse_pass.match import known_kernels
from npu_fuse_pass.rules.clipping import older_than
from npu_fuse_pass.tolerances import PROMISED
from tests.support.cases import BY_NAME

ADAM, ADAMW, AMSGRAD, MOMENTUM = "AdamApplyOneAssign", "ApplyAdamW", "ApplyAdamWithAmsgradV2", "FusedMulApplyMomentum"
SHAPES = [(4, 5), (3,), (2, 1, 6), (3,)]


# torch's optimizers: what they become in mode "auto" and in mode "dedicated", with the GE operations per parameter.
Counts = dict[str, int]
STOCK: dict[str, tuple[Callable[..., Any], dict[str, Any], Counts, Counts]] = {
    "adam": (torch.optim.Adam, {}, {ADAM: 1}, {ADAM: 1}),
    "adam_l2": (torch.optim.Adam, dict(weight_decay=0.1), {"Mul": 1, "Add": 1, ADAM: 1}, {"Mul": 1, "Add": 1, ADAM: 1}),
    "adam_maximize": (torch.optim.Adam, dict(maximize=True), {"Neg": 1, ADAM: 1}, {"Neg": 1, ADAM: 1}),
    "adamw": (torch.optim.AdamW, {}, {"Mul": 1, ADAM: 1}, {ADAMW: 1}),
    "amsgrad": (torch.optim.Adam, dict(amsgrad=True), {}, {AMSGRAD: 1}),
    "adamw_amsgrad": (torch.optim.AdamW, dict(amsgrad=True), {}, {"Mul": 1, AMSGRAD: 1}),
    "sgd": (torch.optim.SGD, dict(momentum=0.9), {MOMENTUM: 1}, {MOMENTUM: 1}),
    "sgd_dampening": (torch.optim.SGD, dict(momentum=0.9, dampening=0.3), {MOMENTUM: 1}, {MOMENTUM: 1}),
    "sgd_l2_nesterov": (
        torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1),
        {"Mul": 1, "Add": 1, MOMENTUM: 1}, {"Mul": 1, "Add": 1, MOMENTUM: 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("foreach", "kernels_option"), [(False, "auto"), (True, "auto"), (True, "dedicated")])
@pytest.mark.parametrize("name", STOCK)
def test_stock_optimizers(name: str, foreach: bool, kernels_option: str, ge: harness.Recording) -> None:
    make, options, *expected = STOCK[name]
    if name == "sgd_dampening" and not foreach and older_than((2, 12)):
        pytest.skip("there Dynamo multiplies the gradient ahead of add(alpha=...), which rounds once more")
    both = [parameters(shapes=SHAPES) for _ in range(2)]
    ours, eager = (make(params, lr=0.02, foreach=foreach, **options) for params in both)
    chosen = {"platform": "npu", "strict": True, "kernels": kernels_option}
    step = torch.compile(ours.step, backend=npu_fused, options=chosen)
    step_both(ours, eager, step, 4)
    last = ge.graphs[-1].counts()
    counts = expected[kernels_option == "dedicated"]
    [row] = npu_fuse_pass.reports()[-1].groups
    for operation, count in counts.items():
        assert last[operation] == count * len(SHAPES)
    assert sum(g.runs for g in ge.graphs) == 4
    if counts:
        assert len(ge.graphs[-1].compute_ops()) == sum(counts.values()) * len(SHAPES) + 2  # and Reshape, Unpack
        assert row.kernel == row.note.split(",")[0] == next(reversed(counts))
        assert row.launches == sum(counts.values()) * len(SHAPES)
    else:
        assert row.kernel == list_operations.KERNEL
        assert AMSGRAD in row.note and "1.3e-5" in row.note
    for p, q in zip(*both, strict=True):
        assert_close(p, q, 2e-6)  # compiled, stock Adam is capturable: another order of its bias corrections
        for state, value in eager.state[q].items():
            second = state in ("exp_avg_sq", "max_exp_avg_sq") and row.kernel in (ADAMW, AMSGRAD)
            assert_close(ours.state[p][state].float(), value.float(), 2e-5 if second else 1e-6)


def rounded_gradient(p: Any, buf: Any, grad: Any) -> None:
    buf.mul_(0.9).add_(grad.bfloat16().to(p.dtype))
    p.sub_(buf, alpha=0.1)


def rounded_state(p: Any, buf: Any, grad: Any) -> None:
    buf.mul_(0.9).add_(grad.to(buf.dtype))
    p.sub_(buf.to(p.dtype), alpha=0.1)


@pytest.mark.parametrize(
    ("update", "dtype", "stored"),
    [
        (rounded_gradient, torch.float32, torch.float32),
        (rounded_gradient, torch.float16, torch.float16),
        (rounded_state, torch.float32, torch.bfloat16),
        (rounded_state, torch.float32, torch.float16),
    ],
)
def test_roundings_of_the_step_are_kept(
    update: Callable[..., None], dtype: torch.dtype, stored: torch.dtype, ge: harness.Recording
) -> None:
    """In exact arithmetic these are momentum; in numbers they are 2**-9 from it."""
    both = [[torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)] for _ in range(2)]
    for tensors in both:
        tensors.append(torch.zeros_like(tensors[0], dtype=stored))
    step = torch.compile(
        lambda *args: [update(*row) for row in zip(*args, strict=True)] and None,
        backend=npu_fused,
        options={"platform": "npu", "strict": True},
    )
    for k in range(3):
        grad = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(k + 1)).to(dtype)
        step(*(list(t) for t in (*both[0], grad)))
        for row in zip(*both[1], grad, strict=True):
            update(*row)
    for got, wanted in zip(*both, strict=True):
        assert_close(got, wanted, 1e-6 if got.dtype == torch.float32 else 2**-9)
    [row] = npu_fuse_pass.reports()[-1].groups
    assert "rounds to half precision" in row.note and row.kernel != MOMENTUM


def overwrites_buffer(p: Any, buf: Any, grad: Any) -> None:
    buf.copy_(grad)
    p.sub_(buf, alpha=0.1)


def test_a_tensor_that_is_overwritten_is_not_read(ge: harness.Recording) -> None:
    """In exact arithmetic it is momentum times 0; what lay in the buffer may be NaN, as in torch.empty."""
    param, grad = torch.ones(3), torch.tensor([1.0, 2.0, torch.inf])
    buf = torch.full((3,), torch.nan)
    torch.compile(overwrites_buffer, backend=npu_fused, options={"platform": "npu", "strict": True})(param, buf, grad)
    assert torch.equal(buf, grad)
    assert_close(param[:2], torch.tensor([0.9, 0.8]), 1e-6)
    [row] = npu_fuse_pass.reports()[-1].groups
    assert "overwrites" in row.note and row.kernel != MOMENTUM


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_infinite_first_gradient(nesterov: bool, ge: harness.Recording) -> None:
    """SGD makes its buffer in the first step; after it, it has a dedicated operation."""
    both = [[torch.nn.Parameter(torch.ones(3))] for _ in range(2)]
    ours, eager = (torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False) for p in both)
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "strict": True})
    for _ in range(2):
        for (p,) in both:
            p.grad = torch.tensor([1.0, -2.0, torch.inf])
        step()
        eager.step()
        torch.testing.assert_close(*(p for (p,) in both))
        torch.testing.assert_close(*(o.state[o.param_groups[0]["params"][0]] for o in (ours, eager)))
    assert ge.graphs[-1].counts()[MOMENTUM] == 1


@pytest.mark.parametrize("chosen", ["auto", "elementwise"])
def test_float16_where_eager_is_not_finite(chosen: str, ge: harness.Recording) -> None:
    """Eager AdamW divides by 0 in float16, whose eps is 0; a dedicated operation computes in float32."""
    both = [[torch.nn.Parameter(torch.tensor([0.5, -2.0, 1.0]).half())] for _ in range(2)]
    ours, eager = (torch.optim.AdamW(p, lr=0.02, foreach=False) for p in both)
    for (p,) in both:
        p.grad = torch.tensor([0.1, 1e-3, 0.0]).half()
    torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "strict": True, "kernels": chosen})()
    eager.step()
    (got,), (wanted,) = both
    assert wanted[1] == -torch.inf and wanted[2].isnan()
    if chosen == "elementwise":
        torch.testing.assert_close(got, wanted, equal_nan=True)
    else:
        assert got.isfinite().all() and ge.graphs[-1].counts()[ADAM] == 1


# Our classes, with options as in tests/support/cases.py; bytes per element in float32.
OURS: dict[str, tuple[tuple[str, int], tuple[str, int]]] = {
    "sgd_momentum": ((MOMENTUM, 40), (MOMENTUM, 40)),
    "adam": ((ADAM, 48), (ADAM, 48)),
    "adam_amsgrad": ((list_operations.KERNEL, 168), (AMSGRAD, 56)),
    "adamw": ((ADAM, 36), (ADAMW, 28)),
}


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
@pytest.mark.parametrize("chosen", ["auto", "dedicated"])
@pytest.mark.parametrize("name", OURS)
def test_five_steps(name: str, chosen: str, dtype: torch.dtype) -> None:
    """Numbers change every step and the graph is converted once."""
    ours, eager = twins(BY_NAME[name], dtype)
    with harness.record() as graphs:
        on_npu = None
        for k in range(5):
            for optimizer in (ours, eager):
                set_gradients(optimizer.param_groups[0]["params"], k)
                optimizer.param_groups[0]["lr"] *= 0.9
            on_npu = on_npu or OnNpu(ours, chosen)
            on_npu.step()
            eager.step()
    [lowered] = on_npu.program.groups
    kernel, size = OURS[name][chosen == "dedicated"]
    in_lists = kernel == list_operations.KERNEL and dtype != torch.float32
    kernel = "GE elementwise" if dtype == torch.float64 or in_lists else kernel
    assert lowered.kernel == kernel
    assert lowered.layout.bytes_per_element == size or dtype != torch.float32
    assert [g.runs for g in graphs] == [5]
    assert set(graphs[0].counts()) <= set(elementwise.DOCUMENTS)
    rounds = kernel in (ADAMW, AMSGRAD) and dtype == torch.float32
    assert_same(ours, eager, 2e-5 if rounds else PROMISED[dtype])


def test_a_hundred_steps_against_float64() -> None:
    """What rounding 1 - beta2 costs, and that the default does not pay it: errors relative to the largest element."""
    found = {}
    for chosen in ("auto", "dedicated"):
        ours, eager, exact = (BY_NAME["adamw"].build(parameters(d)) for d in (torch.float32,) * 2 + (torch.float64,))
        for p, q in zip(exact.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
            p.data = q.detach().double().clone(memory_format=torch.preserve_format)
        on_npu = None
        for k in range(100):
            for optimizer in (ours, eager, exact):
                set_gradients(optimizer.param_groups[0]["params"], k)
            for p, q in zip(exact.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
                p.grad = q.grad.double()
            on_npu = on_npu or OnNpu(ours, chosen)
            on_npu.step()
            eager.step()
            exact.step()
        for name, optimizer in {chosen: ours, "eager": eager}.items():
            found[name] = [error(optimizer, exact, state) for state in (None, "exp_avg", "exp_avg_sq")]
    assert all(a <= 2 * b for a, b in zip(found["auto"], found["eager"], strict=True))
    assert found["dedicated"][0] < 1e-5
    assert found["dedicated"][1] < 1e-6
    assert 1e-5 < found["dedicated"][2] < 1.5e-5


def error(optimizer: Any, exact: Any, state: str | None) -> float:
    worst = 0.0
    for p, q in zip(optimizer.param_groups[0]["params"], exact.param_groups[0]["params"], strict=True):
        got, wanted = (p, q) if state is None else (optimizer.state[p][state], exact.state[q][state])
        if got.numel():
            worst = max(
                worst, float((got.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())
            )
    return worst


def test_numbers_that_change_reuse_the_graph(ge: harness.Recording) -> None:
    ours, eager = twins(BY_NAME["adamw"])
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "strict": True})
    changes: list[dict[str, Any]] = [{}, {"lr": 0.5}, {"betas": (0.5, 0.75)}, {"weight_decay": 0.0}, {"eps": 1e-3}]
    for k, change in enumerate(changes):
        for optimizer in (ours, eager):
            set_gradients(optimizer.param_groups[0]["params"], k)
            optimizer.param_groups[0].update(change)
        step()
        eager.step()
    assert [g.runs for g in ge.graphs] == [len(changes)]
    assert ge.graphs[0].counts()[ADAM] == len([p for p in ours.param_groups[0]["params"] if p.numel()])
    assert len(npu_fuse_pass.reports()) == 1
    assert_same(ours, eager, 1e-6)


# Adjacent parameters and gradients: GE operations of a step for any number of parameters, and bytes per element.
FLAT: list[tuple[str, str, int, int]] = [
    ("adam", "auto", 5, 48),
    ("adamw", "auto", 4, 36),
    ("adamw", "dedicated", 3, 28),
    ("sgd_momentum", "auto", 5, 40),
]


@pytest.mark.parametrize(("name", "chosen", "operations", "size"), FLAT)
@pytest.mark.parametrize("count", [1, 40])
def test_flat_layouts(name: str, chosen: str, operations: int, size: int, count: int, ge: harness.Recording) -> None:
    def build() -> tuple[Any, torch.Tensor]:
        memory, gradients = torch.linspace(-1, 1, 6 * count), torch.zeros(6 * count)
        params = [torch.nn.Parameter(part.view(2, 3)) for part in memory.split(6)]
        for p, part in zip(params, gradients.split(6), strict=True):
            p.grad = part.view(2, 3)
        return BY_NAME[name].build(params), gradients

    (ours, given), (eager, wanted) = build(), build()
    options = {"platform": "npu", "strict": True, "layout": "flat", "kernels": chosen}
    step = torch.compile(ours.step, backend=npu_fused, options=options)
    for k in range(3):
        for gradients in (given, wanted):
            gradients.copy_(torch.randn(gradients.shape, generator=torch.Generator().manual_seed(k)))
        step()
        eager.step()
    assert [g.runs for g in ge.graphs] == [3]
    assert len(ge.graphs[0].compute_ops()) == operations
    [row] = npu_fuse_pass.reports()[-1].groups
    assert row.bytes_per_element == npu_fuse_pass.reports()[-1].bytes_per_element["after"] == size
    assert row.layout == ("flat" if count > 1 else "list")
    assert row.launches == operations - 2  # without Reshape and Unpack of the numbers
    assert_same(ours, eager, 2e-5 if chosen == "dedicated" else 1e-6)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Ascend910B2", dedicated_operations.A2),
        ("Ascend910B4-1", dedicated_operations.A2),
        ("Ascend910_9391", dedicated_operations.A3),
        ("Ascend910ProB", dedicated_operations.TRAINING),
        ("Ascend910B", dedicated_operations.TRAINING),
        ("Ascend310P3", None),
        ("Ascend950", None),
        ("", None),
    ],
)
def test_chips(name: str, family: str | None, ge: harness.Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no document names the chip, the elementwise form runs and the report says so."""
    import torch_npu

    monkeypatch.setattr(torch_npu.npu, "get_device_name", lambda *_: name)
    assert dedicated_operations.series(name) == family
    ours, _ = twins(BY_NAME["adam"])
    set_gradients(ours.param_groups[0]["params"], 0)
    torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "strict": True})()
    [row] = npu_fuse_pass.reports()[-1].groups
    assert (row.kernel == ADAM) == (family is not None)
    assert (ADAM in ge.graphs[0].counts()) == (family is not None)
    assert ("no document used here names this chip" in row.note) == (family is None)


def test_elementwise_on_request_and_other_values(ge: harness.Recording) -> None:
    ours, _ = twins(BY_NAME["adam"])
    set_gradients(ours.param_groups[0]["params"], 0)
    torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "kernels": "elementwise"})()
    assert ADAM not in ge.graphs[0].counts()
    assert npu_fuse_pass.reports()[-1].groups[0].note == 'kernels="elementwise"'
    empty = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(
        npu_fuse_pass.OptionError, match=r"kernels='fast'; allowed are \['auto', 'generated', 'operations', 'dedicated'"
    ):
        npu_fused(empty, [], options={"kernels": "fast"})


# The table itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", dedicated_operations.OPERATIONS, ids=lambda o: o.name)
def test_a_row_of_the_table(operation: dedicated_operations.Operation) -> None:
    """Its inputs and outputs are those of the prototype, its function is the interpreter's, and its arguments make it
    compute the kernels that it says; in float64, so that nothing but the algebra counts.
    """
    harness.prepare()
    from torchair._ge_concrete_graph import ge_apis

    prototype = (getattr(ge_apis, operation.name).__doc__ or "").splitlines()
    inputs = [line.split("(")[1].split(",")[0] for line in prototype if ".INPUT(" in line]
    optional = [line.split("(")[1].split(",")[0] for line in prototype if ".OPTIONAL_INPUT(" in line]
    outputs = [line for line in prototype if ".OUTPUT(" in line]
    assert (*inputs, *optional) == (*operation.inputs, *operation.absent)
    assert len(outputs) == len(operation.outputs)
    assert operation.name not in dedicated_operations.UNUSED
    assert operation.name in elementwise.DOCUMENTS and operation.name in ge_kernels.KERNELS
    for kernel in (k for k in known_kernels.KERNELS if k.name in operation.arguments):
        generator = torch.Generator().manual_seed(3)
        values = {n: torch.rand(7, generator=generator, dtype=torch.float64) for n in kernel.inputs}
        values |= {n: torch.rand((), generator=generator, dtype=torch.float64) / 2 for n in kernel.scalars}
        arguments = operation.arguments[kernel.name](values, torch.tensor(1.0, dtype=torch.float64))
        attributes = dict.fromkeys(operation.attributes.get(kernel.name, ()), True)
        got = operation.function(*(arguments[name] for name in operation.inputs), **attributes)
        tensors = [values[n] for n in kernel.inputs]
        wanted = kernel.function(*tensors, **{n: values[n] for n in kernel.scalars})
        by_name = dict(zip(kernel.outputs, wanted, strict=True))
        for name, value in zip(operation.outputs, got, strict=True):
            torch.testing.assert_close(value, by_name[name], rtol=1e-12, atol=0)


def test_deprecated_forms_are_not_used() -> None:
    used = {o.name for o in dedicated_operations.OPERATIONS}
    assert not any(name.startswith("Apply") and name.endswith("D") for name in used)
    assert all(dedicated_operations.UNUSED.values())
    found = {k.name: dedicated_operations.candidates(k.name, "dedicated") for k in known_kernels.KERNELS}
    assert {name for name, made in found.items() if isinstance(made, str)} == {"rmsprop", "centered_rmsprop"}


# Two inputs of an operation that are exchanged: an error that the tests of this file must notice.
PLANTED = {
    ADAM: ("adam", "mul3_x", "mul1_x"),
    ADAMW: ("adamw", "beta1_power", "beta2_power"),
    AMSGRAD: ("adam_amsgrad", "m", "v"),
    MOMENTUM: ("sgd_momentum", "lr", "momentum"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, a, b = PLANTED[name]

    def exchanged(arguments: Callable[[Any, Any], dict[str, Any]]) -> Callable[[Any, Any], dict[str, Any]]:
        def changed(k: Any, one: Any) -> dict[str, Any]:
            made = arguments(k, one)
            return {**made, a: made[b], b: made[a]}

        return changed

    row = next(o for o in dedicated_operations.OPERATIONS if o.name == name)
    wrong = dataclasses.replace(row, arguments={k: exchanged(f) for k, f in row.arguments.items()})
    rows = tuple(wrong if o is row else o for o in dedicated_operations.OPERATIONS)
    monkeypatch.setattr(dedicated_operations, "OPERATIONS", rows)
    with pytest.raises(AssertionError, match="off by"):
        test_five_steps(case, "dedicated", torch.float32)
    with pytest.raises(AssertionError):
        test_a_row_of_the_table(wrong)
