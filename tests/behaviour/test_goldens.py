"""Every golden trajectory, eagerly and compiled: by our classes, and by torch.optim's where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import optimizers
import optimizers.paddle as paddle
from npu_fuse_pass.tolerances import TRAJECTORY
from tests.goldens import Golden, all_goldens, error, flat
from tests.support.training import MODES, Step

pytestmark = pytest.mark.usefixtures("shipped_kernels")

OURS = {
    "SGD": optimizers.NpuFusedSGD,
    "Adam": optimizers.NpuFusedAdam,
    "AdamW": optimizers.NpuFusedAdamW,
    "RMSProp": paddle.RMSProp,
}
PADDLE_STATES = {"mean_square": "square_avg", "mean_grad": "grad_avg", "momentum": "momentum_buffer"}
GOLDENS = all_goldens()
PLAIN = [g for g in GOLDENS if not g.special]
EXAMPLES = [g for g in GOLDENS if g.special]
STOCK = [g for g in PLAIN if g.source == "torch"]


def build(golden: Golden, params: list[Any], *, stock: bool = False) -> tuple[Any, Any]:
    """The optimizer of a case, and its scheduler or None."""
    given = golden.parameter_argument(params)
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in golden.kwargs.items()}
    if golden.source == "paddle":
        kwargs = {k: paddle_value(v) for k, v in kwargs.items()}
        scheduler = kwargs["learning_rate"] if not isinstance(kwargs["learning_rate"], float) else None
        return paddle.RMSProp(parameters=given, **kwargs), scheduler
    if stock:
        return getattr(torch.optim, golden.cls)(given, **kwargs), None
    return (OURS.get(golden.cls) or getattr(optimizers, golden.cls))(given, **kwargs), None


def paddle_value(value: Any) -> Any:
    """Objects are written in the manifest as "Name:arguments"."""
    if not isinstance(value, str):
        return value
    name, arguments = value.split(":")
    return getattr(paddle, name)(*eval(f"({arguments},)"))


def run(golden: Golden, dtype: str, mode: str, *, stock: bool = False) -> tuple[np.ndarray, Any, list[Any]]:
    params = golden.parameters(dtype)
    opt, scheduler = build(golden, params, stock=stock)
    step = Step(opt, mode, fullgraph=not stock)
    rows = [flat(params)]
    for t in range(golden.steps):
        golden.set_gradients(params, t)
        step()
        if scheduler is not None:
            scheduler.step()
        rows.append(flat(params))
    # our classes keep a place for every trainable parameter: a gradient that comes late recompiles nothing
    step.check(golden.updated() if stock else sum(p.requires_grad for p in params))
    return np.stack(rows), opt, params


def check_states(golden: Golden, dtype: str, opt: Any, params: list[Any]) -> None:
    for name, want in golden.final_states(dtype).items():
        name = PADDLE_STATES[name] if golden.source == "paddle" else name
        having = [opt.state[p][name] for p in params if p in opt.state and name in opt.state[p]]
        if not having and not want.any():
            continue  # Paddle keeps mean_grad also where it is not centered
        got = flat(having)
        assert got.shape == want.shape, name
        assert error(got, want) <= TRAJECTORY[getattr(torch, dtype)], name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("golden", PLAIN, ids=lambda g: g.name)
def test_trajectory(golden: Golden, mode: str) -> None:
    for dtype in golden.dtypes:
        got, opt, params = run(golden, dtype, mode)
        assert error(got, golden.trajectory(dtype)) <= TRAJECTORY[getattr(torch, dtype)], dtype
        check_states(golden, dtype, opt, params)


@pytest.mark.parametrize("golden", STOCK, ids=lambda g: g.name)
def test_stock_class_compiled(golden: Golden) -> None:
    for dtype in golden.dtypes:
        torch._dynamo.reset()  # torch.optim's classes share torch's limit of 8 compiles
        got, opt, params = run(golden, dtype, "compiled", stock=True)
        want = golden.trajectory(dtype)
        assert error(got, want) <= TRAJECTORY[getattr(torch, dtype)], dtype
        check_states(golden, dtype, opt, params)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("golden", EXAMPLES, ids=lambda g: g.name)
def test_documents_example(golden: Golden, mode: str) -> None:
    """Always finite; equal to the original where that is finite.

    Half precision may differ by one unit in the last place: the originals compute in float16,
    ours in float32.
    """
    got, _, params = run(golden, "mixed", mode)
    want = golden.trajectory("mixed")
    assert np.isfinite(got).all()
    half = np.concatenate([np.full(p.numel(), p.dtype is torch.float16) for p in params])
    for columns, limit in ((~half, 2e-4), (half, 2**-10)):
        finite = np.isfinite(want) & columns
        assert finite.any()
        assert error(got[finite], want[finite]) <= limit


def test_manifest_is_complete() -> None:
    assert len(GOLDENS) == 73
    assert sum(len(g.dtypes) for g in GOLDENS) == 140
    assert {g.source for g in GOLDENS} == {"torch", "npu", "paddle"}
    assert {g.cls for g in GOLDENS if g.source == "npu"} <= set(dir(optimizers))
