"""From torch.compile through the pipeline to GE graphs; placement on NPUs; without torch_npu."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from steps import SHAPES, assert_same, captured_step, parameters, set_gradients, step_both, twins
from torch import Tensor

from npu_fuse_pass import errors, private_torch, rule, total
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings.npu import program as npu
from npu_fuse_pass.lowerings.npu.environment import require
from npu_fuse_pass.passes.group import group
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.report import report
from npu_fuse_pass.tensors import memory
from tests.support.cases import BY_NAME
from tests.support.training import heard


def test_compiled_end_to_end(ge: harness.Recording) -> None:
    ours, eager = twins(BY_NAME["lamb"])
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu", "strict": True})
    step_both(ours, eager, step, 3)
    assert [g.runs for g in ge.graphs] == [3]
    found = report.reports()[-1].groups[0]
    assert (found.lowering, found.updates) == ("npu", len(SHAPES))
    assert_same(ours, eager, 1e-6)


@pytest.mark.parametrize("name", ["lamb", "adam"])
def test_a_torch_that_lacks_a_private_name_runs_the_original(
    name: str, ge: harness.Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*names: str) -> Any:
        return None if names == ("torch.utils._mode_utils.no_dispatch",) else found(*names)

    found = private_torch.find
    monkeypatch.setattr(private_torch, "find", find)
    ours, eager = twins(BY_NAME[name])
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu"})
    with heard() as said:
        for optimizer, call in ((ours, step), (eager, eager.step)):
            set_gradients(optimizer.param_groups[0]["params"], 0)
            call()
    (reason,) = report.reports()[-1].reasons
    assert reason.code is Code.TORCH and any("no_dispatch: torch" in text for text in said)
    assert not ge.graphs
    assert_same(ours, eager, 1e-6)


def test_lists_are_copied_one_by_one_where_torch_lacks_a_call_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, values = [torch.zeros(2), torch.zeros(())], [torch.ones(2), torch.tensor(3.0, dtype=torch.float64)]
    monkeypatch.setattr(memory, "find", lambda *names: None)
    memory.copy_each(targets, values)
    assert [t.tolist() for t in targets] == [[1.0, 1.0], 3.0]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "shared", ["parameters", "gradient", "from the second step on", "number", "number, from the second step on"]
)
def test_shared_memory_runs_the_original(shared: str, foreach: bool, ge: harness.Recording) -> None:
    """One update after the other sees what the one before it wrote; the GE graph reads everything first."""
    both = []
    for _ in range(2):
        base = torch.arange(12.0)
        second = base[2:6] if shared == "parameters" else base[6:10]
        if shared.startswith("number"):
            second = base[2 if shared == "number" else 6]
        both.append((base, [torch.nn.Parameter(base[:4]), torch.nn.Parameter(second)]))
    ours, eager = (torch.optim.SGD(p, lr=0.1, weight_decay=0.5, foreach=foreach) for _, p in both)
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu"})
    with heard() as said:
        for k in range(3):
            for base, params in both:
                if k == 1 and "from the second step on" in shared:
                    params[1].data = base[3] if shared.startswith("number") else base[3:7]
                set_gradients(params, k)
                if shared == "gradient":
                    params[1].grad = base[:4]
            step()
            eager.step()
    assert "share memory" in str(report.reports()[-1].fallback)
    assert sum("share memory" in text for text in said) == 1
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-6, atol=0)


def test_written_tensors_are_reused_in_place_on_an_npu() -> None:
    """Converted for tensors on npu:0: all that is written is in-place, and the one host input is not written."""
    import torch_npu

    torch_npu.npu._lazy_init = lambda: None
    optimizer = BY_NAME["adam"].build(parameters())
    set_gradients(optimizer.param_groups[0]["params"], 0)
    captured = captured_step(optimizer)
    device = torch.device("npu:0")
    captured.leaves[:] = [dataclasses.replace(x, device=device) if x.shape else x for x in captured.leaves]
    grouped = group(captured)
    runner = npu.Program(grouped.leaves, grouped.groups)._execution.compiled.runner
    reused = runner._normalize_ge_option()[0]["ge.exec.outputReuseInputMemIndexes"].split("|")
    placements = list(runner.graph.attr["_input_placements"].list.i)
    written = 3 * len([s for s in SHAPES if 0 not in s])
    assert len(reused) == written
    assert sorted(int(pair.split(",")[1]) for pair in reused) == list(range(written))
    assert placements.count(0) == 1
    assert all(placements[int(pair.split(",")[0])] == 1 for pair in reused)


def test_without_torch_npu_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(errors.PlatformError, match=r"npu-fuse-pass\[npu\]\" torch==.*CANN"):
        require()


def test_new_tensors_that_follow_from_none(ge: harness.Recording) -> None:
    """What a function makes of numbers alone, of sizes that no other tensor has to have."""
    both = [BY_NAME["adam"].build(parameters()) for _ in range(2)]

    def with_made(optimizer: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
        def function() -> tuple[torch.Tensor, ...]:
            optimizer.step()
            return torch.zeros_like(optimizer.param_groups[0]["params"][0]), torch.full((2, 5), 3.0).half() * 0.5

        return function

    ours = torch.compile(with_made(both[0]), backend=npu_fused, options={"platform": "npu", "strict": True})
    for k in range(2):
        for optimizer in both:
            set_gradients(optimizer.param_groups[0]["params"], k)
        for got, wanted in zip(ours(), with_made(both[1])(), strict=True):
            assert (got.dtype, got.stride()) == (wanted.dtype, wanted.stride()) and torch.equal(got, wanted)
    assert_same(*both, 1e-6)
    assert [g.runs for g in ge.graphs] == [2]


def all_in_one(p: Tensor, q: Tensor, g: Tensor, m: Tensor) -> Tensor:
    new = p - 0.1 * g
    p.copy_(new)
    q.copy_(new)  # as Lookahead, where it sets the parameters back
    m.copy_(g)
    return new


def of_two(p: Tensor, q: Tensor, g: Tensor, m: Tensor) -> Tensor:
    p.copy_(g)
    q.copy_(g)
    m.mul_(0.5)
    return g.clone()


def around_a_product(p: Tensor, q: Tensor, g: Tensor, m: Tensor) -> Tensor:
    new = p @ g
    p.copy_(new)
    q.copy_(new)
    m.sub_(new * 0.5)
    return new


@pytest.mark.parametrize("kernels", ["auto", "elementwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [all_in_one, of_two, around_a_product])
def test_one_value_in_several_places(
    function: Callable[..., Tensor], dtype: torch.dtype, kernels: str, ge: harness.Recording
) -> None:
    """All of them are written, and what is returned is none of them."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 3, generator=generator).to(dtype) for _ in range(4)]
    wanted = [t.clone() for t in given]
    step = torch.compile(function, backend=npu_fused, options={"platform": "npu", "kernels": kernels})
    returned: list[tuple[Tensor, Tensor]] = []
    for _ in range(3):
        returned.append((step(*given), function(*wanted)))
        for got, want in [*zip(given, wanted, strict=True), *returned]:
            torch.testing.assert_close(got, want)
    assert [g.runs for g in ge.graphs] == [3]
    (made,) = report.reports()
    assert made.fallback is None and {g.lowering for g in made.groups} == {"npu"}


@pytest.mark.parametrize("added", ["a norm", "a count"])
def test_what_a_parameter_without_elements_adds_to_a_total(added: str, ge: harness.Recording) -> None:
    """GE operations leave it out: right where it adds 0, as far as the form of what is added tells."""

    def scaled(param: Tensor, grad: Tensor, *, lr: Tensor, sum: Tensor) -> Tensor:
        return param - lr * grad * sum

    of_grad = {"a norm": lambda grad: (grad * grad).sum().sqrt() * 2, "a count": lambda grad: grad.sum() * 0 + 1}
    made = rule(defaults={"lr": 0.1}, totals={"sum": total(of_grad[added])})(scaled)
    found = []
    for compiled in (True, False):
        params = [torch.nn.Parameter(torch.arange(float(n))) for n in (5, 0, 3)]
        opt = made(params)
        step = torch.compile(opt.step, backend=npu_fused, options={"platform": "npu"}) if compiled else opt.step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for k in range(3):
                set_gradients(params, k)
                step()
        found.append(params)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
    assert bool(ge.graphs) == (added == "a norm")
    assert ("a tensor without elements" in str(report.reports()[-1].fallback)) == (added == "a count")
