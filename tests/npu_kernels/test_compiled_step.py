"""`torch.compile(opt.step, backend="npu_fused")` with generated kernels, through the real torchair.

A group is one GE node; the interpreter of GE graphs runs it by executing the compiler's last IR. What is refused, at
whatever stage, steps down to GE operations and then to the original, which start from what nothing has changed.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(pathlib.Path(__file__).parent.parent / "npu"))

import harness
import kernels
import placement
from interpreter import Node

import npu_fuse_pass
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu.graph import generated
from npu_fuse_pass.lowerings.npu.kernels import ascend, compiler, groups, proof
from npu_fuse_pass.report.report import CompileReport
from npu_fuse_pass.tools.selftest import cases, parity, session
from npu_fuse_pass.tools.selftest.report import Report
from tests.npu_kernels import steps, test_states
from tests.npu_kernels.executed import Cores
from tests.npu_kernels.steps import ALL, Step, parameters, set_gradients
from tests.npu_kernels.test_executed import assert_close
from tests.support.torch_rules import STOCK
from tests.support.training import heard

SIZES = (1, 7, 2049, 363, *[1, 7] * 12)
BY_NAME = {step.name: step for step in ALL}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of proofs, and of what ran last, are this test's own; the compiler's results are kept in memory."""
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def ge(monkeypatch: pytest.MonkeyPatch) -> Iterator[harness.Recording]:
    """GE's graphs; nodes of generated kernels call back."""
    monkeypatch.setitem(kernels.KERNELS, generated.TYPE, called_back)
    npu_fuse_pass.clear_reports()
    torch._dynamo.reset()
    with harness.record() as recording:
        yield recording
    torch._dynamo.reset()


def called_back(node: Node) -> list[Tensor]:
    """As GE: on copies here, which torchair's outputs are written back from."""
    *tensors, numbers = (t.clone() for t in node.tensors())
    written, read = tensors[: len(node.op.output_desc)], tensors[len(node.op.output_desc) :]
    addresses = [[t.data_ptr() for t in given] for given in (written, read)]
    generated.call(node.op.attr["kernel"].s.decode(), *addresses, numbers.data_ptr())
    return written


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    """The hardware of this machine."""
    made = Cores(chunk=1024, calls_back=True)
    monkeypatch.setattr(ascend, "current", lambda: made)
    return made


def triple(step: Step, dtype: torch.dtype = torch.float32) -> list[Any]:
    """An optimizer to be compiled, the same eager, and in float64."""
    return [step.build([torch.nn.Parameter(p.detach().to(d)) for p in parameters(SIZES, dtype)])
            for d in (dtype, dtype, torch.float64)]  # fmt: skip


def train(opts: Sequence[Any], count: int, missing: Sequence[Sequence[int]] = ((),), **options: Any) -> list[str]:
    """Steps of all, the first one compiled; what was warned."""
    return train_by(
        torch.compile(opts[0].step, backend=npu_fused, options={"platform": "npu", **options}), opts, count, missing
    )


def train_by(
    step: Callable[[], object], opts: Sequence[Any], count: int, missing: Sequence[Sequence[int]] = ((),)
) -> list[str]:
    """As `train`; `step` is the first one's."""
    with heard() as said:
        for k in range(count):
            for opt in opts:
                set_gradients(opt.param_groups[0]["params"], k, missing[k % len(missing)])
            step()
            for opt in opts[1:]:
                opt.step()
    return said


def assert_same(opts: Sequence[Any]) -> None:
    if hasattr(opts[0], "_prelude"):
        opts[0]._prelude.expose_states()
    assert_close(*(steps.tensors(opt) for opt in opts))


def report() -> CompileReport:
    return [r for r in npu_fuse_pass.reports() if r.groups][-1]  # type: ignore[no-any-return]


ONE_NODE = (
    "adamw",
    "lamb",
    "lamb_global",
    "rmsprop_tf_momentum",
    "AdamW foreach",
    "SGD nesterov decay loop",
    "NovoGrad",
)


@pytest.mark.parametrize("name", ONE_NODE)
def test_a_group_is_one_node(name: str, ge: harness.Recording, cores: Cores) -> None:
    opts = triple(BY_NAME[name])
    with placement.watched() as given:
        said = train(opts, 4, kernels="generated", strict=True)
    assert_same(opts)
    assert not said
    assert [op.type for op in ge[-1].compute_ops()] == [generated.TYPE]
    (op,) = ge[-1].compute_ops()
    assert {d.name.rstrip("0123456789") for d in op.output_desc} == {"written"}
    assert {d.name for d in op.output_desc} < {d.name for d in op.input_desc}
    (row,) = report().groups
    assert (row.lowering, row.kernel) == ("npu", "generated NPU kernel")
    assert op.name == f"{row.name}/{generated.TYPE}"
    assert {g.kernel for r in npu_fuse_pass.reports() for g in r.groups} == {
        "generated NPU kernel"
    }  # the first step, too
    assert len(cores.launched) >= 4 * row.launches
    assert "accepted by the compiler for Ascend910B3" in row.note and "not proved on this machine" in row.note
    assert f"{row.bytes_per_element} bytes per element counted" in row.note
    tensors = [t for t in given[-1].inputs if t is not given[-1].inputs[-1]]
    placed = placement.placed(given[-1], tensors)
    assert len(placed.in_place) == len(op.output_desc) and len(placed.host) == 1


@pytest.mark.parametrize("name", STOCK)
def test_a_class_of_torch_as_a_rule(name: str, ge: harness.Recording, cores: Cores) -> None:
    opts = triple(Step(name, STOCK[name]))
    step = npu_fuse_pass.compile_step(opts[0], platform="npu", kernels="generated", strict=True)
    assert not train_by(step, opts, 4, ((), (1,)))
    assert_same(opts)
    (row,) = report().groups
    assert report().replaces == f"torch.optim.{type(opts[0]).__name__}" and row.kernel == "generated NPU kernel"
    assert len(cores.launched) == 4


@pytest.mark.parametrize("name", ["lamb", "lamb_global"])
def test_another_default_dtype(name: str, ge: harness.Recording, cores: Cores) -> None:
    """Where kernels leave their parts of totals is float32, whatever torch.set_default_dtype says."""
    opts = triple(BY_NAME[name])
    torch.set_default_dtype(torch.float16)
    try:
        said = train(opts, 3, kernels="generated", strict=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(opts)
    assert not said
    (row,) = report().groups
    assert (row.lowering, row.kernel) == ("npu", "generated NPU kernel")


def test_a_norm_of_clipped_gradients_is_one_node(ge: harness.Recording, cores: Cores) -> None:
    opts = triple(BY_NAME["lamb_global"])

    def tail(opt: Any) -> Callable[[], None]:
        def step() -> None:
            torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1.0)
            opt.step()

        return step

    first, *others = map(tail, opts)
    compiled = torch.compile(
        first, backend=npu_fused, options={"platform": "npu", "kernels": "generated", "strict": True}
    )
    for k in range(3):
        for opt in opts:
            set_gradients(opt.param_groups[0]["params"], k)
        for step in (compiled, *others):
            step()
    assert_same(opts)
    assert [op.type for op in ge[-1].compute_ops()] == [generated.TYPE]
    (row,) = report().groups
    assert (row.kernel, row.launches) == ("generated NPU kernel", 4)


@pytest.mark.parametrize("case", test_states.CASES, ids=str)
def test_states_that_follow_from_tensors_are_in_the_node(
    case: test_states.Case, ge: harness.Recording, cores: Cores
) -> None:
    options = {"platform": "npu", "kernels": "generated", "strict": True}
    backend = functools.partial(npu_fused, options=options)
    ours, eager, exact = (
        test_states.train(case, b, d, SIZES, infinite=2 if case.skips else None)
        for b, d in ((backend, torch.float32), (None, torch.float32), (None, torch.float64))
    )
    assert_close(ours, eager, exact)
    assert [op.type for op in ge[-1].compute_ops()] == [generated.TYPE]
    assert ge[-1].runs == 4
    assert {row.kernel for row in report().groups} == {"generated NPU kernel"}


def test_a_norm_that_is_returned(ge: harness.Recording, cores: Cores) -> None:
    found = []
    for compiled in (True, False):
        params = parameters(SIZES)

        def tail() -> Tensor:
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0)  # noqa: B023
            with torch.no_grad():
                torch._foreach_add_(params, [p.grad for p in params], alpha=-0.1)  # noqa: B023
            return norm

        options = {"platform": "npu", "kernels": "generated", "strict": True}
        call = torch.compile(tail, backend=npu_fused, options=options, fullgraph=True) if compiled else tail
        norms = []
        for k in range(3):
            set_gradients(params, k)
            norms.append(call())
        found.append([*params, *norms])
    assert [op.type for op in ge[-1].compute_ops()] == [generated.TYPE] and ge[-1].runs == 3
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_states_step_down_to_the_original(ge: harness.Recording, cores: Cores) -> None:
    cores.failing["write"] = PLANTED
    opts = triple(BY_NAME["NovoGrad"])
    said = train(opts, 3, kernels="generated")
    for a, b in zip(*(steps.tensors(opt) for opt in opts[:2]), strict=True):
        assert torch.equal(a, b)
    (text,) = said
    assert "EZ9999: planted" in text and "0-dim state is computed from a tensor" in text


def test_counters_in_host_memory_after_found_inf(ge: harness.Recording, cores: Cores) -> None:
    """No kernel writes there, nor float64: a step of ours that is skipped on the device is the original's."""
    params = parameters(SIZES)
    opt = BY_NAME["adamw"].build(params)
    opt.found_inf, scale = torch.zeros(()), torch.tensor(0.5)

    def tail() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_([p.grad for p in params], opt.found_inf, scale)
        opt.step()

    set_gradients(params, 0)
    with pytest.warns(UserWarning, match="0-dim state is computed from a tensor"):
        torch.compile(tail, backend=npu_fused, options={"platform": "npu", "kernels": "generated"}, fullgraph=True)()
    assert "'step' follows from tensors, and is stored in torch.float64" in str(npu_fuse_pass.reports()[-1].fallback)


def test_missing_gradients(ge: harness.Recording, cores: Cores) -> None:
    opts = triple(BY_NAME["lamb_global"])
    train(opts, 5, missing=((), (0, 3), (1, 2), (3,), ()), kernels="generated", strict=True)
    assert_same(opts)


def at_odd_address(t: Tensor) -> Tensor:
    memory = bytearray(1 + t.numel() * t.element_size())
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).copy_(t.detach())


@pytest.mark.parametrize("of_parameter", [True, False], ids=["parameter", "gradient"])
def test_an_address_that_is_no_multiple_of_the_element_size(
    of_parameter: bool, ge: harness.Recording, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels count addresses in elements: they get a copy."""
    cores.calls_back = False
    opts = triple(BY_NAME["adamw"])
    if of_parameter:
        p = opts[0].param_groups[0]["params"][2]
        p.data = at_odd_address(p)

    def gradients(params: Sequence[torch.nn.Parameter], k: int, missing: Sequence[int]) -> None:
        steps.set_gradients(params, k, missing)
        if not of_parameter and k in (2, 3):
            params[2].grad = at_odd_address(params[2].grad)

    monkeypatch.setattr(sys.modules[__name__], "set_gradients", gradients)
    train(opts, 5, kernels="generated", strict=True)
    assert_same(opts)
    assert len(cores.launched) == 5 and {row.kernel for row in report().groups} == {"generated NPU kernel"}


def test_a_step_that_launches_by_itself(ge: harness.Recording, cores: Cores) -> None:
    """Where GE has no callbacks, there is no graph; the step is the same."""
    cores.calls_back = False
    opts = triple(BY_NAME["adamw"])
    train(opts, 3, kernels="generated", strict=True)
    assert_same(opts)
    assert not ge.graphs and len(cores.launched) == 3


def test_float64_keeps_ge_operations_beside_kernels(ge: harness.Recording, cores: Cores) -> None:
    for calls_back in (True, False):
        cores.calls_back = calls_back
        torch._dynamo.reset()
        params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(7, dtype=torch.float64))]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        opts = [BY_NAME["adamw"].build(p) for p in (params, twins)]
        train(opts, 2, kernels="generated")
        torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)
        rows = {row.dtype: row for row in report().groups}
        assert (rows["f32"].kernel == "generated NPU kernel") == calls_back
        assert rows["f64"].kernel != "generated NPU kernel"
        assert "the vector unit has no float64" in rows["f64"].note
        assert calls_back or "all of a step's groups have to be kernels" in rows["f32"].note


def in_one_buffer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values as parts of one buffer, between which one element belongs to nobody."""
    buffer = torch.full((sum(t.numel() + 1 for t in tensors),), 77.0)
    parts = buffer.split([n for t in tensors for n in (t.numel(), 1)])[::2]
    for part, t in zip(parts, tensors, strict=True):
        part.copy_(t.detach().flatten())
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


@pytest.mark.parametrize("name", ["AdamW foreach", "lamb_global"])
def test_tensors_that_are_parts_of_one_buffer(name: str, ge: harness.Recording, cores: Cores) -> None:
    opts = triple(BY_NAME[name])
    train(opts, 2, kernels="generated", strict=True)
    params, state = opts[0].param_groups[0]["params"], opts[0].state
    whole = [(p, key) for p in params for key, t in state[p].items() if isinstance(t, Tensor) and t.shape == p.shape]
    parts = in_one_buffer([*params, *(state[p][key] for p, key in whole)])
    for p, part in zip(params, parts, strict=False):
        p.data = part
    for (p, key), part in zip(whole, parts[len(params) :], strict=True):
        state[p][key] = part
    before = len(cores.launched)
    said = train(opts, 3, kernels="generated", strict=True)
    assert not said and len(cores.launched) > before
    assert report().groups[0].kernel == "generated NPU kernel"
    assert_same(opts)
    assert parts[0].untyped_storage().data_ptr() == opts[0].param_groups[0]["params"][-1].untyped_storage().data_ptr()
    free = torch.tensor([], dtype=torch.float32).set_(parts[0].untyped_storage())
    assert int((free == 77).sum()) == len(parts)  # what lies between is as it was


def test_parts_that_overlap_are_the_original_s(ge: harness.Recording, cores: Cores) -> None:
    opts = triple(BY_NAME["adamw"])
    train(opts, 2, kernels="generated", strict=True)
    for opt in opts:
        params = opt.param_groups[0]["params"]
        params[1].data = params[2].data[1:8]
    before = len(cores.launched)
    said = train(opts, 2, kernels="generated")
    assert len(cores.launched) == before
    assert any("share memory" in text for text in said) and "share memory" in str(npu_fuse_pass.reports()[-1].fallback)
    for p, q in zip(opts[0].param_groups[0]["params"], opts[1].param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # two steps were by kernels


STAGES = ("generation", "compile", "load", "conversion", "callback", "GE's load", "launch", "write")
PLANTED = RuntimeError("EZ9999: planted")


def fail(stage: str, ge: harness.Recording, cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a stage of the generated form fail, and no other form."""
    if stage == "generation":

        def refuse(*args: Any) -> Any:
            raise compiler.Refused("EZ9999: planted")

        monkeypatch.setattr(groups, "generate_group", refuse)
    elif stage == "conversion":
        from torchair._ge_concrete_graph import compat_ir

        make = compat_ir.ge_op

        def refuse_ours(op_type: str, *args: Any, **given: Any) -> Any:
            if op_type == generated.TYPE:
                raise PLANTED
            return make(op_type, *args, **given)

        monkeypatch.setattr(compat_ir, "ge_op", refuse_ours)
    elif stage == "callback":
        monkeypatch.setattr(ascend, "calls_back", lambda: True)  # and GE's module is not there
    elif stage == "GE's load":
        ge.failing["load"], ge.only = PLANTED, frozenset({generated.TYPE})
    else:  # a refusal that we expect, and errors of CANN's libraries
        cores.failing[stage] = compiler.Refused("EZ9999: planted") if stage == "compile" else PLANTED


BY_ITSELF = [(stage, True) for stage in ("generation", "compile", "load", "launch", "write")]


@pytest.mark.parametrize(("stage", "by_itself"), [*((stage, False) for stage in STAGES), *BY_ITSELF])
def test_steps_down_to_ge_operations(
    stage: str, by_itself: bool, ge: harness.Recording, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores.calls_back = not by_itself
    opts = triple(BY_NAME["adamw"])
    fail(stage, ge, cores, monkeypatch)
    said = train(opts, 3, kernels="generated", strict=True)
    assert_same(opts)
    (row,) = report().groups
    assert row.lowering == "npu" and row.kernel != "generated NPU kernel"
    assert ("EZ9999: planted" if stage != "callback" else "GE does not take the callback") in row.note
    assert report().fallback is None
    first_run = stage in ("GE's load", "launch", "write")
    assert [("without generated kernels" in text) for text in said] == [True] * first_run
    assert ("GE refused" in row.note) == (first_run and not by_itself)
    assert ge[-1].runs == 3 and generated.TYPE not in ge[-1].counts()


@pytest.mark.parametrize("stage", ["launch", "write"])
def test_steps_down_to_the_original(stage: str, ge: harness.Recording, cores: Cores) -> None:
    cores.failing[stage] = PLANTED
    ge.failing["write"] = PLANTED
    opts = triple(BY_NAME["adamw"])
    said = train(opts, 3, kernels="generated")
    for p, q in zip(opts[0].param_groups[0]["params"], opts[1].param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    assert "EZ9999: planted" in str(report().fallback) and report().groups[0].lowering == "eager"
    (text,) = said
    assert "not fused" in text and "EZ9999: planted" in text


MACHINE = {"chip": "Ascend910B3", "CANN": "9.2", "torch_npu": "2.13.0", "npu_fuse_pass": "0.1.0 abc"}


def test_the_default_takes_what_is_proved(ge: harness.Recording, cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = dict(MACHINE)
    monkeypatch.setattr(ascend, "machine", lambda: machine)

    def kernel() -> tuple[bool, str, list[str]]:
        torch._dynamo.reset()
        opts = triple(BY_NAME["adamw"])
        said = train(opts, 2)
        assert_same(opts)
        (row,) = report().groups
        return row.kernel == "generated NPU kernel", row.note, said

    used, note, said = kernel()
    assert not used and "not proved on this machine, see python -m npu_fuse_pass selftest" in note and not said
    assert proof.record(machine, 17) == ""
    used, note, said = kernel()
    assert used and "proved on this machine by the self-test of 20" in note and not said
    for name in machine:  # another chip, CANN, torch_npu or version is another machine
        machine[name] += "x"
        assert not proof.proven(machine)
        machine[name] = MACHINE[name]
    proof.withdraw(machine)
    used, note, said = kernel()
    assert not used and "a generated kernel ran this group at the last start, now GE operations" in note
    assert any("at the last start" in text for text in said)
    used, note, said = kernel()
    assert not used and "last start" not in note and not said
    assert "CANN" in proof.record({**machine, "CANN": "unknown"}, 17)


def test_a_group_without_elements_is_run_by_nothing(ge: harness.Recording, cores: Cores) -> None:
    """The same formula as that of a generated kernel: no other form computes anything."""
    for sizes, kernel in (((7,), "generated NPU kernel"), ((0,), "AdamApplyOneAssign"), ((7,), "generated NPU kernel")):
        torch._dynamo.reset()
        opt = torch.optim.Adam([torch.nn.Parameter(torch.ones(size)) for size in sizes], lr=0.1, foreach=True)
        assert not train([opt], 2, kernels="generated")
        (row,) = report().groups
        assert row.kernel == kernel and "at the last start" not in row.note


def test_bits_are_those_of_a_step_by_itself(ge: harness.Recording, cores: Cores) -> None:
    found = []
    for cores.calls_back in (True, False):
        torch._dynamo.reset()
        opt = triple(BY_NAME["lamb"])[0]
        train([opt], 3, kernels="generated", strict=True)
        found.append(steps.tensors(opt))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Idle(Cores):
    """Launches nothing, and says nothing."""

    def __call__(self, *launch: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("made", "failing", "says"),
    [
        (Cores, None, "**Proved**: 2 optimizers agree with float64"),
        (Idle, None, "**Not proved**: 2 failed"),
        (Cores, "launch", "**Not proved**: 2 failed"),
        (Cores, "compile", "Not proved: no group had one"),
    ],
    ids=["right", "wrong", "refused at the first run", "refused by the compiler"],
)
def test_the_self_test_proves(
    made: type[Cores], failing: str | None, says: str, ge: harness.Recording, monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(ascend, "machine", lambda: MACHINE)
    cores = made(chunk=1024, calls_back=True)
    cores.failing = {} if failing is None else {failing: compiler.Refused("planted")}
    monkeypatch.setattr(ascend, "current", lambda: cores)
    chosen = [c for c in cases.cases(False) if c.name in ("lion, weight_decay=0.1", "NpuFusedLamb, adam=True")]
    assert len(chosen) == 2
    monkeypatch.setattr(cases, "cases", lambda quick: chosen)
    compare = parity.compare
    monkeypatch.setattr(parity, "compare", lambda case, platform, device, **o: compare(case, platform, "cpu", **o))
    proof.record(MACHINE, 1)
    report = Report(tmp_path / "report.md", "npu", False)
    failed = session._generated(report, False)
    assert report.proof.startswith(says), report.proof
    assert bool(proof.proven(MACHINE)) == ("**Proved" in says)
    assert len(failed) == 2 * ("failed" in says)
    assert says in report.text()


def test_dump(ge: harness.Recording, cores: Cores, tmp_path: pathlib.Path) -> None:
    opts = triple(BY_NAME["lamb"])
    train(opts, 1, kernels="generated", strict=True, dump=tmp_path)
    (file,) = tmp_path.rglob("06_npu_kernel.mlir")
    text = file.read_text()
    assert "2 launches, 40 bytes per element" in text and "launch 2 of 2" in text
    assert text.count("func.func @update_") >= 4 and "the compiler's last IR for Ascend910B3" in text
    assert "hivm.hir.load" in text
    cores.failing["launch"] = PLANTED  # what does not run is not there
    torch._dynamo.reset()
    train(triple(BY_NAME["lamb"]), 1, kernels="generated", dump=tmp_path / "two")
    assert not list((tmp_path / "two").rglob("06_npu_kernel.mlir"))
