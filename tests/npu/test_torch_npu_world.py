"""torch_npu's GradScaler, checkpoints of torch_npu.optim's own classes, and the order of imports.

Run with the wheel's code on CPU tensors, see pretended.py; not run: the kernels of an NPU.
"""

from __future__ import annotations

import copy
import io
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import pretended
import pytest
import torch
from steps import assert_close
from torch import Tensor

import npu_fuse_pass
import optimizers
from npu_fuse_pass.backend import npu_fused
from scripts.conversion_cases import OURS
from tests.support.tolerances import TORCH_NPU

SHAPES = [(4, 5), (7,), (2, 3), (7,)]


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return pretended.pretend(monkeypatch)


def parameters(dtypes: Sequence[torch.dtype]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(d)) for d in dtypes for s in SHAPES]


def gradients(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def compiled(optimizer: Any) -> Callable[[], Any]:
    torch._dynamo.reset()
    npu_fuse_pass.clear_reports()
    step: Callable[[], Any] = torch.compile(optimizer.step, backend=npu_fused, options={"platform": "npu"})
    return step


def assert_fused(parameters: int) -> None:
    (report,) = npu_fuse_pass.reports()
    assert report.platform == "npu" and report.fallback is None and not report.unfused
    assert sum(g.updates for g in report.groups) == parameters


@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale_ and step"])
@pytest.mark.parametrize("name", OURS)
def test_torch_npus_gradscaler(name: str, unscale_first: bool, torch_npu: Any) -> None:
    """An overflow skips the step and halves the scale; two good steps in a row double it."""
    params, eager = parameters([torch.float32]), parameters([torch.float32])
    ours, other = OURS[name](params), OURS[name](eager)
    ours.step = compiled(ours)  # what a scaler calls
    scaler = torch_npu.npu.amp.GradScaler(init_scale=8.0, growth_interval=2)
    scales = []
    with harness.record() as graphs:
        for k, overflow in enumerate([False, True, False, False, False, True]):
            scales.append(float(scaler.scale(torch.ones(()))))
            before = copy.deepcopy([p.detach() for p in params])
            grads = gradients(params, k)
            for p, g in zip(params, grads, strict=True):
                p.grad = g * scales[-1]
            if overflow:
                params[1].grad[0] = float("inf")
            if unscale_first:
                scaler.unscale_(ours)
            scaler.step(ours)
            scaler.update()
            if overflow:
                assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
                continue
            for p, g in zip(eager, grads, strict=True):
                p.grad = g
            other.step()
    assert scales == [8.0, 8.0, 4.0, 4.0, 8.0, 8.0]
    assert scaler.get_scale() == 4.0
    assert [g.runs for g in graphs] == [4]
    assert_fused(len(params))
    for p, q in zip(params, eager, strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)
        for state, value in other.state[q].items():
            assert_close(ours.state[p][state], value, 1e-6)


def test_half_precision_gradients_are_refused_as_for_every_torch_optimizer(torch_npu: Any) -> None:
    """torch_npu's scaler unscales float16 gradients for its own classes only (`is_fused_optimizer`)."""
    params = parameters([torch.float16])
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    for optimizer in (optimizers.NpuFusedAdam(params), torch.optim.Adam(params)):
        scaler = torch_npu.npu.amp.GradScaler()
        scaler.scale(torch.ones(()))
        with pytest.raises(TypeError, match="Attempting to unscale FP16 gradients"):
            scaler.step(optimizer)


# ours -> options. The original of each has the same name and takes the same options.
CHECKPOINTS: dict[str, list[dict[str, Any]]] = {
    "NpuFusedSGD": [
        dict(lr=0.05),
        dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
        dict(lr=0.05, momentum=0.9, nesterov=True),
    ],
    "NpuFusedAdam": [dict(lr=0.02, weight_decay=0.1), dict(lr=0.02, amsgrad=True)],
    "NpuFusedAdamW": [dict(lr=0.02), dict(lr=0.02, amsgrad=True)],
    "NpuFusedLamb": [dict(lr=0.02, weight_decay=0.1), dict(lr=0.02, adam=True)],
    "NpuFusedRMSpropTF": [
        dict(lr=0.02, weight_decay=0.1),
        dict(lr=0.02, eps=1e-3, momentum=0.9, centered=True, lr_in_momentum=False),
        dict(lr=0.02, momentum=0.9, decoupled_decay=True, weight_decay=0.1),
    ],
}
CASES = [
    pytest.param(name, options, id=f"{name}-{k}")
    for name, all_of in CHECKPOINTS.items()
    for k, options in enumerate(all_of)
]


def train(params: Sequence[torch.nn.Parameter], step: Callable[[], Any], seeds: Sequence[int]) -> None:
    for seed in seeds:
        for p, g in zip(params, gradients(params, seed), strict=True):
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)  # the originals keep gradients where they are
        step()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_checkpoint_of_the_original(name: str, options: dict[str, Any], torch_npu: Any) -> None:
    """Written by the original after three steps; ours goes on from it as the original does."""
    params = parameters([torch.float32, torch.float16])
    original = getattr(torch_npu.optim, name)(params, **options)
    train(params, original.step, range(3))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    states = list(saved["state"].values())
    assert all(isinstance(s["step"], int) and s["step"] == 3 for s in states if "step" in s)
    assert {v.dtype for s in states[len(SHAPES) :] for v in s.values() if isinstance(v, Tensor)} <= {torch.float16}

    mine = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = getattr(optimizers, name)(mine, **{**options, "lr": 1.0})  # lr comes from the checkpoint
    ours.load_state_dict(saved)
    with harness.record() as graphs:
        train(mine, compiled(ours), range(3, 6))
    train(params, original.step, range(3, 6))
    assert [g.runs for g in graphs] == [3]
    assert_fused(len(params))
    for p, q in zip(mine, params, strict=True):
        assert_close(p.detach(), q.detach(), TORCH_NPU[p.dtype])
        for state, value in original.state[q].items():
            if state == "step":
                assert int(ours.state[p]["step"]) == value == 6
            else:
                assert_close(ours.state[p][state], value, TORCH_NPU[p.dtype])


ORDERS = {
    "before ours": "import torch_npu, torchair; import npu_fuse_pass, optimizers",
    "after a step of ours": "import npu_fuse_pass, optimizers; made = trained('cpu'); import torch_npu, torchair",
}
PROGRAM = """
import sys, torch
sys.path[:0] = {paths!r}

def trained(platform):
    import npu_fuse_pass, optimizers
    from npu_fuse_pass.backend import npu_fused
    p = torch.nn.Parameter(torch.arange(6.0))
    p.grad = p.detach().cos()
    optimizer = optimizers.NpuFusedAdam([p], lr=0.1)
    torch.compile(optimizer.step, backend=npu_fused, options=dict(platform=platform, strict=True))()
    assert npu_fuse_pass.reports()[-1].groups[0].lowering == platform.replace("auto", "cpu")
    return p.detach()

{imports}
import harness
with harness.record() as graphs:
    on_npu = trained("npu")
assert [g.runs for g in graphs] == [1]
torch.testing.assert_close(on_npu, trained("auto"), rtol=1e-6, atol=0)
torch.testing.assert_close(on_npu, trained("cpu"), rtol=1e-6, atol=0)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_torch_npu_is_imported(order: str) -> None:
    """Either way a step can be made for NPUs, and "auto" still goes by the tensors' device."""
    here = pathlib.Path(__file__).parent
    program = PROGRAM.format(paths=[str(here), str(here.parent.parent)], imports=ORDERS[order])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
