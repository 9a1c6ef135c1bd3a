"""Step counters that lie on the device (capturable=True): read in one transfer, written back, and said in the report.

There is no device here: the leaves say that they lie on one, and their values are this machine's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from steps import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import npu_fuse_pass
from npu_fuse_pass import capture as stage
from npu_fuse_pass import pipeline
from npu_fuse_pass.backend import npu_fused
from npu_fuse_pass.lowerings import npu_numbers

SHAPES = [(4, 5), (3,), (2, 2)]
NPU = torch.device("privateuseone:0")  # "npu" has that name where torch_npu is imported


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def counters_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 0-dim input of a captured step is said to be on the device."""
    capture = stage.capture

    def moved(*args: Any, **kwargs: Any) -> Any:
        captured = capture(*args, **kwargs)
        captured.leaves[:] = [
            dataclasses.replace(leaf, device=NPU) if leaf.kind in ("input", "attribute") and not leaf.shape else leaf
            for leaf in captured.leaves
        ]
        return captured

    monkeypatch.setattr(pipeline, "capture", moved)
    monkeypatch.setattr(npu_numbers.Advanced, "moved_to", lambda self, kinds: self.value)


def asgd() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return params, torch.optim.ASGD(params, lr=0.1, lambd=0.01, foreach=False)


def run(steps: int) -> Any:
    """Steps of an optimizer and of an eager one; the newest report's row."""
    (params, ours), (wanted, eager) = asgd(), asgd()
    step = torch.compile(ours.step, backend=npu_fused, options={"platform": "npu"})
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        for p, q in zip(params, wanted, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        with harness.record():
            step()
        eager.step()
    for p, q in zip(params, wanted, strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)
        for key, value in eager.state[q].items():
            if isinstance(value, Tensor):
                assert_close(ours.state[p][key], value, 1e-6)
    report = npu_fuse_pass.reports()[-1]
    assert report.fallback is None
    (row,) = report.groups
    return row


def test_the_report_says_that_a_step_waits(counters_on_device: None) -> None:
    row = run(4)
    assert row.note.endswith(
        f"every step waits for the device to read {3 * len(SHAPES)} of its 0-dim tensors: keep them on the CPU "
        "(capturable=False), or use an optimizer of npu_fuse_pass.optim"
    )
    assert "waits for the device" in str(npu_fuse_pass.reports()[-1])


def test_counters_on_the_cpu_are_not_mentioned() -> None:
    assert "waits for the device" not in run(3).note


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_they_are_read_at_once() -> None:
    """One stack for each dtype, whatever their number."""
    leaf = npu_fuse_pass.ir.Leaf("input", "step", device=NPU)
    kinds = [torch.float32, torch.int64]
    leaves = [dataclasses.replace(leaf, dtype=kinds[i % 2], index=i) for i in range(20)]
    values: list[Tensor | None] = [torch.tensor(2**24 + i, dtype=x.dtype) for i, x in enumerate(leaves)]
    read = npu_numbers.OnDevice([i for i in range(20) if i != 3], leaves)
    with _Calls() as calls:
        found = read.fetched(values)
    assert calls.names.count("stack") == 2
    assert set(calls.names) <= {"stack", "unbind"}
    assert found[3] is values[3]
    assert found == values  # exact: a mix of both dtypes would round integers
    assert not any(a is b for i, (a, b) in enumerate(zip(found, values, strict=True)) if i != 3)
